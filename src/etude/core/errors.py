"""The two ways a command can fail, and the one helper that makes the sentence kind: the nearest match."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input was wrong: one sentence saying what, where and what to do. The command line exits 2."""

    def __str__(self) -> str:
        return short(super().__str__())


class RunError(RuntimeError):
    """The run itself failed (NaN, full disk, a failed verification). The command line exits 1."""

    def __str__(self) -> str:
        return short(super().__str__())


def short(text: str) -> str:
    """The text; of a word in it of 500 characters or more the middle is left out."""
    return _LONG.sub(r"\1…\2", text)


_LONG = re.compile(r"(\S{200})\S{100,}(\S{200})")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or ``""`` when nothing is close."""
    names = list(known)
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not found:  # 'lenet' should find 'vision/lenet'
        found = [name for name in names if word and word in name][:1]
    if not found:
        tails = {name.rpartition("/")[2]: name for name in names}
        found = [tails[tail] for tail in difflib.get_close_matches(word.rpartition("/")[2], tails, n=1, cutoff=0.5)]
    return f"; did you mean '{found[0]}'?" if found else ""


_BEYOND = "the settings lead to a size or a number beyond 2^63, which nothing can hold"
_LACKS = "the settings ask for more memory than there is ({} at once)"
_BYTES = re.compile(r"allocate (?:memory: you tried to allocate )?([\d.]+) ?(bytes|[KMGTPE]i?B)")
_UNITS = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))}


def shortage(error: BaseException) -> str:
    """One sentence where this error means that something was asked for in vain that the machine has not got; else empty.

    That is memory, with the bytes, which NumPy, torch and Python say each in its own way, or a name of such a length.
    """
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"a name in the settings is longer than the file system allows: {error.filename}"
    text = " ".join(str(error).split())
    mine = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not mine and not (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    ):
        overflow = isinstance(error, (RuntimeError, ValueError, OverflowError, TypeError)) and _TOO_BIG.search(text)
        return _BEYOND if overflow else ""
    found = _BYTES.search(text)
    if not found:
        return _LACKS.format("a size that was not said")
    count = float(found[1]) * _UNITS.get(found[2].replace("bytes", "B"), 1)
    return _LACKS.format(f"{count:,.0f} bytes")


_TOO_BIG = re.compile(
    r"Storage size calculation overflowed|numel: integer multiplication overflow|invalid dimension|"
    r"Maximum allowed (?:dimension|size) exceeded|array is too big|too large to convert to C|"
    r"length must be non-negative|cannot fit 'int' into an index-sized|cannot be represented as a SymInt|"
    r"Overflow when unpacking long|out of range for .*int|negative dimensions|int too (big|large) to convert"
)
