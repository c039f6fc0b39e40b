"""Experiments and their controls: a bar counts only where every seed clears it and every control fails it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etude.catalog import Entry
from etude.core.claims import Control, Experiment
from etude.core.config import flag
from etude.core.evidence.stage import Outcome, Part, perform

Perform = Callable[[Part, Path | None], Outcome]


class Stage:
    """Runs each part once, however many experiments and controls read from it, and says what it sees.

    `keep` is where the run folders stay; without it they are deleted.
    """

    def __init__(self, keep: Path | None, say: Callable[[str], None], perform: Perform = perform) -> None:
        self._keep, self._say, self._perform = keep, say, perform
        self._known: dict[str, Outcome] = {}

    def run(self, part: Part) -> Outcome:
        """What this part left; run now or before."""
        key = repr(part)
        if key not in self._known:
            folder = None if self._keep is None else self._keep / f"{part.name.replace('/', '-')}-{len(self._known)}"
            self._known[key] = outcome = self._perform(part, folder)
            if outcome.failure:
                self._say(f"{spoken(part)}: {outcome.failure}")
        return self._known[key]


def try_experiment(
    entry: Entry, experiment: Experiment, stage: Stage, say: Callable[[str], None], seeds: int | None = None
):
    """Run one experiment and its controls on the (first) seeds; the row of the card."""
    chosen = experiment.seeds[:seeds]
    outcomes = [stage.run(part(entry, experiment, seed)) for seed in chosen]
    values = [outcome.metrics.get(experiment.metric) for outcome in outcomes]
    done = [outcome for outcome in outcomes if not outcome.failure]
    seconds = [outcome.seconds for outcome in done]
    for seed, value in zip(chosen, values):
        said = "failed" if value is None else f"{value:.5g}"
        say(f"{entry.name} {experiment.name} seed {seed}: {experiment.metric} {said}")
    controls = [try_control(entry, experiment, control, chosen, stage, say) for control in experiment.controls]
    measured = [value for value in values if value is not None]
    slow = experiment.within_seconds is not None and any(second > experiment.within_seconds for second in seconds)
    return {
        "name": experiment.name,
        "command": spoken(part(entry, experiment)),
        "metric": experiment.metric,
        "bar": experiment.bar,
        "better": experiment.better,
        "tolerance": experiment.tolerance,
        "published": experiment.published,
        "notes": experiment.notes,
        "seeds": list(chosen),
        "values": values,
        "mean": statistics.fmean(measured) if measured else None,
        "spread": statistics.stdev(measured) if len(measured) > 1 else 0.0,
        "seconds": seconds,
        "within_seconds": experiment.within_seconds,
        "peak_memory_mb": [outcome.memory_mb for outcome in done],
        "controls": controls,
    } | judged(experiment, values, controls, slow)


def try_control(
    entry: Entry,
    experiment: Experiment,
    control: Control,
    seeds: tuple[int, ...],
    stage: Stage,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run one control on these seeds; what the card keeps of it."""
    outcomes = [stage.run(part(entry, experiment, seed, control)) for seed in seeds]
    metric = control.metric or experiment.metric
    values = [outcome.metrics.get(metric) for outcome in outcomes]
    said = ", ".join("failed" if value is None else f"{value:.5g}" for value in values)
    say(f"{entry.name} {experiment.name}, control '{control.name}': {metric} {said}")
    refused = next((outcome.failure for outcome in outcomes if outcome.refused), "")
    missing = next(
        (f"the run returns no {metric}" for o, v in zip(outcomes, values) if v is None and not o.failure), ""
    )
    return {
        "name": control.name,
        "command": spoken(part(entry, experiment, control=control)),
        "metric": metric,
        "swap": control.swap,
        "values": values,
        "broken": refused or missing,
    }


def judged(
    experiment: Experiment, values: list[float | None], controls: list[dict[str, Any]], slow: bool
) -> dict[str, Any]:
    """Whether the bar stands: every seed clears it in time, and against every control it held on every seed.

    A control that ended in a failure (None) failed the bar; one that was refused or crashed proves nothing.
    """
    for row in controls:
        beaten = any(value is not None and experiment.clears(value) for value in row["values"])
        row["held"] = not beaten and not row["broken"]
    cleared = bool(values) and all(value is not None and experiment.clears(value) for value in values)
    return {
        "cleared": cleared and not slow,
        "passed": cleared and not slow and bool(controls) and all(row["held"] for row in controls),
    }


def part(entry: Entry, experiment: Experiment, seed: int = 0, control: Control | None = None, first: int = 0) -> Part:
    """The run that an experiment, or its control, asks for."""
    if control is None:
        return Part(entry.name, experiment.preset, seed, experiment.flags, {}, first)
    flags = experiment.flags | control.flags
    return Part(entry.name, control.preset or experiment.preset, seed, flags, control.swap, first)


def spoken(part: Part) -> str:
    """The command line that does the same, without seed and folder."""
    words = ["etude", "run", part.name, "--preset", part.preset]
    for name, value in part.flags.items():
        if isinstance(value, bool):
            words.append(flag(name if value else "no_" + name))
        else:
            words += [flag(name), *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return shlex.join(words)
