"""What a report is made from: the record in the run folder, and what the catalogue knows of the method.

Every file may be missing or damaged, and a value in it of any type: `Record` notes the files that could not be read,
and `as_dict`, `as_list`, `as_float` and `is_number` make something usable of whatever JSON held.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Contract:
    """What the catalogue knows of a method; the report quotes it beside the run. Every field may be left empty."""

    title: str = ""
    """One-line claim."""
    paper: str = ""
    """Reference; an ``arXiv:`` identifier in it becomes a link."""
    section: str = ""
    """Section of the course notes."""
    equation: str = ""
    algorithm: str = ""
    differences: str = ""
    expect: str = ""
    docs: str = ""
    """Any further text of the docstring."""
    fields: tuple[tuple[str, str], ...] = ()
    """(name, help) of every configuration field."""
    bars: tuple[dict[str, Any], ...] = ()
    """Bars to hold results against: ``metric``, ``bar``, ``better`` ("higher" or "lower"), ``published`` (text), and
    where known ``name``, ``preset`` and ``flags`` (the settings the bar was set for)."""
    metrics: dict[str, str] = field(default_factory=dict)
    """What the method's own numbers mean, by name (`etude.core.meanings`)."""
    card: dict[str, Any] | None = None
    """The evidence card that ``etude verify`` wrote, if any."""
    samples: bool = True
    """Whether ``etude sample`` works for this method."""


CLOCKS = {"env_steps": ("environment steps", "steps"), "episodes": ("episodes", "episodes")}
"""Logged numbers that are the clock of a run, by which its user set how long it lasts: what they count, that setting."""
HUGE = 1e300  # a number beyond this is shown as one that is not finite: no axis could hold it


class Series(NamedTuple):
    """One logged number over steps; both arrays are float64 of the same length, steps increasing."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    clock: str = ""
    """Which logged number `steps` are (one of CLOCKS); empty: the steps of the loop."""

    @property
    def finite(self) -> Series:
        kept = np.abs(self.values) < HUGE
        return self if kept.all() else self._replace(steps=self.steps[kept], values=self.values[kept])


class Record:
    """Everything the run folder says, with a note of each file that could not be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []
        described = self._json("config.json", {})
        self.method = str(described.get("method") or folder.name)
        self.described = described
        self.config: dict[str, Any] = as_dict(described.get("config"))
        self.default_config: dict[str, Any] | None = as_dict(described.get("default_config")) or None
        self.environment = self._json("environment.json", {})
        self.sessions = [s for s in as_list(self.environment.get("sessions")) if isinstance(s, dict)]
        self.result = {str(k): v for k, v in self._json("result.json", {}).items() if is_number(v)}
        self.spec = self._json("spec.json", {})
        self.about = as_dict(self._json("about.json", {}))
        self.artifacts = [a for a in self._json("artifacts/index.json", []) if isinstance(a, dict) and "file" in a]
        self.series, damaged = read_metrics(folder / "metrics.jsonl")
        if damaged:
            self.unreadable.append(f"metrics.jsonl ({damaged} damaged {'line' if damaged == 1 else 'lines'} skipped)")
        self.failure = self._text("failed")
        self.done = (folder / "done").exists() and self.failure is None
        logged = max((float(s.steps[-1]) for s in self.series), default=0.0)
        reached = max((as_float(s.get("to_step")) for s in self.sessions), default=0.0)
        self.clock = next((s.clock for s in self.series), "")
        self.last_step = int(logged if self.clock else max(logged, reached))

    @property
    def counted(self) -> str:
        """What the axis of the curves counts."""
        return CLOCKS[self.clock][0] if self.clock else "steps"

    @property
    def status(self) -> str:
        """done, failed, running (its session has not yet reported) or unfinished (still running, or stopped: the
        session's last sign of life, ``ended``, does not tell)."""
        if self.failure is not None:
            return "failed"
        if self.done:
            return "done"
        return "unfinished" if self.sessions and self.sessions[-1].get("ended") else "running"

    def seconds(self, kind: str = "seconds") -> float:
        """Seconds of all sessions together; ``loop_seconds`` counts only from the first step to the last."""
        return sum(as_float(s.get(kind)) for s in self.sessions)

    def artifact_file(self, artifact: dict[str, Any]) -> Path | None:
        """The artifact's file, if it exists and lies inside the artifacts folder."""
        base = (self.folder / "artifacts").resolve()
        try:
            path = (base / str(artifact["file"])).resolve()
            return path if path.is_relative_to(base) and path.is_file() else None
        except (OSError, ValueError):  # a name the file system does not take
            return None

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def _json(self, name: str, empty: Any) -> Any:
        text = self._text(name)
        if text is None:
            return empty
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # damaged, or nested beyond all reason
            value = None
        if not isinstance(value, type(empty)):
            self.unreadable.append(name)
            return empty
        return value


def read_metrics(path: Path) -> tuple[list[Series], int]:
    """Read ``metrics.jsonl`` into one series per metric, in order of first appearance; also count the damaged lines.

    Where the first row holds one of CLOCKS, that number stands in place of the step in all of them (a row without it
    keeps the last one). A step that occurs twice (a run resumed from an earlier checkpoint) keeps its last value.
    ``null`` reads as NaN. An unfinished last line, which a running job leaves, is not damage.
    """
    columns: dict[str, tuple[array[float], array[float]]] = {}
    damaged, clock, reached = 0, None, 0.0
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0
    with stream:
        while chunk := stream.readlines(1 << 20):
            try:  # one call for the whole chunk is twice as fast as one call a line
                rows = json.loads("[" + ",".join(chunk) + "]")
            except (ValueError, RecursionError):
                rows = []
                for line in chunk:
                    try:
                        rows.append(json.loads(line))
                    except (ValueError, RecursionError):
                        damaged += bool(line.strip()) and line.endswith("\n")
            for row in rows:
                step: Any = row.get("step") if isinstance(row, dict) else None
                if not is_number(step) or not math.isfinite(step):
                    damaged += 1
                    continue
                if clock is None:
                    clock = next((name for name in CLOCKS if name in row), "")
                if clock:
                    told: Any = row.get(clock)
                    reached = step = told if is_number(told) and math.isfinite(told) else reached
                for name, value in row.items():
                    if name in ("step", clock):
                        continue
                    if value is None:
                        value = math.nan
                    elif not is_number(value):
                        continue
                    if name not in columns:
                        columns[name] = (array("d"), array("d"))
                    steps, values = columns[name]
                    steps.append(float(step))
                    values.append(float(value))
    in_order = {name: _in_order(np.array(s), np.array(v)) for name, (s, v) in columns.items()}
    return [Series(name, *points, clock or "") for name, points in in_order.items()], damaged


def _in_order(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return steps, values


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A finite number as it is, anything else as 0."""
    return float(value) if is_number(value) and math.isfinite(value) else 0.0


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b
