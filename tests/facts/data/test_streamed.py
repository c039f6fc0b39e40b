"""Folders on the disk: the same bytes as in memory, the same runs, resumed or not, and memory that does not grow."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import etude
from etude import data
from etude.core import checkpoint
from etude.core.errors import RunError, UserError
from etude.core.run import Run
from etude.data import folders, streamed
from etude.data.batches import Stream
from etude.data.streamed import Stored, Workers, reader

SMALL = {"depth": 8, "size": 8, "steps": 4, "batch": 6, "shift": 1, "flip": True, "evaluate_every": 2}


@pytest.fixture
def folder(tmp_path):
    """Two classes of 30 colour images each, of different sizes and formats."""
    rng = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number:03d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + number % 4, 12, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def both(folder, monkeypatch):
    """The folder in memory, and on the disk."""
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv("ETUDE_STREAM", switch)
        found.append(data.images(folder, size=8))
    return found


def test_images_on_the_disk_are_those_in_memory(both):
    memory, disk = both
    assert disk.spec == memory.spec  # of so few images mean and deviation are exact
    assert disk.source == memory.source + ", read from the disk"
    assert disk.about()["splits"] == memory.about()["splits"]
    for name in ("train", "validation", "test"):
        x, stored = getattr(memory, name).x, getattr(disk, name).x
        assert torch.equal(getattr(memory, name).y, getattr(disk, name).y)
        assert isinstance(stored, Stored)
        assert (stored.shape, len(stored), stored.dtype) == (x.shape, len(x), torch.uint8)
        assert torch.equal(stored[:], x)
        order = torch.randperm(len(x))
        assert torch.equal(stored[order], x[order])
        assert torch.equal(stored[1::2], x[1::2])
        assert torch.equal(stored[0], x[0])
        assert stored[5:5].shape == (0, 3, 8, 8)
        assert torch.equal(torch.cat(list(stored.split(4))), x)
        for mine, theirs in zip(stored.tensor_split(3), x.tensor_split(3), strict=True):
            assert torch.equal(mine, theirs)


def test_a_batch_is_a_function_of_seed_and_step(both):
    memory, disk = both
    stream = Stream(len(memory.train), 7, seed=3)
    for steps in (range(12), (40, 41, 5, 5, 0)):  # in any order, also twice
        at = reader(disk.train.x, stream.indices)
        for step in steps:
            assert torch.equal(at(step), memory.train.x[stream.indices(step)])
    plain = reader(memory.train.x, stream.indices)
    assert torch.equal(plain(2), memory.train.x[stream.indices(2)])


def test_workers_decode_ahead_and_only_so_far(both, monkeypatch):
    asked, x = [], both[1].train.x
    begin = Stored.begin
    monkeypatch.setattr(Stored, "begin", lambda self, rows: asked.append(list(rows)) or begin(self, rows))
    x.workers.count = 2
    at = reader(x, lambda step: torch.tensor([step]))
    at(0)
    assert asked == [[0], [1], [2], [3], [4]]
    at(1)
    assert asked[5:] == [[5]]


def rows_and_weights(run_folder):
    return (run_folder / "metrics.jsonl").read_text(), checkpoint.load(run_folder / "checkpoints")[1]["model"]


@pytest.mark.parametrize(("method", "settings"), [("vision/resnet", SMALL), ("vision/lenet", {"steps": 3, "batch": 8})])
def test_a_run_on_the_disk_is_the_run_in_memory_and_resumed_exactly(folder, tmp_path, monkeypatch, method, settings):
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)
    settings = {
        "preset": "tiny",
        "quiet": True,
        "seed": 0,
        "threads": 1,
        "data": str(folder),
        "save_every": 1,
    } | settings
    monkeypatch.setenv("ETUDE_STREAM", "0")
    whole = etude.run(method, **settings, out=tmp_path / "memory")
    monkeypatch.setenv("ETUDE_STREAM", "1")
    disk = etude.run(method, **settings, out=tmp_path / "disk")

    def dying(run, *modules, **scalars):
        if run.step == 2:
            raise SystemExit
        return average(run, *modules, **scalars)

    average = Run.average
    with monkeypatch.context() as patch:
        patch.setattr(Run, "average", dying)
        with pytest.raises(SystemExit):
            etude.run(method, **settings, out=tmp_path / "killed")
    again = etude.resume(tmp_path / "killed")
    assert whole.metrics == disk.metrics == again.metrics
    rows, weights = rows_and_weights(whole.folder)
    for other in (disk, again):
        found = rows_and_weights(other.folder)
        assert found[0] == rows
        assert all(torch.equal(value, weights[name]) for name, value in found[1].items())


def test_moments_of_a_large_folder_are_estimated_on_images_spread_over_it(folder, monkeypatch):
    monkeypatch.setenv("ETUDE_STREAM", "1")
    monkeypatch.setattr(streamed, "SAMPLE", 5)
    found = data.images(folder, size=8)
    monkeypatch.setenv("ETUDE_STREAM", "0")
    x = data.images(folder, size=8).train.x
    some = (
        x[[0, round((len(x) - 1) / 4), round((len(x) - 1) / 2), round(3 * (len(x) - 1) / 4), len(x) - 1]].double() / 255
    )
    assert found.spec.mean == pytest.approx(some.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert found.source.endswith("read from the disk; mean and deviation of 5 of them")


def test_it_is_chosen_by_size_or_by_the_variable(folder, monkeypatch):
    monkeypatch.delenv("ETUDE_STREAM", raising=False)
    assert not streamed.too_large(folder, 8)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 2, "SC_PHYS_PAGES": 3 * 64 * 59}[name])
    assert streamed.too_large(folder, 8)  # 60 images; half of the memory holds 59
    assert isinstance(data.images(folder, size=8).train.x, Stored)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 2, "SC_PHYS_PAGES": 3 * 64 * 60}[name])
    assert not streamed.too_large(folder, 8)
    assert not streamed.too_large(folder / "missing", 8)
    monkeypatch.setenv("ETUDE_STREAM", "yes")
    with pytest.raises(UserError, match="ETUDE_STREAM is yes: set it to 1"):
        data.images(folder, size=8)


def test_faults_are_named(folder, both, monkeypatch):
    disk = both[1]
    path = Path(disk.train.x.paths[4])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"The image .*{path.name} cannot be read"):
        disk.train.x[:]
    assert disk.train.x[:3].shape == (3, 3, 8, 8)  # the worker lives on
    path.unlink()
    with pytest.raises(UserError, match=rf"The image .*{path.name} cannot be read"):
        disk.train.x[4]
    with pytest.raises(UserError, match=r"this method wants all of them at once \(Tensor.float\)"):
        disk.train.x.float()
    assert not hasattr(disk.train.x, "detach")
    with pytest.raises(UserError, match="give one size for all images"):
        data.images(folder)


def test_an_image_that_was_exchanged_is_named(folder, monkeypatch):
    for path in [*folder.glob("*/*")]:
        Image.new("RGB", (7, 5)).save(path)
    monkeypatch.setenv("ETUDE_STREAM", "1")
    x = data.images(folder).train.x
    assert x.shape[1:] == (3, 5, 7)
    Image.new("RGB", (5, 7)).save(x.paths[1])
    with pytest.raises(UserError, match=f"{Path(x.paths[1]).name} has changed since the folder was listed"):
        x[:3]


def test_workers_end_with_their_owner_and_their_death_is_told(both):
    x = both[1].train.x
    owner = Workers(1)
    alone = Stored(x.paths, tuple(x.shape[1:]), 8, owner)
    alone[:2]
    (process,) = owner._started
    assert process.poll() is None
    process.kill()
    process.wait()
    with pytest.raises(RunError, match="a process that decodes images has ended"):
        alone[:2]
    second = Workers(1)
    Stored(x.paths, tuple(x.shape[1:]), 8, second)[:1]
    (process,) = second._started
    del second
    assert process.wait(10) != 0
    process = subprocess.Popen([sys.executable, "-m", "etude.data.streamed"], stdin=subprocess.PIPE)
    process.stdin.close()  # whoever asked is gone
    assert process.wait(30) == 0


def test_listing_reads_no_image(folder, monkeypatch):
    monkeypatch.setattr(folders, "opened", None)
    monkeypatch.setattr(folders, "_shape", None)
    found = folders.listing(folder)
    assert len(found.paths) == 60
    assert dataclasses.asdict(found)["classes"] == ("a", "b")


MEMORY = """
import json, resource, sys
import etude
done = etude.run("vision/resnet", preset="tiny", data=sys.argv[1], depth=8, size=64, steps=6, batch=16, save_every=1, out=sys.argv[2],
                 quiet=True, threads=1, seed=0)
print(json.dumps([resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]))
"""


@pytest.mark.long
def test_memory_stays_flat_with_a_hundred_thousand_images(tmp_path):
    """390 MiB when decoded. Measured beside 1,000 images: 62 MiB more on the disk, 791 in memory (which bordering copies)."""
    rng = np.random.default_rng(0)
    kinds = [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(8)]
    for number, image in enumerate(kinds):
        image.save(tmp_path / f"kind{number}.png")

    def fill(root, count):
        for part, share in (("train", count), ("val", 100), ("test", 100)):
            for name in "ab":
                (root / part / name).mkdir(parents=True)
            for number in range(share):
                os.link(tmp_path / f"kind{number % 8}.png", root / part / "ab"[number % 2] / f"{number:06d}.png")
        return root

    peaks = {}
    for count in (1_000, 100_000):
        root = fill(tmp_path / str(count), count)
        for switch in ("0", "1"):
            out = tmp_path / f"run-{count}-{switch}"
            environment = {**os.environ, "ETUDE_STREAM": switch}
            began = time.time()
            said = subprocess.run(
                [sys.executable, "-c", MEMORY, str(root), str(out)], env=environment, check=True, capture_output=True
            )
            peaks[count, switch] = json.loads(said.stdout.splitlines()[-1])
            print(count, switch, peaks[count, switch], round(time.time() - began))
    assert peaks[100_000, "0"][0] - peaks[1_000, "0"][0] > 300  # the control
    assert peaks[100_000, "1"][0] - peaks[1_000, "1"][0] < 100
    assert peaks[100_000, "1"][1] - peaks[1_000, "1"][1] < 20  # the workers hold nothing
