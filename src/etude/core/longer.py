"""Training a run longer than it was meant to be: which setting is its length, and what else followed from it."""

from __future__ import annotations

import ast
import shlex
import sys
from pathlib import Path
from typing import Any, TypeGuard

from etude.catalog import Entry
from etude.core.config import flag, replace
from etude.core.errors import UserError

LENGTHS = ("steps", "iterations", "episodes", "rounds")
"""What the field of a Config is called that says how long a run takes."""


def length(entry: Entry) -> str:
    """The field of the method's Config that its one loop counts to. Raises UserError where there is no such field."""
    names = [field["name"] for field in entry.fields]
    found = next((name for name in LENGTHS if name in names), "")
    clocks = [node for node in ast.walk(entry.tree) if _is_clock(node)]
    counted = ast.unparse(clocks[0].args[0]) if len(clocks) == 1 and clocks[0].args else ""
    if not found or not counted or counted.startswith(("len(", "source.")):
        raise UserError(
            f"{entry.name} has no length to extend: {_why(found, len(clocks))}; run it again with other settings"
        )
    return found


def followers(entry: Entry, config: Any, name: str) -> str:
    """What in this run depends on its length beside the loop, in words; empty where nothing is known to."""
    if getattr(config, "schedule", "constant") != "constant":
        return f"the schedule {config.schedule}"
    lines = {node.lineno for node in ast.walk(entry.tree) if _is_use(node, name)}
    clocks = [node for node in ast.walk(entry.tree) if _is_clock(node)]
    lines -= {node.lineno for clock in clocks for node in ast.walk(clock) if isinstance(node, ast.Attribute)}
    rates = [
        node
        for node in ast.walk(entry.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("schedule")
    ]
    if hasattr(config, "schedule"):  # a constant one asks for the length and does not use it
        lines -= {line for call in rates for line in range(call.lineno, (call.end_lineno or call.lineno) + 1)}
    if not lines:
        return ""
    where = ", ".join(map(str, sorted(lines)[:4]))
    return f"what {entry.path.name} takes from {flag(name)} in {'line' if len(lines) == 1 else 'lines'} {where} too"


def lengthen(folder: Path, described: dict[str, Any], entry: Entry, config: Any, asked: dict[str, int]) -> Any:
    """The Config with a greater length, noted in what config.json holds; what else followed from the length is said."""
    name, (given, value) = length(entry), next(iter(asked.items()))
    if list(asked) != [name]:
        raise UserError(f"the length of a run of {entry.name} is {flag(name)}, not {flag(given)}")
    before = getattr(config, name)
    config = replace(config, {name: value}, f"{folder}/config.json")
    if value <= before:
        raise UserError(f"the run in {folder} was made for {flag(name)} {before}; to train longer give more than that")
    from etude.core import checkpoint

    if checkpoint.list_checkpoints(folder / "checkpoints"):
        step, state, _ = checkpoint.load(folder / "checkpoints")
        if state.get("~run", {}).get("over"):
            raise UserError(f"the run in {folder} ended by itself after step {step}; more {name} would change nothing")
    else:
        step = 0
    follows = followers(entry, config, name)
    if follows and step:
        print(
            f"note: up to here the length was {before:,}; what follows from it ({follows}) goes on as for {value:,}, so this "
            f"is not the run that had {flag(name)} {value} from the start",
            file=sys.stderr,
        )
    described["config"][name] = value
    described["command"] += f"\netude resume {shlex.quote(str(folder))} {flag(name)} {value}"
    return config


def _is_clock(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "run.steps"


def _is_use(node: ast.AST, name: str) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) in ("config", "recipe")


def _why(found: str, clocks: int) -> str:
    if not found:
        return f"its settings have none of {', '.join(map(flag, LENGTHS))}"
    return "it has several loops" if clocks > 1 else "its loop counts something else"
