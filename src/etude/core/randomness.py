"""Randomness is a function, not a state: every stream is keyed by (seed, step, rank, purpose).

Nothing about random numbers is ever saved. Step 1,000 of a resumed run draws what step 1,000 of an
uninterrupted run draws, because both ask `fold` for the same key. Different seeds, ranks, steps and purposes
give unrelated streams (the key is hashed with BLAKE2).
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_pack = struct.Struct("<qqq").pack


def fold(seed: int, step: int = 0, rank: int = 0, purpose: str = "") -> int:
    """Return a 63-bit integer that depends on all four, for `torch.Generator.manual_seed` and numpy alike.

    `seed` and `step` may be any integers below 2**63 in size; equal arguments give equal results on every machine.
    """
    return int.from_bytes(blake2b(_pack(seed, step, rank) + purpose.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, step: int = 0, rank: int = 0, purpose: str = "") -> torch.Generator:
    """Return a fresh CPU `torch.Generator` keyed by (seed, step, rank, purpose)."""
    import torch

    return torch.Generator().manual_seed(fold(seed, step, rank, purpose))
