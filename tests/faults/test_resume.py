"""Exact resume: whatever kills a run, the resumed one ends with the weights and metrics of the undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

FLAGS = ("--save-every", "5", "--quiet", "--steps", "40", "--pause", "1")

# the process kills itself at its n-th call of one of the functions that change the disk
STRIKE = """
import os, shutil, signal
from pathlib import Path
left = {count}
def striking(function):
    def call(*arguments, **settings):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)
    return call
from etude.core import checkpoint
checkpoint._write, checkpoint._write_tensors = striking(checkpoint._write), striking(checkpoint._write_tensors)
os.fsync, shutil.rmtree, Path.replace, Path.mkdir = map(striking, (os.fsync, shutil.rmtree, Path.replace, Path.mkdir))
"""


def ending(folder: Path) -> dict[str, bytes]:
    """Everything of a finished run that must not depend on how often it was killed."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = [folder / "metrics.jsonl", folder / "result.json", last / "state.json", last / "tensors.safetensors"]
    return {file.name: file.read_bytes() for file in [*files, *sorted((folder / "artifacts").iterdir())]}


@pytest.fixture
def whole(etude, tmp_path) -> dict[str, bytes]:
    """The ending of the undisturbed run."""
    done = etude("run", etude.piece, "--out", tmp_path / "whole", *FLAGS)
    assert (done.code, done.err) == (0, "")
    return ending(tmp_path / "whole")


# so that a test process that is kept waiting still finds a checkpoint half written
SLOW_DISK = """
import os, time
sync = os.fsync
def slow(handle):
    time.sleep(0.02)
    sync(handle)
os.fsync = slow
"""


def test_twenty_kills_at_random_moments(etude, tmp_path, whole) -> None:
    draw = random.Random(20)
    kills = inside = after = 0
    for attempt in range(400):  # a run may end before its kill comes; some 20 attempts do on an idle machine
        writing = attempt % 3 == 0
        folder = tmp_path / f"run-{attempt}"
        run = etude.start("run", etude.piece, "--out", folder, *FLAGS, before=SLOW_DISK if writing else "")
        run.until((folder / "config.json").is_file)
        newest = draw.choice((0, 0, 5, 10, 15, 20, 25, 30))  # the checkpoint to wait for before the random moment
        if newest:
            run.until(lambda: (folder / "checkpoints" / f"step-{newest:09d}").is_dir() or (folder / "done").exists())  # noqa: B023
        if writing:
            run.until(lambda: any(folder.glob("checkpoints/.part-*")) or (folder / "done").exists())  # noqa: B023
        else:
            time.sleep(draw.uniform(0, 0.05))
        run.send(signal.SIGKILL)
        if run.wait().code == 0 or (folder / "done").exists():  # it was faster than the kill: draw another moment
            assert ending(folder) == whole
            continue
        kills += 1
        inside += any(folder.glob("checkpoints/.part-*"))
        after += any(folder.glob("checkpoints/step-*"))
        done = etude("resume", folder)
        assert (done.code, done.err) == (0, "")
        assert ending(folder) == whole
        assert not list(folder.rglob(".part-*"))
        if kills >= 20 and inside >= 3 and after >= 8:
            break
    assert kills >= 20
    assert inside >= 3
    assert after >= 8


@pytest.mark.parametrize("first", [1, 8, 15])
def test_kill_at_each_write(etude, tmp_path, whole, first) -> None:
    for count in range(first, first + 7):
        folder = tmp_path / f"run-{count}"
        struck = etude("run", etude.piece, "--out", folder, *FLAGS, before=STRIKE.format(count=count))
        assert struck.code == -signal.SIGKILL
        if not (folder / "config.json").is_file():  # killed before there was a run
            assert count <= 2
            continue
        assert etude("resume", folder).code == 0
        assert ending(folder) == whole


def test_killed_again_and_again(etude, tmp_path, whole) -> None:
    folder = tmp_path / "run"
    words = ["run", etude.piece, "--out", folder, *FLAGS]
    for _ in range(20):
        code = etude(*words, before=STRIKE.format(count=31)).code
        words = ["resume", folder]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert ending(folder) == whole


def test_resuming_changes_when_the_seed_does(etude, tmp_path, whole) -> None:
    assert etude("run", etude.piece, "--out", tmp_path / "other", *FLAGS, "--seed", "1").code == 0
    other = ending(tmp_path / "other")
    assert other["metrics.jsonl"] != whole["metrics.jsonl"]
    assert other["tensors.safetensors"] != whole["tensors.safetensors"]


def test_broken_off_loop_is_over(etude, tmp_path) -> None:
    folder = tmp_path / "run"
    done = etude("run", etude.piece, "--out", folder, *FLAGS, "--fault", "stop", "--at", "23")
    assert done.code == 0
    whole = ending(folder)
    rows = [json.loads(line) for line in whole["metrics.jsonl"].decode().splitlines()]
    assert [row["step"] for row in rows] == [*range(25), 24]
    assert rows[-2]["stopped"] == 1.0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000020", "step-000000024"]
    for name in ("done", "result.json"):  # as if it had been killed at the very end
        (folder / name).unlink()
    assert etude("resume", folder).code == 0
    assert ending(folder) == whole
