"""Traces: what the first steps of an experiment log and return, kept on its card.

A change of the code that should change no number (a refactor, a picture, a comment in another file) is shown to be one by
running the traces again. A short experiment is traced whole; of a long one the clock stops after `FIRST` steps as if these
were all, so that evaluation and reported numbers are in its trace too.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from etude.catalog import Entry
from etude.core.claims import Experiment
from etude.core.evidence.stage import Outcome
from etude.core.evidence.trials import Stage, part

FIRST = 8
"""Steps in the trace of a long experiment."""
SHORT = 8.0
"""Seconds up to which an experiment's loop is traced whole."""
CLOSE = 1e-5
"""Relative difference that another processor or another version of torch may make in a few steps."""
KEPT = 12
"""Rows of the log on the card; the rest is in the digest."""


def record(entry: Entry, experiments: list[Experiment], stage: Stage) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The name of each experiment's trace, and the traces by name; experiments that share a run share its trace.

    A whole trace has a `start` too, the trace of its first steps: float32 training goes apart within some hundred steps
    where another processor rounds in another order, so elsewhere only the start can be compared.
    """
    names, traces = [], {}
    for experiment in experiments:
        whole = stage.run(part(entry, experiment, experiment.seeds[0]))
        made: dict[str, Any] = _made(entry, experiment, FIRST, stage)
        if whole.seconds <= SHORT and not whole.failure:
            made = trace(whole, 0) | {"start": made}
        names.append(made["sha256"][:12])
        traces[names[-1]] = made
    return names, traces


def again(
    entry: Entry, experiment: Experiment, before: Any, stage: Stage, elsewhere: bool = False
) -> tuple[str, dict[str, Any]]:
    """Run the trace of an experiment once more: in what it differs from the one before ("": in nothing), and itself.

    elsewhere: the card was made on another kind of processor; then a whole trace that differs still agrees if its start
    does, and stays the one that is kept.
    """
    if not isinstance(before, dict):
        return "it has no trace", {}
    made = _made(entry, experiment, int(before["first"]), stage)
    start = before.get("start")
    if start:
        made["start"] = start
    found = difference(before, made)
    if found and elsewhere:
        if start and not difference(start, _made(entry, experiment, FIRST, stage)):
            return "", before
        found += " (the card was made on another processor)"
    return found, made


def _made(entry: Entry, experiment: Experiment, first: int, stage: Stage) -> dict[str, Any]:
    return trace(stage.run(part(entry, experiment, experiment.seeds[0], first=first)), first)


def trace(outcome: Outcome, first: int) -> dict[str, Any]:
    """What is kept of a run: the first rows of its log, the last, what it returned, and a digest of all of it."""
    rows = outcome.rows
    whole = json.dumps([rows, outcome.metrics, outcome.failure], sort_keys=True)
    return {
        "first": first,
        "rows": rows[:KEPT] + rows[KEPT:][-1:],
        "count": len(rows),
        "returned": outcome.metrics,
        "failure": outcome.failure,
        "sha256": hashlib.sha256(whole.encode()).hexdigest(),
    }


def difference(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Where two traces first differ by more than rounding, or nothing."""
    if one["sha256"] == two["sha256"]:
        return ""
    if one["count"] != two["count"]:
        return f"{two['count']} rows are logged, it was {one['count']}"
    if bool(one["failure"]) != bool(two["failure"]):
        return f"the run ends with: {two['failure'] or 'success'}"
    for before, after in zip([*one["rows"], one["returned"]], [*two["rows"], two["returned"]]):
        if before.keys() != after.keys():
            return f"the names differ: {', '.join(sorted(before.keys() ^ after.keys()))}"
        for name, value in before.items():
            if not math.isclose(value, after[name], rel_tol=CLOSE, abs_tol=1e-9):
                place = f" at step {before['step']:g}" if "step" in before else ""
                return f"{name}{place} is {after[name]:.8g}, it was {value:.8g}"
    return ""
