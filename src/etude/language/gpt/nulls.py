"""What can be said of a text without a network: the numbers that a language model must be better than."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bigram_nats"]


def bigram_nats(learned: Tensor, ids: Tensor, vocabulary: int) -> float:
    """−Σ log p(ids[t] | ids[t−1]) over t ≥ 1, with p from the pairs counted in `learned`, (N,) int64.

    p(b | a) = (c(ab) + p(b)) / (c(a) + 1): one more observation of `a`, followed by b as often as b occurs at all.
    """
    single = torch.bincount(learned, minlength=vocabulary).double()
    often = (single + 1) / (len(learned) + vocabulary)
    seen, count = (learned[:-1] * vocabulary + learned[1:]).unique(return_counts=True)
    before = torch.bincount(learned[:-1], minlength=vocabulary).double()
    asked = ids[:-1] * vocabulary + ids[1:]
    place = torch.searchsorted(seen, asked).clamp(max=len(seen) - 1)
    pairs = torch.where(seen[place] == asked, count[place], 0).double()
    return -float(((pairs + often[ids[1:]]) / (before[ids[:-1]] + 1)).log().sum())
