"""Evidence, not claims: `etude verify` writes the cards, `etude bench` runs the races; nobody types a score."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from etude import catalog
from etude.catalog import Entry, Experiment
from etude.core import record
from etude.core.checkpoint import write_text
from etude.core.config import flag
from etude.core.errors import RunError, UserError


def verify(entry: Entry, seeds: int | None = None, only: str | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Run the oracle tests and every experiment of a method, and return its card.

    The card is written to `results/<name>.json` when nothing was left out (all experiments, all seeds). Each seed
    runs in a process of its own, so seconds and peak memory are its own. Raises UserError for an unknown experiment.
    """
    experiments = [Experiment.of(values) for values in entry.experiments]
    chosen = [e for e in experiments if only is None or e.name == only]
    if not chosen:
        raise UserError(f"{entry.name} has no experiment '{only}' (it has {', '.join(e.name for e in experiments)})")
    oracle = _oracle(entry)
    _say(f"{entry.name}: oracle {oracle['tests']} tests {'passed' if oracle['passed'] else 'FAILED'}")
    known: dict[tuple[Any, ...], Outcome | None] = {}  # two bars on one run need one run
    rows = [_experiment(entry, experiment, seeds, keep, known) for experiment in chosen]
    broken = not oracle["passed"] or any(value is None for row in rows for value in row["values"])
    passed = all(row["passed"] for row in rows) and oracle["tests"] > 0
    card = {
        "name": entry.name,
        "title": entry.title,
        "badge": "broken" if broken else "verified" if passed else "runs",
        "written": record._now(),
        "commit": record.commit(),
        "oracle": oracle,
        "experiments": rows,
        "hardware": record.hardware(),
        "versions": record.versions(),
    }
    if only is None and seeds is None:
        path = catalog.results_folder() / f"{entry.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(card, indent=1) + "\n")
        _say(f"card: {path}")
    return card


def bench(pattern: str | None, run: bool = True) -> list[dict[str, Any]]:
    """Run `benchmarks/<room>.py` of the matching rooms one after the other and return their recorded rows."""
    root = catalog.checkout_folder()
    if run and root is None:
        raise UserError("benchmarks run from a source checkout; 'etude bench --recorded' shows the recorded ratios")
    folder = catalog.results_folder() / "bench"
    scripts = sorted((root / "benchmarks").glob("*.py")) if root else []
    rooms = (
        [path.stem for path in scripts if path.stem != "race"]
        if run
        else [path.stem for path in sorted(folder.glob("*.json"))]
    )
    chosen = [room for room in rooms if pattern is None or pattern.partition("/")[0] == room]
    if not chosen:
        raise UserError(f"there is no benchmark for '{pattern}' (there are {', '.join(rooms) or 'none'})")
    rows = []
    for room in chosen:
        if run:
            assert root is not None
            finished = subprocess.run(
                [sys.executable, str(root / "benchmarks" / f"{room}.py")], check=False, stdout=sys.stderr
            )
            if finished.returncode:
                raise RunError(
                    f"benchmarks/{room}.py failed (exit code {finished.returncode}); its message stands above"
                )
        rows += json.loads((folder / f"{room}.json").read_text(encoding="utf-8"))
    return rows


class Outcome(NamedTuple):
    """What one finished run left: its metrics, seconds between first and last step, peak memory."""

    metrics: dict[str, float]
    seconds: float
    memory_mb: float


def _experiment(
    entry: Entry,
    experiment: Experiment,
    seeds: int | None,
    keep: Path | None,
    known: dict[tuple[Any, ...], Outcome | None],
) -> dict[str, Any]:
    chosen = experiment.seeds[:seeds]
    values: list[float | None] = []
    seconds, memory = [], []
    command = ["etude", "run", entry.name, "--preset", experiment.preset, *_words(experiment.flags)]
    for seed in chosen:
        key = (*command, seed)
        if key not in known:
            known[key] = _run(entry, f"{experiment.name}-{seed}", [*command, "--seed", str(seed)], keep)
        outcome = known[key]
        if outcome is None:
            values.append(None)
            continue
        values.append(outcome.metrics[experiment.metric])
        seconds.append(outcome.seconds)
        memory.append(outcome.memory_mb)
        limit = f" of {experiment.within_seconds:g}" if experiment.within_seconds else ""
        _say(
            f"{entry.name} {experiment.name} seed {seed}: {experiment.metric} {values[-1]:.5g}  ({seconds[-1]:.1f}{limit} s)"
        )
    measured = [value for value in values if value is not None]
    in_time = experiment.within_seconds is None or all(second <= experiment.within_seconds for second in seconds)
    return {
        "name": experiment.name,
        "command": shlex.join(command),
        "metric": experiment.metric,
        "bar": experiment.bar,
        "better": experiment.better,
        "published": experiment.published,
        "notes": experiment.notes,
        "seeds": list(chosen),
        "values": values,
        "mean": statistics.fmean(measured) if measured else None,
        "spread": statistics.stdev(measured) if len(measured) > 1 else 0.0,
        "seconds": seconds,
        "within_seconds": experiment.within_seconds,
        "peak_memory_mb": memory,
        "passed": len(measured) == len(chosen) and all(map(experiment.clears, measured)) and in_time,
    }


def _run(entry: Entry, label: str, command: list[str], keep: Path | None) -> Outcome | None:
    """Run one command in a process of its own; None, with the reason said, when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (keep or Path(scratch)) / f"{entry.name.replace('/', '-')}-{label.replace(' ', '-')}"
        words = [sys.executable, "-m", *command, "--out", str(folder), "--quiet"]
        finished = subprocess.run(words, check=False, capture_output=True, text=True)
        if finished.returncode:
            _say(f"{shlex.join(command)}: failed: {finished.stderr.strip()[-300:]}")
            return None
        metrics = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        sessions = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sessions"]
        seconds = round(sum(session["loop_seconds"] for session in sessions), 2)
        return Outcome(metrics, seconds, max(session["peak_memory_mb"] for session in sessions))


def _oracle(entry: Entry) -> dict[str, Any]:
    """Run the facts of this method (`tests/facts/<room>/test_<name>.py`); an installed wheel has none to run."""
    root = catalog.checkout_folder()
    room, _, name = entry.name.partition("/")
    path = root / "tests" / "facts" / room / f"test_{name}.py" if root else None
    if root is None or path is None or not path.is_file():
        return {"file": None, "tests": 0, "passed": True}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)]
    finished = subprocess.run(words, check=False, capture_output=True, text=True, cwd=root)
    counted = re.search(r"(\d+) passed", finished.stdout)
    return {
        "file": str(path.relative_to(root)),
        "tests": int(counted.group(1)) if counted else 0,
        "passed": finished.returncode == 0,
    }


def _words(flags: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(flag(name if value else "no_" + name))
        else:
            words += [flag(name), *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
