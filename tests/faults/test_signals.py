"""Ctrl-C and SIGTERM save the state and exit 130 and 143; a second Ctrl-C stops at once; nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

FLAGS = ("--quiet", "--steps", "40")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("*"))


def same_ending(one: Path, other: Path) -> bool:
    last = "checkpoints/step-000000040/tensors.safetensors"
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("metrics.jsonl", "result.json", last)
    )


@pytest.fixture
def whole(etude, tmp_path) -> Path:
    assert etude("run", etude.piece, "--out", tmp_path / "whole", *FLAGS).code == 0
    return tmp_path / "whole"


@pytest.mark.parametrize("number", CODES)
def test_signal_in_a_step_saves_that_step(etude, tmp_path, whole, number) -> None:
    folder = tmp_path / "run"
    run = etude.start("run", etude.piece, "--out", folder, *FLAGS, "--fault", "wait", "--at", "17")
    run.ready()
    run.send(number)
    done = run.wait()
    assert done.code == CODES[number]
    assert done.err == f"stopped with the state of step 18 saved\nnext: etude resume {folder}\n"
    assert checkpoints(folder) == [18]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 19
    assert (folder / "report.html").is_file()
    assert not (folder / "done").exists()
    assert not (folder / "failed").exists()
    done = etude("resume", folder)
    assert (done.code, done.err) == (0, "")
    assert same_ending(folder, whole)
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert [(session["from_step"], session["to_step"]) for session in sessions] == [(0, 18), (18, 40)]


def test_one_run_is_written_by_one_process(etude, tmp_path, whole) -> None:
    """While a process writes a run, another one is refused and changes nothing; a dead one leaves no lock behind."""
    folder = tmp_path / "run"
    words = ("--quiet", "--save-every", "5", "--steps", "40", "--fault", "wait", "--at", "17")
    run = etude.start("run", etude.piece, "--out", folder, *words)
    run.ready()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    busy = f"the run in {folder} is still being written by another process; resume it when that one has ended"
    assert etude.refused("resume", folder, PIECE="go") == busy
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    run.send(signal.SIGKILL)
    assert run.wait().code == -signal.SIGKILL
    run = etude.start("resume", folder)
    run.ready()
    assert etude.refused("resume", folder, PIECE="go") == busy
    run.send(signal.SIGTERM)
    assert run.wait().code == 143
    assert etude("resume", folder, PIECE="go").code == 0
    assert same_ending(folder, whole)


@pytest.mark.parametrize(
    "before",
    [
        "import errno, fcntl\ndef flock(*_):\n    raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = flock",
        "import importlib, sys\nfrom etude.core import launch, record\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "importlib.reload(record), importlib.reload(launch)\nassert not launch.fcntl and not record.resource",
    ],
    ids=["file system", "system"],
)
def test_where_there_are_no_locks(etude, tmp_path, whole, before) -> None:
    folder = tmp_path / "run"
    assert etude("run", etude.piece, "--out", folder, *FLAGS, "--fault", "error", before=before).code == 1
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"fault": "error"', '"fault": "none"'))
    done = etude("resume", folder, before=before)
    assert (done.code, done.err) == (0, "")
    assert same_ending(folder, whole)


def test_second_ctrl_c_stops_at_once(etude, tmp_path, whole) -> None:
    folder = tmp_path / "run"
    run = etude.start(
        "run",
        etude.piece,
        "--out",
        folder,
        "--steps",
        "40",
        "--save-every",
        "5",
        "--fault",
        "wait",
        "--at",
        "17",
        PIECE="deaf",
    )
    run.ready()
    run.send(signal.SIGINT)
    run.until(lambda: "stopping after this step (once more stops at once)\n" in run.err.read_text())
    run.send(signal.SIGINT)
    done = run.wait()
    assert done.code == 130
    assert done.err.endswith("etude: stopped at once; the last checkpoint stands\n")
    assert checkpoints(folder) == [10, 15]
    assert etude("resume", folder, PIECE="go").code == 0
    assert same_ending(folder, whole)


@pytest.mark.parametrize("number", CODES)
def test_signal_in_the_final_evaluation(etude, tmp_path, whole, number) -> None:
    folder = tmp_path / "run"
    run = etude.start("run", etude.piece, "--out", folder, *FLAGS, "--fault", "wait_end")
    run.ready()
    run.send(number)
    done = run.wait()
    assert done.code == CODES[number]
    assert done.err == f"stopped with the state of step 40 saved\nnext: etude resume {folder}\n"
    assert not (folder / "done").exists()
    assert etude("resume", folder, PIECE="go").code == 0
    assert same_ending(folder, whole)


def test_signal_in_the_evaluation_after_a_break(etude, tmp_path) -> None:
    folder = tmp_path / "run"
    flags = (*FLAGS, "--fault", "stop", "--at", "17")
    assert etude("run", etude.piece, "--out", tmp_path / "calm", *flags).code == 0
    run = etude.start("run", etude.piece, "--out", folder, *flags, before=PAUSE_AFTER_LOOP)
    run.ready()
    run.send(signal.SIGINT)
    done = run.wait()
    assert (done.code, done.err.splitlines()[0]) == (130, "stopped with the state of step 18 saved")
    assert checkpoints(folder) == [18]
    assert etude("resume", folder).code == 0
    for name in ("metrics.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


PAUSE_AFTER_LOOP = """
import time
from etude.core.run import Run
artifact = Run.artifact
def slow(*arguments, **settings):
    print("waiting", flush=True)
    time.sleep(300)
Run.artifact = slow
"""


@pytest.mark.parametrize("number", CODES)
def test_signal_before_the_first_step(etude, tmp_path, whole, number) -> None:
    folder = tmp_path / "run"
    before = PAUSE_AFTER_LOOP.replace("artifact", "describe")
    run = etude.start("run", etude.piece, "--out", folder, *FLAGS, before=before)
    run.ready()
    run.send(number)
    done = run.wait()
    assert done.code == CODES[number]
    assert done.err == f"stopped before the first step\nnext: etude resume {folder}\n"
    assert not (folder / "checkpoints").exists()
    assert etude("resume", folder).code == 0
    assert same_ending(folder, whole)


def test_signal_while_the_last_checkpoint_is_written(etude, tmp_path, whole) -> None:
    folder = tmp_path / "run"
    before = """
import time
from etude.core import checkpoint
from etude.core.run import Run
write, receive, came = checkpoint._write_tensors, Run.receive, []
def noting(run, *arguments):
    receive(run, *arguments)
    came.append(arguments)
def waiting(*arguments):
    print("waiting", flush=True)
    while not came:
        time.sleep(0.002)
    write(*arguments)
checkpoint._write_tensors, Run.receive = waiting, noting
"""
    run = etude.start("run", etude.piece, "--out", folder, *FLAGS, before=before)
    run.ready()
    run.send(signal.SIGTERM)
    done = run.wait()
    assert (done.code, done.err.splitlines()[0]) == (143, "stopped with the state of step 40 saved")
    assert checkpoints(folder) == [40]
    assert etude("resume", folder).code == 0
    assert same_ending(folder, whole)
