"""What goes wrong outside: each fault ends in one sentence and the right exit code, and what was saved stays."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FLAGS = ("--quiet", "--steps", "40", "--save-every", "10")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("*"))


def ending(folder: Path) -> list[bytes]:
    last = folder / "checkpoints" / "step-000000040" / "tensors.safetensors"
    return [path.read_bytes() for path in (folder / "metrics.jsonl", folder / "result.json", last)]


@pytest.fixture
def whole(etude, tmp_path) -> Path:
    assert etude("run", etude.piece, "--out", tmp_path / "whole", *FLAGS).code == 0
    return tmp_path / "whole"


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("nan_loss", "loss is nan at step 25; the update was not made and the checkpoint of step 20 is kept"),
        (
            "nan_gradient",
            "the gradient of 0.weight is not finite at step 25; "
            "the update was not made and the checkpoint of step 20 is kept",
        ),
        ("nan_log", "odd is nan at step 25; the checkpoint of step 20 is kept"),
        ("nan_result", "the method ended with test_loss = nan"),
    ],
)
def test_nan_stops_the_run(etude, tmp_path, fault, sentence) -> None:
    folder = tmp_path / "run"
    done = etude("run", etude.piece, "--out", folder, *FLAGS, "--fault", fault, "--at", "25")
    assert (done.code, done.err, done.out) == (1, f"etude: {sentence}\n", "")
    assert (folder / "failed").read_text() == f"{sentence}\n"
    assert not (folder / "done").exists()
    assert not (folder / "result.json").exists()
    assert steps(folder) == ([30, 40] if fault == "nan_result" else [10, 20])
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == ([*range(41), 40] if fault == "nan_result" else list(range(26)))
    assert "failed" in etude("show", folder).out


def test_nan_before_the_first_checkpoint(etude, tmp_path) -> None:
    done = etude("run", etude.piece, "--out", tmp_path / "run", "--quiet", "--fault", "nan_loss", "--at", "3")
    assert done.err == "etude: loss is nan at step 3; the update was not made and no checkpoint had been written yet\n"


def test_an_error_of_the_method_writes_no_checkpoint_and_a_repaired_file_goes_on(etude, tmp_path, whole) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine.py"
    text = Path(etude.piece).read_text(encoding="utf-8")
    mine.write_text(
        text.replace("        optimizer.step()", "        assert step != 25\n        optimizer.step()"),
        encoding="utf-8",
    )
    done = etude("run", mine, "--out", folder, *FLAGS)
    assert done.code == 1
    assert done.err.startswith("Traceback")  # a mistake in code is shown where it is
    assert "assert step != 25" in done.err
    assert steps(folder) == [10, 20]
    assert (folder / "failed").read_text().startswith("AssertionError: \nTraceback")
    assert "AssertionError" in (folder / "report.html").read_text(encoding="utf-8")
    mine.write_text(text, encoding="utf-8")
    assert etude("resume", folder).code == 1  # the run keeps the source it was made with
    done = etude("resume", folder, "--source", mine)
    assert (done.code, done.err) == (0, "")
    assert (folder / "source.py").read_text(encoding="utf-8") == text
    assert not (folder / "failed").exists()
    assert (folder / "done").exists()
    assert ending(folder) == ending(whole)


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        # the third checkpoint finds the disk full while it writes its tensors or its text; the first one does
        ("checkpoint._write_tensors = after(3, checkpoint._write_tensors)", "the checkpoint of step 20 is kept"),
        ("checkpoint._write = after(5, checkpoint._write)", "the checkpoint of step 20 is kept"),
        ("checkpoint._write_tensors = after(1, checkpoint._write_tensors)", "no checkpoint was written"),
    ],
)
def test_full_disk(etude, tmp_path, whole, before, kept) -> None:
    folder = tmp_path / "run"
    done = etude("run", etude.piece, "--out", folder, *FLAGS, before=FULL + before)
    assert done.code == 1
    assert (
        done.err == f"etude: the disk of {folder} is full (No space left on device); {kept}; "
        f"free space and run: etude resume {folder}\n"
    )
    assert steps(folder) == ([10, 20] if "20" in kept else [])
    assert kept in (folder / "failed").read_text()
    done = etude("resume", folder)
    assert (done.code, done.err) == (0, "")
    assert ending(folder) == ending(whole)
    assert not (folder / "failed").exists()


FULL = """
import errno, os
from etude.core import checkpoint, record
def after(count, function):
    def call(*arguments):
        global left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return function(*arguments)
    globals()["left"] = count
    return call
"""


def test_the_system_refuses_more_bytes(etude, tmp_path) -> None:
    """A real limit of the kernel (a largest file size) meets the real writer."""
    folder = tmp_path / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
    words = ["--out", folder, *FLAGS, "--widths", "64", "64"]
    done = etude("run", etude.piece, *words, before=limit.format(20_000))  # tensors do not fit
    assert done.code == 1
    assert done.err == (
        f"etude: the disk of {folder} is full (File too large); no checkpoint was written; free space and run: etude resume {folder}\n"
    )
    assert not list(folder.rglob(".part-*"))
    done = etude(
        "run", etude.piece, "--out", tmp_path / "small", *FLAGS, before=ONCE_OPEN + "    " + limit.format(3_000)
    )  # metrics.jsonl does not
    assert done.code == 1
    assert "is full (File too large); " in done.err
    assert len(done.err.splitlines()) == 1
    assert etude("resume", tmp_path / "small").code == 0
    assert etude("run", etude.piece, "--out", tmp_path / "calm", *FLAGS).code == 0
    assert ending(tmp_path / "small") == ending(tmp_path / "calm")


ONCE_OPEN = """
from etude.core.record import Record
begin = Record.open
def limited(record, *arguments):
    begin(record, *arguments)
    limit()
Record.open = limited
def limit():
"""


def test_full_disk_before_the_run_begins(etude, tmp_path) -> None:
    before = FULL + "checkpoint.write_text = after(1, checkpoint.write_text)"
    said = etude.refused("run", etude.piece, "--out", tmp_path / "run", before=before)
    assert (
        said
        == f"the run folder {tmp_path / 'run'} cannot be written (No space left on device); name another with --out"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/etude/run"])
def test_a_folder_that_cannot_be_written(etude, tmp_path, place) -> None:
    (tmp_path / "file").write_text("mine")
    said = etude.refused("run", etude.piece, "--out", place)
    assert said.startswith(f"the run folder {place} cannot be written (")
    assert said.endswith("); name another with --out")
    assert (tmp_path / "file").read_text() == "mine"
    done = etude("run", etude.piece, ETUDE_RUNS=str(tmp_path / "file"))
    assert (done.code, done.err.count("\n"), done.err[:22]) == (2, 1, "etude: the run folder ")


def test_a_folder_that_becomes_read_only(etude, tmp_path, whole) -> None:
    """The checkpoints folder is swapped for a file in the middle of the run: what was there is whole afterwards."""
    folder = tmp_path / "run"
    before = """
from etude.core.run import Run
average = Run.average
def closing(run, *arguments, **settings):
    if run.step == 25:
        (run.folder / "checkpoints").rename(run.folder / "aside")
        (run.folder / "checkpoints").touch()
    average(run, *arguments, **settings)
Run.average = closing
"""
    done = etude("run", etude.piece, "--out", folder, *FLAGS, before=before)
    assert done.code == 1
    assert done.err.startswith(f"etude: {folder}/checkpoints")
    assert done.err.endswith(
        f"cannot be written any more (Not a directory); put that right and run: etude resume {folder}\n"
    )
    (folder / "checkpoints").unlink()
    (folder / "aside").rename(folder / "checkpoints")
    assert steps(folder) == [10, 20]
    assert etude("resume", folder).code == 0
    assert ending(folder) == ending(whole)


# --------------------------------------------------------------------------------------------------------- checkpoints


def truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def flip_text(path: Path) -> None:
    file = path / "state.json"
    file.write_bytes(file.read_bytes().replace(b'"seen"', b'"sewn"'))


def empty(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def other_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000000020"), path)


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def other_shape(path: Path) -> None:
    """A number where the state should be, under a manifest that vouches for it."""
    import hashlib

    (path / "state.json").write_bytes(b"1.5")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": 3, "sha256": hashlib.sha256(b"1.5").hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def pickled(path: Path) -> None:
    """A pickle that would touch a file where weights should be, under a manifest that vouches for it."""
    import hashlib

    data = pickle.dumps(Bomb())
    (path / "tensors.safetensors").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def pickle_alone(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize("damage", [truncate, flip, flip_text, empty, other_step, other_shape, pickled, pickle_alone])
def test_a_damaged_checkpoint_is_passed_over(etude, tmp_path, whole, damage) -> None:
    folder = tmp_path / "run"
    assert etude("run", etude.piece, "--out", folder, *FLAGS, "--fault", "nan_loss", "--at", "39").code == 1
    config = json.loads((folder / "config.json").read_text())
    config["config"]["fault"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    assert steps(folder) == [20, 30]
    damage(folder / "checkpoints" / "step-000000030")
    done = etude("resume", folder)
    assert (done.code, done.err) == (0, "")
    assert ending(folder) == ending(whole)
    assert steps(folder) == [30, 40]
    assert not (tmp_path / "exploded").exists()
    (flip if damage is other_step else damage)(folder / "checkpoints" / "step-000000040")
    truncate(folder / "checkpoints" / "step-000000030")
    (folder / "done").unlink()
    said = etude.refused("resume", folder)
    assert "step-000000040" in said
    assert said.endswith("no whole checkpoint is left, so start the run again")
    assert steps(folder) == [30, 40]
    assert not (tmp_path / "exploded").exists()


def test_damage_is_said(etude, tmp_path) -> None:
    folder = tmp_path / "run"
    assert (
        etude(
            "run", etude.piece, "--out", folder, "--steps", "40", "--save-every", "10", "--fault", "error", "--at", "39"
        ).code
        == 1
    )
    flip(folder / "checkpoints" / "step-000000030")
    done = etude("resume", folder)
    assert done.code == 1  # the error is still there
    assert done.err.startswith(
        f"checkpoint {folder}/checkpoints/step-000000030 is damaged (its checksum does not match); going on from step 20\n"
    )


def test_a_damaged_run_folder(etude, tmp_path, whole) -> None:
    (whole / "done").unlink()
    (whole / "environment.json").write_text("{")  # nothing depends on it
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    before = ending(whole)[1:]
    assert etude("resume", whole).code == 0
    assert ending(whole)[1:] == before
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()] == [*range(41), 40]
    for text in ("{", "[]", '{"method": "vision/lenet"}', '{"method": "vision/lenet", "config": 1, "common": {}}'):
        (whole / "config.json").write_text(text)
        for verb in ("resume", "show", "sample"):
            assert etude.refused(verb, whole).startswith(f"{whole}/config.json is damaged")


def test_a_changed_method_file_does_not_fit(etude, tmp_path) -> None:
    mine = tmp_path / "mine.py"
    text = Path(etude.piece).read_text(encoding="utf-8")
    mine.write_text(text, encoding="utf-8")
    folder = tmp_path / "run"
    assert etude("run", mine, "--out", folder, *FLAGS).code == 0
    (folder / "done").unlink()
    for old, new, part in [
        ("nn.Linear(a, b), nn.Tanh()", "nn.Linear(a, b, bias=False), nn.Tanh()", "disagree on '0.bias'"),
        ("widths[-1], 1)", "widths[-1], 2)", "size mismatch"),
        (
            "run.track(model=model, optimizer=optimizer, box=box)",
            "run.track(model=model, optimizer=optimizer)",
            "holds 'box'",
        ),
        ("    widths: tuple", "    width: tuple", "has no setting 'widths'; did you mean 'width'?"),
    ]:
        assert old in text
        mine.write_text(text.replace(old, new).replace("config.widths", "(8,)"), encoding="utf-8")
        done = etude("resume", folder, "--source", mine)
        assert done.code in (1, 2)
        assert done.err.count("\n") == 1
        assert part in done.err
    assert steps(folder) == [30, 40]
    mine.unlink()
    assert etude.refused("resume", folder, "--source", mine).startswith(f"there is no file {mine}")


# ---------------------------------------------------------------------------------------------------------------- data


def idx(shape: tuple[int, ...], top: int) -> bytes:
    values = np.arange(np.prod(shape)) % top
    return gzip.compress(
        struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path) -> Path:
    """An ETUDE_DATA whose MNIST is whole in form (and small)."""
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx((count, 28, 28), 256))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((count,), 10))
    return folder


def lenet(etude, mnist: Path, *words: object) -> str:
    """The refusal of a run whose data are wrong; no run folder is left, and one that existed empty stays empty."""
    there = etude.folder / "there"
    there.mkdir(exist_ok=True)
    environment = {"ETUDE_DATA": str(mnist.parent)}
    said = etude.refused("run", "vision/lenet", "--preset", "tiny", *words, **environment)
    assert etude.refused("run", "vision/lenet", "--preset", "tiny", "--out", there, *words, **environment) == said
    assert not (etude.folder / "runs").exists()
    assert list(there.iterdir()) == []
    return said


def test_dataset_missing_or_corrupted(etude, tmp_path, mnist) -> None:
    file = mnist / "train-images-idx3-ubyte.gz"
    good = file.read_bytes()
    for damaged in (good[:200], good[:-3] + b"abc", b"not a dataset", idx((40, 28, 27), 256), b""):
        file.write_bytes(damaged)
        assert str(file) in lenet(etude, mnist, "--data", "mnist")
    file.unlink()
    said = lenet(etude, mnist, "--data", "mnist")
    assert str(file) in said
    assert "etude data get mnist" in said
    assert "did you mean 'mnist'" in lenet(etude, mnist, "--data", "mnst")
    assert "does not exist" in lenet(etude, mnist, "--data", "./nowhere")
    assert "ETUDE_DATA" in etude.refused("run", "vision/lenet", "--data", "mnist", ETUDE_DATA=str(tmp_path / "gone"))


def test_archive_member_that_points_outside(etude, tmp_path, mnist) -> None:
    folder = mnist.parent / "cifar10"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in ("../../escaped", str(tmp_path / "absolute" / "escaped")):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"bad"))
    said = lenet(etude, mnist, "--data", "cifar10", "--size", "32")
    assert str(folder / "cifar-10-binary.tar.gz") in said
    assert not (tmp_path / "escaped").exists()
    assert not list(tmp_path.parent.rglob("escaped"))


def test_a_data_folder_with_one_broken_image(etude, tmp_path, mnist) -> None:
    photos = tmp_path / "photos"
    for number, name in enumerate(("cat", "dog")):
        (photos / name).mkdir(parents=True)
        for count in range(6):
            Image.new("L", (32, 32), 40 * count + 20 * number).save(photos / name / f"{count}.png")
    words = ("run", "vision/lenet", "--preset", "tiny", "--data", photos, "--quiet", "--steps", "2", "--batch", "4")
    assert etude(*words, "--out", tmp_path / "good").code == 0
    broken = photos / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    said = lenet(etude, mnist, "--data", photos)
    assert str(broken) in said


def test_data_that_vanish_do_not_harm_a_run(etude, tmp_path, mnist) -> None:
    """A resumed run whose data are gone says so and keeps everything."""
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for count in range(4):
            Image.new("L", (28, 28), 60 * count).save(photos / name / f"{count}.png")
    folder = tmp_path / "run"
    assert (
        etude(
            "run", "vision/lenet", "--preset", "tiny", "--steps", "4", "--data", photos, "--quiet", "--out", folder
        ).code
        == 0
    )
    (folder / "done").unlink()
    kept = sorted(path.name for path in folder.rglob("*"))
    photos.rename(tmp_path / "moved")
    assert str(photos) in etude.refused("resume", folder)
    assert sorted(path.name for path in folder.rglob("*")) == kept
    (tmp_path / "moved").rename(photos)
    assert etude("resume", folder).code == 0
