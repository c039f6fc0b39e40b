"""The flags of a method: read from its Config by tyro, and every mistake in them explained in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import typing
from typing import Any

from etude import catalog
from etude.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run starts from and where it goes."""

    preset: str = "default"
    """Named settings to start from ('etude info METHOD' lists them)."""
    out: str | None = None
    """New folder for the run (default: runs/<method>/<date>-<seed>)."""
    seeds: str | None = None
    """Several runs, one a seed, and the mean and spread of what they return: 0-4, or 0,3,7."""
    json: bool = False
    """Print the result as JSON: {run, metrics}; with --seeds {runs, mean, spread}."""


def parse_settings(entry: catalog.Entry, module: Any, words: list[str]) -> Any:
    """Parse the flags of one method: its Config from the chosen preset, the common flags, and the launch flags."""
    import tyro

    from etude.core.config import check
    from etude.core.run import Common

    preset = next((b for a, b in itertools.pairwise(words) if a == "--preset"), None) or next(
        (word.partition("=")[2] for word in words if word.startswith("--preset=")), "default"
    )
    if preset not in module.PRESETS:
        known = ", ".join(module.PRESETS)
        raise UserError(f"{entry.name} has no preset '{preset}'{nearest(preset, module.PRESETS)} (it has {known})")
    parts = {"config": module.PRESETS[preset], "launch": Launch(preset=preset), "common": Common()}
    shape = dataclasses.make_dataclass("Settings", [(name, type(part)) for name, part in parts.items()], frozen=True)
    settings = parse(
        tyro.conf.OmitArgPrefixes[shape], shape(**parts), parts, words, f"etude run {entry.name}", entry.title
    )
    check(settings.config)
    check(settings.common)
    return settings


def parse(kind: Any, default: Any, parts: dict[str, Any], words: list[str], prog: str, description: str) -> Any:
    """tyro's parser with its boxes replaced by one sentence (a request for help passes through)."""
    import tyro

    if any(word in ("-h", "--help") for word in words):
        return tyro.cli(kind, default=default, args=words, prog=prog, description=description)
    trouble = io.StringIO()
    try:
        with contextlib.redirect_stderr(trouble), contextlib.redirect_stdout(trouble):
            return tyro.cli(kind, default=default, args=words, prog=prog, description=description)
    except SystemExit:
        raise UserError(_explain(parts, words, prog) or _first_sentence(trouble.getvalue())) from None


def _explain(parts: dict[str, Any], words: list[str], prog: str) -> str:
    """Which flag or value the parser refused, in one sentence."""
    from etude.core.config import describe, flag

    hints: dict[str, Any] = {}
    for part in parts.values():
        for name, hint in typing.get_type_hints(type(part), include_extras=True).items():
            hints[flag(name)] = hint
    allowed = {*hints, *(flag("no_" + name[2:]) for name, hint in hints.items() if hint is bool)}
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name.lstrip("-").replace(".", "").isdigit():
            if position == 0:
                return f"{prog}: '{word}' stands where a flag should; flags begin with -- ({prog} --help)"
            continue
        if name.replace("_", "-") not in allowed:
            return f"{prog} has no flag '{name}'{nearest(name, allowed)} ({prog} --help)"
        hint = hints.get(name.replace("_", "-"), bool)
        values = [value] if equals else []
        values += itertools.takewhile(lambda after: not after.startswith("--"), words[position + 1 :])
        if hint is bool:
            if values:
                return f"{name} takes no value, but '{values[0]}' follows it ({prog} --help)"
        elif not values:
            return f"{name} needs a value: {describe(hint)}"
        elif short := [text for text in values[1:] if len(text) == 2 and text[0] == "-" and text[1].isalpha()]:
            return f"{prog} has no flag '{short[0]}'; flags are written out, as in --quiet ({prog} --help)"
        elif not all(_reads_as(text, hint) for text in values) or ("tuple" not in str(hint) and len(values) > 1):
            return f"{name} is '{' '.join(values)}'; it must be {describe(hint)}"
    return ""


def _reads_as(text: str, hint: Any) -> bool:
    """Whether a value of this type can be read from the text (its range is checked later)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated or origin is tuple:
        return _reads_as(text, arguments[0])
    if origin is typing.Literal:
        return text in map(str, arguments)
    if arguments:
        return any(_reads_as(text, part) if part is not type(None) else text == "None" for part in arguments)
    try:
        return bool(hint is str or hint(text) is not None)
    except (TypeError, ValueError):
        return False


def _first_sentence(box: str) -> str:
    """The first line inside one of tyro's boxes."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    return lines[0] if lines else "the flags could not be read; try --help"
