"""Cards: what `etude verify` writes for a method, and how `--replay` renews one whose numbers cannot have changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from etude import catalog
from etude.catalog import Entry
from etude.core import record
from etude.core.checkpoint import write_text
from etude.core.claims import Control, Experiment
from etude.core.digest import digest
from etude.core.errors import UserError
from etude.core.evidence import traces
from etude.core.evidence.settings import sweep
from etude.core.evidence.trials import Stage, judged, part, spoken, try_control, try_experiment


def verify(entry: Entry, seeds: int | None = None, only: str | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Run the oracle tests, every experiment with its controls, and the sweep over the settings; return the card.

    The card is written to `results/<name>.json` when nothing was left out (all experiments, all seeds). Raises UserError
    for an unknown experiment, and where a card would be written from a changed checkout or over those of a wheel.
    """
    experiments = [Experiment.of(values) for values in entry.experiments]
    chosen = [e for e in experiments if only is None or e.name == only]
    if not chosen:
        raise UserError(f"{entry.name} has no experiment '{only}' (it has {', '.join(e.name for e in experiments)})")
    whole = only is None and seeds is None
    if whole:
        _may_write()
    oracle = _oracle(entry)
    say(f"{entry.name}: oracle {oracle['tests']} tests {'passed' if oracle['passed'] else 'FAILED'}")
    stage = Stage(keep, say)
    rows = [try_experiment(entry, experiment, stage, say, seeds) for experiment in chosen]
    settings, kept = {}, {}
    if whole:
        settings = check_settings(entry)
        names, kept = traces.record(entry, chosen, stage)
        for row, name in zip(rows, names):
            row["trace"] = name
    card = {
        "name": entry.name,
        "title": entry.title,
        "badge": _badge(oracle, rows, settings),
        "written": record._now(),
        "commit": record.commit(),
        "replayed": None,
        "digest": digest(entry.path)._asdict(),
        "asked": entry.asked,
        "oracle": oracle,
        "experiments": rows,
        "settings": settings,
        "traces": kept,
        "hardware": record.hardware(),
        "versions": record.versions(),
    }
    if whole:
        _write(entry, card)
    return card


def replay(entry: Entry) -> tuple[dict[str, Any] | None, str]:
    """Renew the card of a method whose code has changed, if the traces of all its experiments are what they were.

    Returns the card, or None, and a sentence. Recorded values are held against the bars as they stand now, and only
    controls that are new run. Raises UserError where no card may be written.
    """
    card = entry.card
    if card is None:
        return None, f"it has no card yet: etude verify {entry.name}"
    if not entry.stale and card["oracle"]["passed"] and _matter(card["settings"]):
        return card, "its card is of this code"
    _may_write()
    stage = Stage(None, say)
    rows: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    recorded = {row["name"]: row for row in card["experiments"]}
    elsewhere = card["hardware"]["cpu"] != record.hardware()["cpu"]
    for experiment in (Experiment.of(values) for values in entry.experiments):
        row = recorded.get(experiment.name)
        reason = _other(experiment, row)
        if not reason and row is not None:
            before = card.get("traces", {}).get(row.get("trace"))
            differs, made = traces.again(entry, experiment, before, stage, elsewhere)
            reason = differs and f"the trace of '{experiment.name}' differs: {differs}"
            row["trace"] = made.get("sha256", "")[:12]
            kept[row["trace"]] = made
        if reason or row is None:
            return None, f"{reason}; it wants: etude verify {entry.name}"
        slow = experiment.within_seconds is not None and max(row["seconds"], default=0) > experiment.within_seconds
        told = ("metric", "bar", "better", "tolerance", "published", "notes", "within_seconds")
        row |= {name: getattr(experiment, name) for name in told} | {"command": spoken(part(entry, experiment))}
        row["controls"] = [
            _control(entry, experiment, control, row["controls"], stage) for control in experiment.controls
        ]
        rows.append(row | judged(experiment, row["values"], row["controls"], slow))
    if not card["oracle"]["passed"]:
        card["oracle"] = _oracle(entry)
    if not _matter(card["settings"]):  # what did nothing, or could not be tried, may be mended now
        card["settings"] = check_settings(entry)
    card |= {
        "title": entry.title,
        "badge": _badge(card["oracle"], rows, card["settings"]),
        "replayed": {"written": record._now(), "commit": record.commit()},
        "digest": digest(entry.path)._asdict(),
        "asked": entry.asked,
        "experiments": rows,
        "traces": kept,
    }
    _write(entry, card)
    return card, "its traces agree; the card is renewed"


def check_settings(entry: Entry) -> dict[str, dict[str, str]]:
    """The sweep over a method's settings, said aloud where a field does nothing."""
    found = sweep(entry)
    for name, row in found.items():
        if row["state"] in ("nothing", "refused"):
            what = "changes nothing" if row["state"] == "nothing" else f"is refused ({row['why']})"
            say(f"{entry.name}: setting {name} ({row['to']}) {what}")
    matter = sum(row["state"] == "matters" for row in found.values())
    say(f"{entry.name}: {matter} of {len(found)} settings matter, {_idle(found)} cannot be seen")
    return found


def say(text: str) -> None:
    """One line for the terminal, beside the output."""
    print(text, file=sys.stderr, flush=True)


def _idle(settings: dict[str, dict[str, str]]) -> int:
    return sum(row["state"] == "idle" for row in settings.values())


def _badge(oracle: dict[str, Any], rows: list[dict[str, Any]], settings: dict[str, dict[str, str]]) -> str:
    """verified: oracle, every bar, every control and every setting; broken: the oracle or a run failed; else runs."""
    if not oracle["passed"] or any(value is None for row in rows for value in row["values"]):
        return "broken"
    proved = oracle["tests"] and _matter(settings) and all(row["passed"] for row in rows)
    return "verified" if proved else "runs"


def _matter(settings: dict[str, dict[str, str]]) -> bool:
    """Whether every setting changes something or the file says why it cannot be seen."""
    return all(row["state"] in ("matters", "idle") for row in settings.values())


def _other(experiment: Experiment, row: dict[str, Any] | None) -> str:
    """Why a recorded row is not of this experiment ("" when it is); bars and words may differ, runs may not."""
    if row is None:
        return f"the experiment '{experiment.name}' is new"
    if list(experiment.seeds) != row["seeds"] or experiment.metric != row["metric"]:
        return f"the experiment '{experiment.name}' has other seeds or another metric now"
    return ""


def _control(
    entry: Entry, experiment: Experiment, control: Control, recorded: list[dict[str, Any]], stage: Stage
) -> dict[str, Any]:
    """What is recorded of this very control, or else what it does now: one that is new runs by itself."""
    known = (control.metric or experiment.metric, control.swap, spoken(part(entry, experiment, control=control)))
    for one in recorded:
        if (one["metric"], one["swap"], one["command"]) == known:
            return one | {"name": control.name}
    return try_control(entry, experiment, control, experiment.seeds, stage, say)


def _may_write() -> None:
    """Raise UserError where no card may be written: from a wheel over its own cards, or from a changed checkout."""
    root = catalog.checkout_folder()
    if root is None:
        if "ETUDE_RESULTS" not in os.environ:
            raise UserError(
                "an installed etude keeps the cards it came with; set ETUDE_RESULTS to a folder for yours, or add --seeds 1 "
                "(then no card is written)"
            )
        return
    try:
        git = ["git", "-C", str(root), "status", "--porcelain", "--", "src", "tests", "pyproject.toml"]
        changed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{root} is no git checkout that can be asked for changes, and a card names its commit; add --seeds 1 "
            "(then no card is written)"
        ) from error
    if changed:
        raise UserError(
            f"{changed[0][3:]} is changed and not committed, and a card names its commit; commit first, or add --seeds 1 "
            "(then no card is written)"
        )


def _write(entry: Entry, card: dict[str, Any]) -> None:
    path = catalog.results_folder() / f"{entry.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(card, indent=1) + "\n")
    say(f"card: {path}")


def _oracle(entry: Entry) -> dict[str, Any]:
    """Run this method's files of `tests/facts/` and `tests/learns/`, long tests too; an installed wheel has none to run."""
    root = catalog.checkout_folder()
    files = own_tests(entry, root) if root else []
    if root is None or not files:
        return {"file": None, "tests": 0, "passed": True}
    files += own_tests(entry, root, "learns")
    words = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", *map(str, files)]
    finished = subprocess.run(words, check=False, capture_output=True, text=True, cwd=root)
    counted = re.search(r"(\d+) passed", finished.stdout)
    return {
        "file": " ".join(str(path.relative_to(root)) for path in files),
        "tests": int(counted.group(1)) if counted else 0,
        "passed": finished.returncode == 0,
    }


def own_tests(entry: Entry, root: Path, kind: str = "facts") -> list[Path]:
    """A method's files in `tests/<kind>/<room>`, kind "facts" or "learns": test_<name>.py and test_<name>_<subject>.py.

    A file belongs to the method with the longest name that fits (test_wgan_gp.py is not wgan's).
    """
    room, _, name = entry.name.partition("/")
    names = sorted((e.name.partition("/")[2] for e in catalog.entries().values() if e.room == room), key=len)
    found = []
    for path in sorted((root / "tests" / kind / room).glob(f"test_{name}*.py")):
        fitting = [other for other in names if re.fullmatch(rf"test_{other}(_.*)?", path.stem)]
        if fitting and fitting[-1] == name:
            found.append(path)
    return found
