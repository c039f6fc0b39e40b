"""The runs that are there: each with its state and its headline, read from the folders alone (no torch, no code)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, TypedDict

from etude import catalog
from etude.core import folder as folders
from etude.core.errors import UserError
from etude.core.own import is_own

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


class Row(TypedDict):
    """One run as `etude runs --json` lists it."""

    run: str
    method: str
    preset: str
    seed: int | None
    state: str
    """done, failed, running, unfinished, or damaged."""
    step: int
    headline: dict[str, float]
    """The metric that counts most for the method, and its value; empty before there is one."""
    started: str
    seconds: float


def rows(root: Path) -> list[Row]:
    """Every run below `root`, oldest first. A folder that cannot be read is listed as damaged."""
    return [_row(folder) for folder in folders.list_runs(root)]


def state_of(folder: Path) -> str:
    """done, failed, running (a process holds the folder) or unfinished."""
    if (folder / "failed").is_file():
        return "failed"
    if (folder / "done").is_file():
        return "done"
    return "running" if _held(folder) else "unfinished"


def headline(method: str, metrics: dict[str, float]) -> dict[str, float]:
    """The one metric that says most: that of the method's first experiment, else the first returned."""
    wanted: list[str] = []
    if not is_own(method):
        with contextlib.suppress(UserError):
            wanted = [str(row["metric"]) for row in catalog.find(method).experiments]
    name = next((name for name in (*wanted, *metrics) if name in metrics), None)
    return {} if name is None else {name: metrics[name]}


def _row(folder: Path) -> Row:
    row = Row(
        run=str(folder), method="", preset="", seed=None, state="damaged", step=0, headline={}, started="", seconds=0.0
    )
    try:
        folders.guard(folder)
        described = folders.read_config(folder)
        row["method"], row["preset"] = described["method"], described["preset"]
        seed = described["common"].get("seed")
        row["seed"] = seed if isinstance(seed, int) else None
        row["state"] = state_of(folder)
        metrics = folders.read_result(folder) if row["state"] == "done" else {}
        row["headline"] = headline(row["method"], metrics)
    except UserError:
        return row
    with contextlib.suppress(OSError, ValueError, UserError):
        environment = folders.read_json(folder / "environment.json")
        sessions = environment.get("sessions", []) if isinstance(environment, dict) else []
        for session in sessions if isinstance(sessions, list) else []:
            if isinstance(session, dict):
                row["step"] = max(row["step"], int(_number(session.get("to_step"))))
                row["seconds"] += _number(session.get("seconds"))
        row["started"] = str(environment.get("started") or "")
    return row


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else 0.0


def _held(folder: Path) -> bool:
    """Whether a process writes this folder (it holds the kernel's lock on it)."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
