"""Numbers no computation can hold, memory that is not there, closed and narrow streams, half a torchrun, divergence."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.core import checkpoint
from etude.core.config import replace
from etude.core.errors import RunError, UserError, shortage
from etude.core.run import Common, Run


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--seed 9223372036854775808", "--seed is 9223372036854775808; a whole number must be smaller than 2^63"),
        ("--steps " + "9" * 60, "a whole number must be smaller than 2^63"),
        (
            "--learning-rate 1e300",
            "--learning-rate is 1e+300; a number other than 0 must lie between 1e-38 and 1e+38 in size",
        ),
        (
            "--weight-decay 1e-300",
            "--weight-decay is 1e-300; a number other than 0 must lie between 1e-38 and 1e+38 in size",
        ),
        ("--initial-bias -1e300", "in size, as single precision does"),
        ("--threads 513", "--threads is 513; it must be a whole number between 0 and 512"),
    ],
)
def test_numbers_that_nothing_could_hold(etude, words, part) -> None:
    assert part in etude.refused("run", "vision/lenet", *words.split())


def test_the_largest_seed_is_a_seed(etude) -> None:
    words = (
        "run",
        "vision/lenet",
        "--preset",
        "tiny",
        "--quiet",
        "--steps",
        "2",
        "--seed",
        str(2**63 - 1),
        "--out",
        "run",
    )
    assert etude(*words).code == 0


def test_memory_that_is_not_there_is_one_sentence_with_the_bytes(etude) -> None:
    done = etude("run", "vision/lenet", "--preset", "tiny", "--quiet", "--batch", str(10**14))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert (
        done.err == "etude: the settings ask for more memory than there is (800,444,465,020,928 bytes at once)\n"
        or (done.err.startswith("etude: the settings ask for more memory than there is ("))
    )


@pytest.mark.parametrize(
    ("ask", "part"),
    [
        (lambda: torch.empty(10**15), "(4,000,000,000,000,000 bytes at once)"),
        (lambda: np.empty((10**9, 10**9)), "(8,001,275,241,971,518,464 bytes at once)"),
        (lambda: torch.empty(2**62), "a size or a number beyond 2^63"),
        (lambda: np.zeros(10**30), "a size or a number beyond 2^63"),
        (lambda: [0] * 10**15, "(a size that was not said at once)"),
        (lambda: b"x" * 10**30, "a size or a number beyond 2^63"),
    ],
)
def test_every_library_says_it_in_its_own_way(ask, part) -> None:
    with pytest.raises((MemoryError, RuntimeError, ValueError, OverflowError)) as caught:
        ask()
    assert part in shortage(caught.value)
    assert shortage(ValueError("shapes differ")) == ""
    assert shortage(RuntimeError("mat1 and mat2 cannot be multiplied")) == ""


# ------------------------------------------------------------------------------------------------------------- streams


def command(etude, *words: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    shell = f"exec {shlex.quote(sys.executable)} -W error -m etude {' '.join(words)} {tail}"
    return subprocess.run(
        ["sh", "-c", shell],
        env={**etude.environment, **environment},
        cwd=etude.folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )


def test_closed_streams(etude) -> None:
    for tail in (">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"):
        done = command(etude, "list", tail=tail)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert ("vision/lenet" in done.stdout) == (">&- " not in f"{tail} ".replace("2>&- ", ""))
    done = command(etude, "run", etude.piece, "--steps", "3", "--out", "run", tail="<&- >&- 2>&-")
    assert done.returncode == 0
    rows = [json.loads(line) for line in (etude.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3  # no file of the run was taken for a stream
    assert command(etude, "nonsense", tail="2>&-").returncode == 2
    full = command(etude, "list", tail=">/dev/full")
    assert (full.returncode, full.stderr) == (1, "etude: No space left on device\n")
    broken = command(etude, "list", tail="| true")
    assert "Traceback" not in broken.stderr
    assert "Exception ignored" not in broken.stderr


def test_narrow_streams(etude, tmp_path) -> None:
    narrow = [("ascii", words) for words in (("info", "vision/lenet"), ("--help",), ("doctor",), ("list", "--notes"))]
    for encoding, words in (*narrow, ("latin-1", ("info", "vision/lenet")), ("cp1252", ("info", "vision/lenet"))):
        done = command(etude, *words, PYTHONIOENCODING=encoding)
        assert "Traceback" not in done.stderr
        assert done.stdout
    said = command(etude, "run", "vision/lenet", "--data", "Größe", PYTHONIOENCODING="ascii")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)


# --------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "0"}, "RANK is set in the environment and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment and RANK is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x of WORLD_SIZE=2 are no numbers"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 is no rank of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set in the environment and MASTER_ADDR is not"),
    ],
)
def test_half_of_torchrun(etude, environment, part) -> None:
    assert part in etude.refused("run", etude.piece, "--quiet", **environment)
    assert not (etude.folder / "runs").exists()


# ---------------------------------------------------------------------------------------------------------- divergence


def test_the_checkpoint_that_is_kept_is_finite(etude, tmp_path) -> None:
    """With a rate beyond reason the weights overflow in an update, before any loss says so."""
    words = (
        "--steps",
        "40",
        "--save-every",
        "1",
        "--quiet",
        "--optimizer",
        "sgd",
        "--learning-rate",
        "1e37",
        "--schedule",
        "constant",
    )
    done = etude("run", "vision/lenet", "--preset", "tiny", *words, "--out", "run")
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
        for name, value in load_file(path / "tensors.safetensors").items():
            assert not value.is_floating_point() or value.isfinite().all(), (path, name)


def test_a_state_that_is_not_finite_replaces_no_checkpoint(tmp_path) -> None:
    run = Run("mine/none", None, Common(quiet=True, save_every=1), tmp_path)
    run.record.open(0, "cpu")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    run.track(model=model, optimizer=optimizer)
    clock = run.steps(5)
    while next(clock) < 2:
        continue
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"model is not finite after step 2; the checkpoint of step 2 is kept"):
        next(clock)
    model.weight.data.zero_()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = float("nan")
    with pytest.raises(RunError, match="optimizer is not finite"):
        run.save()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [
        "step-000000001",
        "step-000000002",
    ]


def test_names_that_look_like_checkpoints(tmp_path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 3, {"x": 1})
    for name in ("step-²", "step-١", "step-", "step-" + "9" * 30):
        (folder / name).mkdir()
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-000000003"]
    assert checkpoint.load(folder)[0] == 3


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"method": ' * 5000,
        '{"method": 1e999}',
        "null",
        '"x"',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "spec.json", "result.json", "environment.json", "artifacts/index.json", "metrics.jsonl"]
)
def test_damaged_json_in_every_file(etude, tmp_path, name, text) -> None:
    assert etude("run", etude.piece, "--quiet", "--steps", "2", "--out", "run").code == 0
    (tmp_path / "run" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for words in (("show", "run", "--no-open"), ("runs",), ("resume", "run", "--steps", "3")):
        done = etude(*words)
        assert done.code in (0, 2), done.err
        assert "Traceback" not in done.err


def test_users_are_told_in_python_too() -> None:
    with pytest.raises(UserError, match="must be smaller than 2\\^63"):
        replace(Common(), {"seed": 2**63}, "test")
    assert Path(os.environ["ETUDE_CACHE"]).is_dir()
