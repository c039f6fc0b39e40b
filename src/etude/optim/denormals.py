"""Numbers too small for full precision, flushed to 0 where they would only cost time

Behind a dead ReLU a gradient is 0 for good, and Adam's averages of it fall by a factor at every update until they reach the
subnormal numbers (below 1.2e-38 in float32), which x86 processors compute some ten times slower. None of them moves a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Subnormal results on this thread are 0 meanwhile (where the processor can do that), and as before afterwards."""
    before = float(torch.full((), 1e-30) * 1e-10) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
