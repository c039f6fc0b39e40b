"""What a method's file claims: its experiments with their bars, and the controls that must fail them

`catalog` reads them from the source text (`literal`), so nothing is imported; methods take the classes from there.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Control:
    """A fault or a null that must *fail* the bar of its experiment, or the bar proves nothing.

    It runs on the experiment's seeds, with one change: other settings, another returned metric of the very same run, or
    a function of the method's file replaced by a null one. A control whose run ends in a RunError (a divergence) has failed
    the bar too; one that is refused or crashes proves nothing.
    """

    name: str
    """What is wrong or missing: "no clipping", "an untrained network", "the map is a blob in the centre"."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Config fields that differ from the experiment's."""
    preset: str = ""
    """Preset to start from, where it is not the experiment's."""
    metric: str = ""
    """Key of the returned metrics that is held against the bar, where it is not the experiment's."""
    swap: dict[str, str] = field(default_factory=dict)
    """Name in the method's file → dotted path of what stands there instead (``etude.insight.parts.nulls.centre_blob``)."""


@dataclass(frozen=True)
class Idle:
    """In SETTINGS: why changing a field of the Config changes neither the numbers nor the pictures of a run."""

    why: str


@dataclass(frozen=True)
class Experiment:
    """One recorded experiment of a method and the bar it must clear; `etude verify` runs it for every seed."""

    name: str
    """Short name, unique in the method."""
    preset: str
    """Preset it starts from."""
    metric: str
    """Key of the returned metrics that is held against the bar."""
    bar: float
    """The value to reach."""
    better: str = "higher"
    """Whether a value must be higher than the bar, lower, or near it (within `tolerance`)."""
    tolerance: float = 0.0
    """Largest distance from the bar that is near."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each must clear the bar."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Config fields that differ from the preset."""
    published: str = ""
    """The published number and where it stands."""
    within_seconds: float | None = None
    """Limit on the seconds spent between the first and the last step (of a CPU that others use too: CPU seconds, if fewer)."""
    notes: str = ""
    """What a reader of the card must know."""
    controls: tuple[Control, ...] = ()
    """Faults and nulls that must fail this bar on every seed; at least one."""

    def clears(self, value: float) -> bool:
        """Whether this value reaches the bar."""
        if self.better == "near":
            return abs(value - self.bar) <= self.tolerance
        return value >= self.bar if self.better == "higher" else value <= self.bar

    @classmethod
    def of(cls, values: dict[str, Any]) -> Experiment:
        """From the dictionaries of `Entry.experiments`."""
        controls = tuple(Control(**control) for control in values["controls"])
        return dataclasses.replace(cls(**{k: v for k, v in values.items() if k != "controls"}), controls=controls)


def called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def literal(node: ast.AST, assigned: dict[str, ast.expr]) -> Any:
    """The value of an expression made of literals, `Experiment(…)`, `Control(…)` and names of such in the same file.

    The two calls become dictionaries with all their fields.
    """
    kind = {"Experiment": Experiment, "Control": Control}.get(called(node))
    if kind is not None:
        assert isinstance(node, ast.Call)
        values = {name.name: literal(argument, assigned) for name, argument in zip(fields(kind), node.args)}
        values |= {str(k.arg): literal(k.value, assigned) for k in node.keywords}
        return {f.name: values.get(f.name, _default(f)) for f in fields(kind)}
    if isinstance(node, ast.Name):
        return literal(assigned[node.id], assigned)
    if isinstance(node, ast.Tuple):
        parts = [(item.value, True) if isinstance(item, ast.Starred) else (item, False) for item in node.elts]
        values = [(literal(item, assigned), many) for item, many in parts]
        return tuple(item for value, many in values for item in (value if many else (value,)))
    if isinstance(node, ast.Dict):
        pairs = [
            (key and literal(key, assigned), literal(value, assigned)) for key, value in zip(node.keys, node.values)
        ]
        return {k: v for key, value in pairs for k, v in (value.items() if key is None else [(key, value)])}
    return ast.literal_eval(node)  # type: ignore[arg-type]


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default
