"""Memory is asked for before it is taken: the kernel would promise it, and kill the process when it is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from etude.core.errors import UserError


def afford(what: str, size: float) -> None:
    """Raise UserError when `size` bytes for `what` (``--buffer 1000000``) are more than this machine has."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > have:
            raise UserError(f"{what} would take {_written(size)} of memory, and this machine has {_written(have)}")


def afford_learning(widths: Sequence[int], rows: int) -> None:
    """The same for an MLP of these widths, its copies, and the `rows` transitions that it learns from in a round."""
    weights = sum((a + 1) * b for a, b in pairwise(widths))
    afford(f"a network of {weights:,} parameters (--widths)", 4 * 6 * weights)  # φ, φ', best, gradient, Adam's two
    afford(f"{rows:,} transitions a round (--updates times --batch)", 4 * rows * (2 * sum(widths) + 8))


def _written(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            break
        size /= 1000
    return f"{size:,.3g} {unit}" if size < 1000 else f"{size:.3g} {unit}"
