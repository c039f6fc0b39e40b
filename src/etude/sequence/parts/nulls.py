"""What can be said of a text without a network: counted characters, the numbers that a language model must be better than."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["counted_nats", "undilated", "wider_windows"]


def counted_nats(learned: Tensor, ids: Tensor, vocabulary: int, order: int = 2) -> float:
    """−Σ log p(ids[t] | the `order` tokens before) over t ≥ order, from what is counted in `learned`, (N,) int64.

    p_k(b | a) = (c(ab) + p_{k−1}(b | a without its first)) / (c(a) + 1), down to p_{−1} = 1/V: one more observation of
    the context a, followed by b as often as the shorter context says. c(a) counts the contexts that something follows.
    """
    probability = torch.full((len(ids) - order,), 1 / vocabulary, dtype=torch.float64)
    for k in range(order + 1):
        known, asked = _numbers(learned, k, vocabulary), _numbers(ids[order - k :], k, vocabulary)
        after, before = learned[k:], ids[order:]
        pairs = _count(known * vocabulary + after, asked * vocabulary + before)
        probability = (pairs + probability) / (_count(known, asked) + 1)
    return -float(probability.log().sum())


def _numbers(ids: Tensor, k: int, vocabulary: int) -> Tensor:
    """The k tokens before each token from the k-th on, as one number."""
    number = torch.zeros(len(ids) - k, dtype=torch.int64)
    for i in range(k):
        number = number * vocabulary + ids[i : len(ids) - k + i]
    return number


def _count(known: Tensor, asked: Tensor) -> Tensor:
    """How often each number of `asked` is in `known`."""
    seen, count = known.unique(return_counts=True)
    place = torch.searchsorted(seen, asked).clamp(max=len(seen) - 1)
    return torch.where(seen[place] == asked, count[place], 0).double()


def undilated(layer: int, kernel: int) -> int:
    """A dilation that does not grow from layer to layer."""
    return 1


def wider_windows(x: Tensor, window: int) -> Tensor:
    """(n, d) → (n, d, r + 2): windows of two positions more than was asked for."""
    return F.pad(x.t(), (window // 2 + 1, window // 2 + 1)).unfold(1, window + 2, 1).transpose(0, 1)
