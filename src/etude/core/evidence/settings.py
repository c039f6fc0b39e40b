"""Every setting matters: each field of a Config is changed once, and the run must come out differently.

The `tiny` preset is run as it is and with one field changed at a time; the log, the returned numbers and the bytes of
the pictures are compared. Numbers that differ in their last digits only, as sums do that are taken in another order, count
as equal. A method's SETTINGS says to what a field is changed where its type does not tell (`another`),
with which other settings a field begins to matter, or in one phrase why there is nothing to see (`Idle`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from etude import catalog
from etude.catalog import Entry
from etude.core import checkpoint, launch
from etude.core import run as running
from etude.core.claims import Idle
from etude.core.config import Range
from etude.core.errors import RunError, UserError

ELSEWHERE = {
    "device": "a machine has one kind of device at hand",
    "shard": "needs several ranks; tests/faults/test_ranks.py",
    "compile": "the same numbers by other kernels; refused where nothing is compiled",
}
"""Common flags that a sweep on one process of one machine cannot see."""
ROUNDING = 1e-11
"""Difference of two numbers, relative or absolute, that no setting is credited with."""


def sweep(entry: Entry) -> dict[str, dict[str, str]]:
    """For every field of the method's Config, and every common flag: {"to": …, "state": …, "why": …}.

    States: "matters", "nothing" (no difference), "refused" (the change itself is not allowed) and "idle" (the file, or
    `ELSEWHERE`, says why). A change that ends the run in a failure matters.
    """
    module = catalog.load_method(entry)
    given: dict[str, Any] = getattr(module, "SETTINGS", {})
    tiny = module.PRESETS["tiny"]
    hints = typing.get_type_hints(module.Config, include_extras=True)
    found: dict[str, dict[str, str]] = {}
    known: dict[str, Any] = {}

    def run(settings: dict[str, Any]) -> Any:
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in known:
            known[key] = _left(entry, settings)
        return known[key]

    for field in dataclasses.fields(module.Config):
        choice = given.get(field.name)
        if isinstance(choice, Idle):
            found[field.name] = {"to": "", "state": "idle", "why": choice.why}
            continue
        if isinstance(choice, dict):
            change = choice
        elif field.name in given:
            change = {field.name: choice}
        else:
            try:
                change = {field.name: another(getattr(tiny, field.name), hints[field.name])}
            except ValueError as error:
                found[field.name] = {"to": "", "state": "refused", "why": str(error)}
                continue
        companions = {name: value for name, value in change.items() if name != field.name}
        found[field.name] = _verdict(change, run(companions), run(change))
    return found | _common(entry, run({}))


def another(value: Any, hint: Any) -> Any:
    """Another value of this type: true ↔ false, the next choice, n + 1, x/2, a shorter list; raises ValueError for text."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        high = min((extra.high for extra in arguments[1:] if isinstance(extra, Range)), default=float("inf"))
        changed = another(value, arguments[0])
        return changed if not isinstance(changed, (int, float)) or changed <= high else value - 1
    if origin in (typing.Union, types.UnionType):
        kind = next(part for part in arguments if part is not type(None))
        return another(_first(kind) if value is None else value, kind)
    if origin is typing.Literal:
        choices = list(arguments)
        return choices[(choices.index(value) + 1) % len(choices)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, tuple) and value:
        items = list(value)
        return tuple(items[:-1]) if len(items) > 1 else (another(items[0], next(iter(arguments))),)
    raise ValueError(f"SETTINGS must say to what {value!r} is changed")


def _first(kind: Any) -> Any:
    """A value to start from where there is none."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return arguments[0]
    bare = arguments[0] if typing.get_origin(kind) is typing.Annotated else kind
    return {int: 0, float: 1.0, bool: False}.get(bare)


def _left(entry: Entry, settings: dict[str, Any], **common: Any) -> dict[str, Any] | UserError:
    """What a tiny run with these settings leaves: log, numbers and pictures; the error that refuses the settings."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        plain = {"seed": 0, "threads": 1, "quiet": True, "device": "cpu"} | common
        left: dict[str, Any] = {}
        try:
            with _silent():
                launch.run(entry.name, preset="tiny", out=folder, **plain, **settings)
        except UserError as error:
            return error
        except RunError as error:
            left["failure"] = str(error)
        for path in [folder / "metrics.jsonl", folder / "result.json", *(folder / "artifacts").glob("*")]:
            if path.is_file() and path.name != "index.json":  # whose captions may quote settings
                left[path.name] = path.read_bytes()
        return left


def _verdict(change: dict[str, Any], before: Any, after: Any) -> dict[str, str]:
    said = ", ".join(f"{name}={value}" for name, value in change.items())
    for left in (before, after):
        if isinstance(left, UserError):
            return {"to": said, "state": "refused", "why": str(left)}
    differs = sorted(name for name in before.keys() | after.keys() if not _equal(before.get(name), after.get(name)))
    return {"to": said, "state": "matters" if differs else "nothing", "why": ", ".join(differs)}


def _equal(one: Any, two: Any) -> bool:
    """Whether both runs left the same in a file: its bytes or, where it is JSON, its numbers up to rounding."""
    if one == two or not (isinstance(one, bytes) and isinstance(two, bytes)):
        return one == two
    try:
        return _close(*([json.loads(line) for line in text.splitlines()] for text in (one, two)))
    except ValueError:  # not line by line
        pass
    try:
        return _close(json.loads(one), json.loads(two))
    except ValueError:  # a picture, or words
        return False


def _close(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_close(value, two[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_close, one, two))
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=ROUNDING, abs_tol=ROUNDING) or (math.isnan(one) and math.isnan(two))
    return one == two


def _common(entry: Entry, before: Any) -> dict[str, dict[str, str]]:
    """The same for the flags that all methods share."""
    found = {f"--{name}": {"to": "", "state": "idle", "why": why} for name, why in ELSEWHERE.items()}
    seed = _verdict({"seed": 1}, before, _left(entry, {}, seed=1))
    if seed["state"] == "nothing" and "deterministic" in entry.docstring.lower():
        seed |= {"state": "idle", "why": "the method is deterministic"}
    found["--seed"] = seed
    found["--precision"] = _verdict({"precision": "bf16"}, before, _left(entry, {}, precision="bf16"))
    if found["--precision"]["state"] == "refused":
        found["--precision"]["state"] = "idle"
    with _counted(checkpoint, "save") as saves:
        _left(entry, {}, save_every=1)
    found["--save-every"] = _seen({"save_every": 1}, len(saves) > 2, "checkpoints")
    with _counted(torch, "set_num_threads") as asked:
        _left(entry, {}, threads=2)
    found["--threads"] = _seen({"threads": 2}, ((2,), {}) in asked, "threads of torch")
    with _counted(running, "Progress") as bars:
        _left(entry, {}, quiet=False)
    found["--quiet"] = _seen({"quiet": False}, any(named.get("enabled") for _, named in bars), "the terminal")
    return found


def _seen(change: dict[str, Any], differs: bool, where: str) -> dict[str, str]:
    return {
        "to": ", ".join(f"{k}={v}" for k, v in change.items()),
        "state": "matters" if differs else "nothing",
        "why": where,
    }


@contextlib.contextmanager
def _counted(owner: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of every call of a function, which goes on working."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    function = getattr(owner, name)

    def counting(*words: Any, **named: Any) -> Any:
        calls.append((words, named))
        return function(*words, **named)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, function)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
