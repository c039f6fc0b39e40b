"""Going on, comparing, repeating, exporting: resume --steps, runs, compare, --seeds, --json, export."""

from __future__ import annotations

import fcntl
import html.parser
import json
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import etude as package
from etude import catalog, data
from etude.core.errors import RunError, UserError
from etude.core.longer import LENGTHS, length

FLAGS = ("--quiet", "--save-every", "10")


def ending(folder: Path, step: int) -> list[bytes]:
    last = folder / "checkpoints" / f"step-{step:09d}"
    return [
        path.read_bytes() for path in (folder / "metrics.jsonl", folder / "result.json", last / "tensors.safetensors")
    ]


# ------------------------------------------------------------------------------------------------------------- longer


def test_a_run_that_is_trained_longer_is_the_longer_run(etude, tmp_path) -> None:
    """The piece uses its length for nothing else: 30 steps and 20 more are 50 steps, bit for bit."""
    assert etude("run", etude.piece, "--out", "long", "--steps", "50", *FLAGS).code == 0
    assert etude("run", etude.piece, "--out", "short", "--steps", "30", *FLAGS).code == 0
    done = etude("resume", "short", "--steps", "50")
    assert (done.code, done.err) == (0, "")
    assert ending(tmp_path / "short", 50) == ending(tmp_path / "long", 50)
    described = json.loads((tmp_path / "short" / "config.json").read_text())
    assert described["config"]["steps"] == 50
    assert described["command"].splitlines()[1] == "etude resume short --steps 50"
    assert etude("resume", "short").err == "short has already finished; nothing to continue\n"
    for words, part in (
        (("--steps", "50"), "was made for --steps 50; to train longer give more than that"),
        (("--steps", "20"), "to train longer give more than that"),
        (("--steps", "0"), "--steps is 0; it must be a whole number at least 1"),
        (("--episodes", "60"), "the length of a run of mine/piece is --steps, not --episodes"),
        (("--steps", "many"), "invalid int value: 'many'"),
    ):
        assert part in etude.refused("resume", "short", *words)
    assert (tmp_path / "short" / "done").exists()
    (tmp_path / "short" / "done").unlink()
    (tmp_path / "short" / "done").mkdir()
    assert "short/done cannot be removed" in etude.refused("resume", "short", "--steps", "60")


def test_what_follows_from_the_length_is_said(etude, tmp_path) -> None:
    words = ("run", "vision/lenet", "--preset", "tiny", "--quiet", "--steps", "6", "--out")
    assert etude(*words, "cycle").code == 0
    done = etude("resume", "cycle", "--steps", "9")
    assert done.code == 0
    assert done.err == (
        "note: up to here the length was 6; what follows from it (the schedule one_cycle) goes on as for 9, "
        "so this is not the run that had --steps 9 from the start\n"
    )
    assert etude(*words, "constant", "--schedule", "constant").code == 0
    assert etude("resume", "constant", "--steps", "9").err == ""


def test_a_run_that_ended_by_itself_and_one_that_failed(etude, tmp_path) -> None:
    assert etude("run", etude.piece, "--out", "ended", "--fault", "stop", "--at", "7", *FLAGS).code == 0
    assert "the run in ended ended by itself after step 8" in etude.refused("resume", "ended", "--steps", "90")
    done = etude("run", etude.piece, "--out", "broken", "--steps", "30", "--fault", "nan_result", *FLAGS)
    assert done.code == 1
    assert etude("resume", "broken", "--steps", "40").code == 1  # it goes on, and fails again at its end
    assert not (tmp_path / "broken" / "done").exists()


@pytest.mark.parametrize("name", catalog.entries())
def test_every_method_has_a_length_or_says_why_not(name) -> None:
    try:
        found = length(catalog.find(name))
    except UserError as error:
        found = str(error)
    assert found in LENGTHS or found.startswith(f"{name} has no length to extend: ")


def test_python_trains_longer_too(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = package.run(str(Path(__file__).with_name("piece.py")), steps=4, quiet=True, out="run")
    assert package.resume(run.folder, steps=6).metrics["seen"] == 6 * 8
    with pytest.raises(UserError, match="is --steps, not --stesp"):
        package.resume(run.folder, stesp=8)


# -------------------------------------------------------------------------------------------------------------- seeds


def test_seeds(etude, tmp_path) -> None:
    done = etude("run", etude.piece, "--quiet", "--steps", "6", "--seeds", "0-1,4", "--out", "runs", "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert [row["seed"] for row in told["runs"]] == [0, 1, 4]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["seed-0", "seed-1", "seed-4"]
    results = [json.loads((tmp_path / "runs" / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1, 4)]
    assert [row["metrics"] for row in told["runs"]] == results
    for name in results[0]:
        values = [result[name] for result in results]
        assert told["mean"][name] == pytest.approx(statistics.fmean(values))
        assert told["spread"][name] == pytest.approx(statistics.stdev(values))
    alone = etude("run", etude.piece, "--quiet", "--steps", "6", "--seed", "4", "--json", "--out", "alone")
    assert json.loads(alone.out)["metrics"] == results[2]  # each is the run that it would be alone
    shown = etude("run", etude.piece, "--quiet", "--steps", "2", "--seeds", "3", "--out", "three")
    assert re.search(r"seen +16 +0 +16 *\n", shown.out)
    for text in ("", "a", "1-", "4-2", "0-5000", "-1", "9223372036854775808", "²"):
        assert f"--seeds is '{text}'" in etude.refused("run", etude.piece, f"--seeds={text}")
    assert "names a seed twice" in etude.refused("run", etude.piece, "--seeds", "0-2,1")
    assert "--seed and --seeds are both given" in etude.refused("run", etude.piece, "--seeds", "0-2", "--seed=3")
    failing = etude("run", etude.piece, "--quiet", "--seeds", "0-1", "--fault", "nan_loss", "--out", "nan", "--json")
    assert failing.code == 1
    assert json.loads(failing.out)["failed"].keys() == {"0", "1"}


# ---------------------------------------------------------------------------------------------------- runs and compare


def test_runs_lists_what_is_there(etude, tmp_path) -> None:
    assert etude.refused("runs").startswith(f"there is no run under {tmp_path / 'runs'}/")
    assert json.loads(etude("runs", "--json").out) == []
    assert etude("run", "vision/lenet", "--preset", "tiny", "--quiet", "--steps", "3").code == 0
    assert etude("run", etude.piece, "--quiet", "--fault", "nan_loss", "--at", "3").code == 1
    assert etude("run", etude.piece, "--quiet", "--steps", "3").code == 0
    stopped = max((tmp_path / "runs" / "mine" / "piece").iterdir(), key=lambda path: path.stat().st_mtime)
    (stopped / "done").unlink()
    (tmp_path / "runs" / "odd" / "run" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "run" / "x" / "config.json").write_text("{")
    rows = {Path(row["run"]): row for row in json.loads(etude("runs", "--json").out)}
    assert sorted(row["state"] for row in rows.values()) == ["damaged", "done", "failed", "unfinished"]
    (done,) = (row for row in rows.values() if row["state"] == "done")
    assert done["method"] == "vision/lenet"
    assert (done["preset"], done["seed"], done["step"]) == ("tiny", 0, 3)
    result = json.loads((Path(done["run"]) / "result.json").read_text())
    assert done["headline"] == {"test_accuracy": result["test_accuracy"]}
    shown = etude("runs")
    assert shown.code == 0
    assert all(str(run) in shown.out for run in rows)
    assert [row["method"] for row in json.loads(etude("runs", "lenet", "--json").out)] == ["vision/lenet"]
    handle = os.open(stopped, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        states = {Path(row["run"]): row["state"] for row in json.loads(etude("runs", "--json").out)}
    finally:
        os.close(handle)
    assert states[stopped] == "running"


class Page(html.parser.HTMLParser):
    """Every tag of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "data") and not (value or "").startswith("#")
        ]


def test_compare_lays_runs_over_each_other(etude, tmp_path) -> None:
    for rate in ("0.001", "0.01"):
        words = ("--preset", "tiny", "--quiet", "--steps", "12", "--learning-rate", rate, "--out", rate)
        assert etude("run", "vision/lenet", *words).code == 0
    done = etude("compare", "0.001", "0.01")
    assert (done.code, done.out, done.err) == (0, "compare.html\n", "")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert Page(text).loads == []
    assert "Content-Security-Policy" in text
    for label in ("learning rate 0.001", "learning rate 0.01"):
        assert f"<b>{label}</b>" in text  # the key of a curve
    assert text.count('class="line s0"') == text.count('class="line s1"') > 0
    settings = text[text.index('id="settings"') : text.index('id="runs"')]
    assert settings.count("<tr>") == 2  # the head and the one setting
    assert "learning rate" in settings
    assert etude("compare", "0.001", "0.01", "--out", "pages.html").out == "pages.html\n"
    assert "2 to 8 runs, and 1 were named" in etude.refused("compare", "0.001")
    assert "there is no run 'nowhere'" in etude.refused("compare", "0.001", "nowhere")
    assert "a run is named twice" in etude.refused("compare", "0.001", "./0.001")
    (tmp_path / "mine.html").write_text("my words")
    assert "mine.html is there and is no page" in etude.refused("compare", "0.001", "0.01", "--out", "mine.html")
    assert (tmp_path / "mine.html").read_text() == "my words"
    assert "cannot be written" in etude.refused("compare", "0.001", "0.01", "--out", "/proc/etude/x.html")
    assert etude("run", etude.piece, "--quiet", "--seeds", "0-1", "--steps", "3", "--out", "seeds").code == 0
    assert etude("compare", "seeds/seed-0", "seeds/seed-1").code == 0
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert '<th class="n">mean</th>' in text
    shutil.rmtree(tmp_path / "seeds" / "seed-1" / "artifacts")
    (tmp_path / "seeds" / "seed-1" / "metrics.jsonl").write_text("no\n[]\n")
    assert etude("compare", "seeds/seed-0", "seeds/seed-1", "0.01").code == 0


# ------------------------------------------------------------------------------------------------------------- export


@pytest.fixture
def trained(tmp_path) -> Path:
    return package.run("vision/lenet", preset="tiny", steps=5, quiet=True, out=tmp_path / "run").folder


def test_export_writes_what_answers_alike(etude, tmp_path, trained) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = etude("export", trained, "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["files"] == ["model.json", "model.onnx", "model.pt2"]
    assert all(value < 1e-4 for value in told["difference"].values())
    x = data.images("digits", 28).test.x[:7].float() / 255
    expected = [list(row["probabilities"].values()) for row in package.load(trained).predict(x)]
    program = torch.export.load(trained / "export" / "model.pt2").module()
    assert torch.allclose(program(x), torch.tensor(expected), atol=1e-5)
    session = onnxruntime.InferenceSession(str(trained / "export" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["probabilities"], {"pixels": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), torch.tensor(expected), atol=1e-5)
    about = json.loads((trained / "export" / "model.json").read_text())
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["input"]["shape"] == ["batch", 1, 28, 28]


def test_export_refuses_what_it_cannot_take(etude, trained, monkeypatch) -> None:
    from etude.core import export

    assert etude("run", etude.piece, "--quiet", "--steps", "2", "--out", "piece").code == 0
    assert "mine/piece is no classifier of images" in etude.refused("export", "piece")
    missing = "from etude import catalog; catalog.extra_installed = lambda extra: False"
    assert "ONNX needs packages that are not installed; run: pip install" in etude.refused(
        "export", trained, before=missing
    )
    if catalog.extra_installed("export"):
        monkeypatch.setattr(export, "_by_onnx", lambda path, x: torch.zeros(len(x), 10))
        with pytest.raises(RunError, match=r"model\.onnx answers differently from the network"):
            export.export(package.load(trained))
