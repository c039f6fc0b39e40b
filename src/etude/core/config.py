"""Ranges of configuration values, declared in the annotation and checked in one place.

``steps: Count = 1000`` says in the Config itself that steps is at least 1; `check` turns a violation into one
sentence, whether the value came from the command line, from Python or from a resumed run.
"""

from __future__ import annotations

import math
import os
import types
import typing
from dataclasses import fields
from typing import Annotated, Any, Literal, NamedTuple

from etude.core.errors import UserError, nearest

WHOLE = 2**63
SMALL, LARGE = 1e-38, 1e38


class Range(NamedTuple):
    """An interval of allowed values; ``open_low`` excludes the lower end, ``open_high`` the upper."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value not in (math.inf, -math.inf)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        ends = f"{self.low:g} and {self.high:g}"
        excluded = [f"{end:g}" for end, out in ((self.low, self.open_low), (self.high, self.open_high)) if out]
        return f"between {ends}" + (f" ({' and '.join(excluded)} excluded)" if excluded else "")


Count = Annotated[int, Range(1)]
Few = Annotated[int, Range(1, 10_000)]
"""Of what is built or done one by one: layers, members, inner steps."""
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]


def flag(name: str) -> str:
    """The command-line spelling of a field: ``learning_rate`` → ``--learning-rate``."""
    return "--" + name.replace("_", "-")


def check(config: Any) -> None:
    """Raise UserError if a field of this dataclass has the wrong type or lies outside its range."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            wanted = describe(hints[field.name])
            if isinstance(value, float) and math.isinf(value):
                wanted = wanted.replace("a number", "a finite number", 1)
            raise UserError(f"{flag(field.name)} is {_short(value)}; it must be {wanted}")
        for number in value if isinstance(value, tuple) else (value,):
            if extreme := _extreme(number):
                raise UserError(f"{flag(field.name)} is {_short(value)}; {extreme}")


def _extreme(value: Any) -> str:
    """Why no computation could hold this number, whatever its range: one place for what would overflow later."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, int) and abs(value) >= WHOLE:
        return "a whole number must be smaller than 2^63"
    if isinstance(value, float) and value != 0 and not SMALL < abs(value) < LARGE:
        return f"a number other than 0 must lie between {SMALL:g} and {LARGE:g} in size, as single precision does"
    return ""


def _short(value: Any) -> str:
    """A value as it was written, cut where it is long."""
    text = (
        repr(value)
        if not isinstance(value, int) or abs(value) < 10**40
        else f"a number of {len(hex(value)) * 6 // 5} digits"
    )
    return text if len(text) <= 80 else f"{text[:80]} …"


def replace(config: Any, values: dict[str, Any], owner: str) -> Any:
    """Return the config with these fields replaced and checked; an unknown field is answered with the nearest."""
    import dataclasses

    known = [field.name for field in fields(config)]
    for name in values:
        if name not in known:
            raise UserError(f"{owner} has no setting '{name}'{nearest(name, known)}")
    hints = typing.get_type_hints(type(config), include_extras=True)
    # JSON has no tuples, and Python callers write 1 for 1.0, numpy numbers and Paths: all are meant, so all are taken
    coerced = {name: _coerce(value, hints[name]) for name, value in values.items()}
    config = dataclasses.replace(config, **coerced)
    try:
        check(config)
    except UserError as error:
        if owner.endswith("config.json"):  # nobody has typed that flag
            raise UserError(f"{owner}: {error}") from error
        raise
    return config


def describe(hint: Any) -> str:
    """Say in words what a type hint allows: 'a whole number at least 1'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(extra) for extra in arguments[1:] if isinstance(extra, Range)]
        return " ".join([describe(arguments[0]), *ranges])
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else describe(part) for part in arguments)
    if origin is tuple:
        return f"a list, each {describe(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Range)]
        return _fits(value, arguments[0]) and all(value is None or bound.holds(value) for bound in ranges)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(_fits(item, part) for item, part in zip(value, arguments))
    if origin is dict:
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _coerce(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _coerce(value, arguments[0])
    if isinstance(value, list):
        return tuple(value) if "tuple" in str(hint) else value
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, os.PathLike) and "str" in str(hint):
        return os.fspath(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
