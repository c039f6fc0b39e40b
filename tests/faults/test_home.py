"""At home in Python and in a notebook: names, types, short reprs, what a finished run offers, the bar and the report inline."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch

import etude
from etude import catalog
from etude.core import progress
from etude.core.errors import UserError
from etude.core.finished import Finished
from etude.core.loaded import Loaded, Sampled

PIECE = str(Path(__file__).with_name("piece.py"))


@pytest.fixture
def done(tmp_path, monkeypatch) -> Finished:
    monkeypatch.chdir(tmp_path)
    return etude.run(PIECE, steps=12, quiet=True, out="run")


def test_the_names_of_the_package() -> None:
    assert dir(etude) == ["__version__", "load", "methods", "resume", "run", "sample"]
    assert etude.methods() == [*catalog.entries()]
    assert etude.methods("vision") == [name for name in catalog.entries() if name.startswith("vision/")]
    with pytest.raises(UserError, match="there is no room 'visoin'; did you mean 'vision'"):
        etude.methods("visoin")
    with pytest.raises(AttributeError, match="has no attribute 'rum'"):
        etude.rum  # noqa: B018
    program = "import sys, etude; dir(etude); etude.methods(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(catalog.PACKAGE.parent)})


def test_everything_public_is_typed_and_documented() -> None:
    assert importlib.resources.files("etude").joinpath("py.typed").is_file()
    expected = {"run": Finished, "resume": Finished, "load": Loaded, "sample": Sampled, "methods": list[str]}
    for name, kind in expected.items():
        function = getattr(etude, name)
        assert inspect.getdoc(function)
        assert typing.get_type_hints(function)["return"] == kind


def test_what_a_finished_run_offers(done) -> None:
    assert repr(done).startswith("<finished run run: test_loss ")
    assert len(repr(done)) < 200
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert done.history == rows
    loaded = etude.load("run")
    for name, value in done.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    assert not done.model.training
    assert repr(loaded) == "<mine/piece at step 12: model (49 parameters); run>"
    assert done.load().step == 12
    with pytest.raises(UserError, match="learns no distribution"):
        done.sample()


def test_show_opens_the_report(done, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert done.show() == Path("run/report.html")
    assert opened == [Path("run/report.html").resolve().as_uri()]


class Cell:
    """What a notebook shows: each thing displayed, and each change of one."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, thing: object) -> None:
        self.shown.append(str(thing))

    def display(self, thing: object, display_id: bool = False) -> Cell | None:
        self.shown.append(str(thing))
        return self if display_id else None


@pytest.fixture
def cell(monkeypatch) -> Cell:
    made = Cell()
    package, inside = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.get_ipython = lambda: types.SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    inside.HTML, inside.display = str, made.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", inside)
    return made


def test_a_bar_in_a_notebook(cell, capfd, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("etude.core.progress.time.perf_counter", lambda: now[0])
    bar = progress.Progress("a<b")
    bar.start(0, 100)
    for step in range(1, 51):
        now[0] += 0.1
        if now[0] >= bar.due:
            bar.update(step, {"loss": 0.5, "seen": 640.0})
    bar.stop()
    assert 15 < len(cell.shown) < 30
    assert cell.shown[-2] == (
        '<code>a&lt;b</code> <progress value="48" max="100"></progress> <code>48/100  10/s  5s left  loss 0.5  seen 640</code>'
    )
    assert cell.shown[-1] == ""  # nothing is left when it has ended
    assert capfd.readouterr() == ("", "")


def test_the_report_is_shown_inline(done, cell) -> None:
    page = done._repr_html_()
    assert page.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert page.count("<") == 2  # all else is inside the frame
    done.show()
    assert cell.shown == [repr(done)]  # the notebook asks for _repr_html_
    (done.folder / "report.html").unlink()
    assert done._repr_html_().startswith("<pre>&lt;finished run")


def test_no_notebook_no_html(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace()))
    assert not progress.Progress("x").page  # a terminal's IPython


def test_an_honest_estimate(monkeypatch, capfd) -> None:
    """The first steps are slow; the estimate follows the pace of now, and whole numbers are whole."""
    now = [0.0]
    monkeypatch.setattr("etude.core.progress.time.perf_counter", lambda: now[0])
    bar = progress.Progress("x")
    bar.start(0, 1000)
    now[0] = 30.0  # compilation
    bar.update(1, {"seen": 8.0, "loss": 0.123456, "many": 1234567.0})
    for step in range(100, 600, 100):
        now[0] += 10.0
        bar.update(step, {})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].endswith("seen 8  loss 0.1235  many 1,234,567")
    assert lines[-1].startswith("step 500/1,000  10/s  50s left")  # and not 80s, as from the beginning


def test_a_run_is_found_by_what_was_said_and_by_nothing_else(tmp_path, monkeypatch) -> None:
    from etude.core.errors import UserError
    from etude.core.folder import find_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ETUDE_RUNS", raising=False)
    for name in ("rl/dqn/1", "rl/dqn/2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "config.json", (int(name[-1]), int(name[-1])))
    assert find_run("latest") == find_run("dqn") == find_run("rl/dqn") == Path("runs/rl/dqn/2")
    assert find_run("dqn", but=tmp_path / "runs/rl/dqn/2") == Path("runs/rl/dqn/1")
    for text in ("", ".", "..", str(tmp_path), "/", "../..", "runs"):
        with pytest.raises(UserError, match="is not a run folder|there is no run ''"):
            find_run(text)
