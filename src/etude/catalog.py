"""The catalogue: which methods exist, read from their source text without importing anything.

A method is one file `etude/<room>/<name>.py` (or `<name>/train.py`) with a function decorated `@method("room/name",
…)`. `etude list` must answer in under half a second, so `entries` parses the docstring, the decorator and the Config of
each file with `ast` and never imports torch; `load_method` imports the one file that is run.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from etude.core.claims import Control as Control  # what a method's file takes from here
from etude.core.claims import Experiment as Experiment
from etude.core.claims import Idle as Idle
from etude.core.claims import called, literal
from etude.core.digest import digest, files_digest
from etude.core.errors import UserError, nearest
from etude.core.meanings import explained

PACKAGE = Path(__file__).resolve().parent
NOT_ROOMS = {"core", "blocks", "data", "optim", "_results", "cli", "__pycache__"}
EXTRAS = {
    "rl": ("gymnasium",),
    "atari": ("gymnasium", "ale_py"),
    "mujoco": ("gymnasium", "mujoco"),
    "text": ("tokenizers",),
    "track": ("tensorboard",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}
SECTIONS = ("Paper", "Equation", "Algorithm", "Differences", "Expect", "Command")


@dataclass(frozen=True)
class Entry:
    """One method as its source text shows it."""

    name: str
    path: Path
    title: str
    paper: str
    section: str
    needs: tuple[str, ...]

    @property
    def room(self) -> str:
        return self.name.partition("/")[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """The extras this method needs whose packages are not installed."""
        return tuple(extra for extra in self.needs if not extra_installed(extra))

    @functools.cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @property
    def contract(self) -> dict[str, str]:
        """The docstring by section: claim, Paper, Equation, Algorithm, Differences, Expect, Command."""
        return parse_contract(self.docstring)

    @property
    def fields(self) -> list[dict[str, str]]:
        """The Config's fields: name, type, default and help, from the source text."""
        return class_fields(self.tree, "Config")

    @property
    def presets(self) -> dict[str, dict[str, str]]:
        """Each preset: what it changes (source text) and the comment beside it (expected time and score)."""
        found: dict[str, dict[str, str]] = {}
        lines = self.source.splitlines()
        shared = {_target(node): node.value for node in self.tree.body if isinstance(node, ast.Assign)}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and _target(node) == "PRESETS" and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Call):
                        comment = lines[(value.end_lineno or 1) - 1].partition("#")[2].strip()
                        changed = ", ".join(_changes(value, shared)) or "the defaults"
                        found[str(key.value)] = {"changes": changed, "expect": comment}
        return found

    @property
    def experiments(self) -> list[dict[str, Any]]:
        """The experiments as plain dictionaries (literals only), without importing the method."""
        assigned = {_target(node): node.value for node in self.tree.body if isinstance(node, ast.Assign)}
        if "EXPERIMENTS" not in assigned:
            return []
        calls = (call for call in ast.walk(assigned["EXPERIMENTS"]) if called(call) == "Experiment")
        return [literal(call, assigned) for call in calls]

    @property
    def metrics(self) -> dict[str, str]:
        """METRICS: what the numbers that `train` returns mean, beside the words that all methods share."""
        assigned = {_target(node): node.value for node in self.tree.body if isinstance(node, ast.Assign)}
        return literal(assigned["METRICS"], assigned) if "METRICS" in assigned else {}

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """(name, meaning) of the numbers that the experiments judge, that the card recorded, and that METRICS names."""
        traces = (self.card or {}).get("traces")
        recorded = [name for trace in traces.values() for name in trace["returned"]] if isinstance(traces, dict) else []
        names = dict.fromkeys([*(experiment["metric"] for experiment in self.experiments), *recorded])
        return explained([*names, *(name for name in self.metrics if name not in names)], self.metrics)

    @property
    def samples(self) -> bool:
        """Whether `etude sample` draws from its runs: the file defines `sample`, or imports it under that name."""
        imported = (alias for node in self.tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
        names = [getattr(node, "name", "") for node in self.tree.body] + [alias.asname for alias in imported]
        return "sample" in names

    @property
    def own(self) -> bool:
        """Whether this is a file of the user's, outside the package."""
        return not self.path.is_relative_to(PACKAGE)

    @property
    def card(self) -> dict[str, Any] | None:
        """The evidence card written by `etude verify`; None where there is none, and for a file of the user's own."""
        if self.own:
            return None
        try:
            card = json.loads((results_folder() / f"{self.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return card if isinstance(card, dict) else None

    @property
    def badge(self) -> str:
        """From the card: `verified`, `runs`, `broken`, or `stale` when it is of other code or bars; `unproved` without one."""
        card = self.card
        if card is None:
            return "unproved"
        return "stale" if self.stale else str(card.get("badge", "unproved"))

    @property
    def stale(self) -> bool:
        """Whether the code that made the card's numbers, or what was asked of them, has changed since."""
        card = self.card or {}
        kept = card.get("digest")
        if not isinstance(kept, dict):
            return True
        if kept.get("files") == files_digest(self.path):
            return False
        return self.asked != card.get("asked") or kept.get("code") != digest(self.path).code

    @property
    def asked(self) -> list[dict[str, Any]]:
        """What the experiments ask, as JSON gives it back; what they only tell (published, notes) is left out."""
        told = ("published", "notes")
        kept = [{k: v for k, v in experiment.items() if k not in told} for experiment in self.experiments]
        return json.loads(json.dumps(kept))

    def summary(self) -> dict[str, Any]:
        """The shape of `etude list --json`."""
        return {
            "name": self.name,
            "title": self.title,
            "room": self.room,
            "section": self.section,
            "paper": self.paper,
            "badge": self.badge,
            "needs": list(self.needs),
        }


def method(
    name: str,
    *,
    paper: str,
    section: str,
    needs: tuple[str, ...] = (),
    threads: int | None = None,
    shards: bool = False,
) -> Callable[[Callable[..., dict[str, float]]], Callable[..., dict[str, float]]]:
    """Mark the training loop of a method.

    `name` equals its path. `needs` names extras. `threads` is the default thread count (None = all), which the loop may
    change by `Run.use_threads` once it knows its network. `shards`: the loop touches whole parameters only in forward
    passes, so ``--shard`` may split them over the ranks.
    """

    def mark(loop: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        loop.etude = {  # type: ignore[attr-defined]
            "name": name, "paper": paper, "section": section, "needs": needs, "threads": threads, "shards": shards
        }  # fmt: skip
        return loop

    return mark


@functools.cache
def entries() -> dict[str, Entry]:
    """Every method by name, in the order of rooms and names."""
    return {entry.name: entry for entry in sorted(_scan(), key=lambda entry: entry.name)}


def find(name: str) -> Entry:
    """Return the entry of this name, or of a file path ending in .py; the nearest name is offered otherwise."""
    from etude.core import own

    if own.is_own(name):
        return own.find(name)
    known = entries()
    if name in known:
        return known[name]
    tails = [entry for entry in known.values() if entry.name.rpartition("/")[2] == name]
    if len(tails) == 1:
        return tails[0]
    raise UserError(f"there is no method '{name}'{nearest(name, known)}" + " ('etude list' shows all)")


def load_method(entry: Entry | str) -> ModuleType:
    """Import a method's file, by its entry or its name; raise UserError with the install command if an extra is missing."""
    from etude.core import extras, own

    if isinstance(entry, str):
        entry = find(entry)
    if entry.missing:
        raise UserError(f"{entry.name} needs a package that is not installed; run: {extras.how(*entry.missing)}")
    if isinstance(entry, own.Own):
        return own.load(entry)
    parts = entry.path.relative_to(PACKAGE).with_suffix("").parts
    return importlib.import_module(".".join(("etude", *parts)))


def loop_of(module: ModuleType) -> Callable[..., dict[str, float]]:
    """The decorated training loop of an imported method file."""
    return next(
        value for value in vars(module).values() if hasattr(value, "etude") and value.__module__ == module.__name__
    )


def extra_installed(extra: str) -> bool:
    """Whether the packages of this extra can be imported (looked up, not imported)."""
    return all(importlib.util.find_spec(package) is not None for package in EXTRAS.get(extra, ()))


def systems() -> list[dict[str, str]]:
    """The 197 systems of the lecture notes: chapter, section, system, where, test, missing, badge.

    `where` is the method that shows it (or a file of `blocks`), empty where there is none yet; `missing` says what a row
    done in part still lacks. The badge is the method's, "in part", or "not yet".
    """
    lines = (PACKAGE / "notes.tsv").read_text(encoding="utf-8").splitlines()
    heads = lines[0].split("\t")
    rows = [dict(zip(heads, line.split("\t"))) for line in lines[1:]]
    known = entries()
    for row in rows:
        entry = known.get(row["where"])
        row["badge"] = "in part" if row["missing"] else entry.badge if entry else "not yet"
    return rows


def results_folder() -> Path:
    """Where evidence cards lie: ETUDE_RESULTS, the checkout's `results/`, or the copy inside the installed package."""
    if "ETUDE_RESULTS" in os.environ:
        return Path(os.environ["ETUDE_RESULTS"])
    checkout = checkout_folder()
    return checkout / "results" if checkout else PACKAGE / "_results"


def checkout_folder() -> Path | None:
    """The root of the source checkout this package runs from, or None when it is an installed wheel."""
    root = PACKAGE.parent.parent
    return root if PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file() else None


def parse_contract(docstring: str) -> dict[str, str]:
    """Split a docstring at the section headings; the text before the first is under ``claim``."""
    sections: dict[str, list[str]] = {"claim": []}
    current = "claim"
    for line in docstring.splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in SECTIONS:
            current, line = head, rest.strip()
        sections.setdefault(current, []).append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in sections.items()}


def class_fields(tree: ast.Module, class_name: str) -> list[dict[str, str]]:
    """Fields of a dataclass in a parsed file: name, type, default, help (the docstring under each)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            found = []
            for item, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    text = ""
                    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                        text = " ".join(str(after.value.value).split())
                    default = ast.unparse(item.value) if item.value is not None else ""
                    found.append(
                        {"name": item.target.id, "type": ast.unparse(item.annotation), "default": default, "help": text}
                    )
            return found
    return []


def _scan() -> Iterator[Entry]:
    for room in sorted(PACKAGE.iterdir()):
        if room.is_dir() and room.name not in NOT_ROOMS:
            for path in [*room.glob("*.py"), *room.glob("*/train.py")]:
                entry = _read(path)
                if entry is not None:
                    yield entry


def _read(path: Path) -> Entry | None:
    """Read one file's title and decorator; only the decorator expression is parsed, so 200 files take milliseconds."""
    source = path.read_text(encoding="utf-8")
    start = source.find("\n@method(")
    if start < 0:
        return None
    end = source.find("\ndef ", start)
    decorator = ast.parse(source[start + 2 : end]).body[0]
    assert isinstance(decorator, ast.Expr)
    assert isinstance(decorator.value, ast.Call)
    name = ast.literal_eval(decorator.value.args[0])
    values = {str(k.arg): ast.literal_eval(k.value) for k in decorator.value.keywords}
    opening = source.find('"""')
    title = (
        source[opening + 3 : source.find("\n", opening)].strip().rstrip(".").removesuffix('"""') if opening >= 0 else ""
    )
    return Entry(name, path, title, values.get("paper", ""), values.get("section", ""), tuple(values.get("needs", ())))


def _changes(call: ast.Call, shared: dict[str, ast.expr]) -> Iterator[str]:
    """``name=value`` for each keyword of a call, those of a dictionary of the file (`**IMAGES`) too."""
    for keyword in call.keywords:
        if keyword.arg:
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(keyword.value, ast.Name) and isinstance(many := shared.get(keyword.value.id), ast.Dict):
            for name, value in zip(many.keys, many.values):
                yield f"{ast.literal_eval(name) if name else '…'}={ast.unparse(value)}"


def _target(node: ast.Assign) -> str:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
