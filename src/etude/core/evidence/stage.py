"""Where evidence runs a method: each run in a process of its own, so its seconds and its peak memory are its own.

`perform` starts ``python -m etude.core.evidence`` with a `Part` as JSON and reads what the run left. A part may
replace functions of the method's file by others (a control's fault) and may end after the first steps (a trace).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etude import catalog
from etude.core.errors import RunError, UserError


@dataclass(frozen=True)
class Part:
    """One run: a method, its preset and settings, a seed; `swap` and `first` as in `swapped` and `only`."""

    name: str
    preset: str
    seed: int = 0
    flags: dict[str, Any] = field(default_factory=dict)
    swap: dict[str, str] = field(default_factory=dict)
    first: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run left. `failure` is empty, or the sentence with which it ended; then there are no metrics."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    memory_mb: float = 0.0
    failure: str = ""
    refused: bool = False
    """It did not run as it should: its settings were refused, or it crashed. A divergence, said in a sentence, is none."""


def perform(part: Part, folder: Path | None = None) -> Outcome:
    """Run the part in a new process, in `folder` or in one that is deleted behind it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = folder or Path(scratch) / "run"
        words = [sys.executable, "-m", "etude.core.evidence", json.dumps(asdict(part)), str(out)]
        finished = subprocess.run(words, check=False, capture_output=True, text=True)
        if finished.returncode:
            said = (finished.stderr.strip().splitlines() or ["it ended without a word"])[-1][-300:]
            return Outcome(rows=_rows(out), failure=said, refused=finished.returncode != 1)
        sessions = json.loads((out / "environment.json").read_text(encoding="utf-8"))["sessions"]
        return Outcome(
            json.loads((out / "result.json").read_text(encoding="utf-8")),
            _rows(out),
            round(sum(map(_spent, sessions)), 2),
            max(session["peak_memory_mb"] for session in sessions),
        )


def _spent(session: dict[str, Any]) -> float:
    """Seconds between a session's first and last step; of a CPU that others used too, what it was busy for here."""
    wall = session["loop_seconds"]
    if session.get("device") != "cpu" or "loop_cpu_seconds" not in session:
        return wall
    return min(wall, session["loop_cpu_seconds"] / max(1, session["threads"]))


def _rows(folder: Path) -> list[dict[str, float]]:
    from etude.core.record import read_metrics

    return read_metrics(folder)


@contextlib.contextmanager
def swapped(entry: catalog.Entry, swap: dict[str, str]) -> Iterator[None]:
    """While it lasts, names in the method's file stand for other functions, given by dotted paths."""
    module = catalog.load_method(entry)
    before = {}
    for name, path in swap.items():
        if not hasattr(module, name):
            raise UserError(f"{entry.path.name} has no '{name}' that a control could replace")
        home, _, other = path.rpartition(".")
        before[name] = getattr(module, name)
        setattr(module, name, getattr(importlib.import_module(home), other))
    try:
        yield
    finally:
        for name, thing in before.items():
            setattr(module, name, thing)


@contextlib.contextmanager
def only(first: int) -> Iterator[None]:
    """While it lasts, every run's clock stops after `first` steps, as if they were all (0: it does not)."""
    from etude.core.run import Run

    steps = Run.steps
    if first:
        Run.steps = lambda self, total: steps(self, min(total, first))  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.steps = steps  # type: ignore[method-assign]


def main(words: list[str]) -> int:
    """Run the part that `words` describes in the folder they name; 0, 1 or 2 as `etude run` would end, 3 for a crash."""
    from etude.core import launch

    part, out = Part(**json.loads(words[0])), Path(words[1])
    try:
        with swapped(catalog.find(part.name), part.swap), only(part.first):
            launch.run(part.name, preset=part.preset, out=out, seed=part.seed, quiet=True, **part.flags)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    return 0
