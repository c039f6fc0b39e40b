"""The two ways a command can fail, and the one helper that makes the sentence kind: the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input was wrong: one sentence saying what, where and what to do. The command line exits 2."""


class RunError(RuntimeError):
    """The run itself failed (NaN, full disk, a failed verification). The command line exits 1."""


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
