"""Extremely randomised regression trees (Extra-Trees) in compiled loops: one function of the state for each action

Geurts, Ernst & Wehenkel, Extremely randomized trees, Machine Learning 63, 2006. A node draws one cut of every input, uniformly
between the least and the greatest value that its rows have there, keeps the cut that leaves the least variance, and both sides
must keep `leaf` rows. A leaf answers with the mean of its rows, the ensemble with the mean of its trees. All trees see all rows.

Every tree has A roots, its nodes 0 to A − 1, and row i belongs under root `action[i]`: the first split is by the action.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LEAF = -1
"""Input of a node that has no cut."""


def most_nodes(rows: int, actions: int, leaf: int) -> int:
    """Nodes that no tree can exceed: A roots, and two more for each cut, of which there are fewer than rows / leaf."""
    return actions + 2 * (rows // leaf)


def grow(
    x: Any, y: Any, order: Any, bounds: Any, leaf: int, dice: Any, feature: Any, cut: Any, left: Any, value: Any
) -> int:
    """Grow one tree into feature, cut, left, value (M,); returns its nodes. The right child of a node is left + 1.

    x (N, D), y (N,), `order` (N,) the rows by action (it is shuffled within an action), `bounds` (A + 1,) where each action's
    rows begin in it. A root without rows keeps the value it has.
    """
    actions = len(bounds) - 1
    begin, end = np.empty(len(feature), np.int64), np.empty(len(feature), np.int64)
    for a in range(actions):
        begin[a], end[a] = bounds[a], bounds[a + 1]
    count, node = actions, 0
    while node < count:  # breadth first: children stand behind their parents
        first, last = begin[node], end[node]
        rows = last - first
        feature[node] = -1
        if rows > 0:
            total, least, most = 0.0, y[order[first]], y[order[first]]
            for i in range(first, last):
                here = y[order[i]]
                total += here
                least, most = min(least, here), max(most, here)
            value[node] = total / rows
            if rows >= 2 * leaf and least < most:
                best = -np.inf
                for d in range(x.shape[1]):
                    low, high = x[order[first], d], x[order[first], d]
                    for i in range(first, last):
                        low, high = min(low, x[order[i], d]), max(high, x[order[i], d])
                    if low == high:
                        continue
                    where = low + dice.random() * (high - low)
                    fewer, sum_left = 0, 0.0
                    for i in range(first, last):
                        if x[order[i], d] <= where:
                            fewer += 1
                            sum_left += y[order[i]]
                    if fewer < leaf or rows - fewer < leaf:
                        continue
                    sum_right = total - sum_left
                    score = sum_left * sum_left / fewer + sum_right * sum_right / (rows - fewer)
                    if score > best:  # the most explained is the least variance left
                        best, feature[node], cut[node] = score, d, where
                if feature[node] >= 0:
                    i, j = first, last - 1
                    while i <= j:
                        if x[order[i], feature[node]] <= cut[node]:
                            i += 1
                        else:
                            order[i], order[j] = order[j], order[i]
                            j -= 1
                    left[node] = count
                    begin[count], end[count], begin[count + 1], end[count + 1] = first, i, i, last
                    count += 2
        node += 1
    return count


def answer(x: Any, feature: Any, cut: Any, left: Any, value: Any, out: Any) -> None:
    """Write the mean of the trees (T, M) for rows x (N, D) and every root into `out` (N, A)."""
    out[:] = 0.0
    for t in range(feature.shape[0]):  # tree by tree: one fits in the cache
        for i in range(x.shape[0]):
            for a in range(out.shape[1]):
                node = a
                while feature[t, node] >= 0:
                    node = left[t, node] + (x[i, feature[t, node]] > cut[t, node])
                out[i, a] += value[t, node]
    out /= feature.shape[0]


def descend(x: Any, feature: Any, cut: Any, left: Any, out: Any) -> None:
    """Write into `out` (T, N, A) the leaf to which row i comes in each tree (T, M) from each root."""
    for t in range(feature.shape[0]):
        for i in range(x.shape[0]):
            for a in range(out.shape[2]):
                node = a
                while feature[t, node] >= 0:
                    node = left[t, node] + (x[i, feature[t, node]] > cut[t, node])
                out[t, i, a] = node


@functools.cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """`grow`, `answer` or `descend` in machine code (seconds the first time ever, then from numba's cache)."""
    from numba import njit

    return njit(cache=True)(loop)


class Trees(nn.Module):
    """T trees of at most M nodes with A roots as buffers; x (N, D) → (N, A) float64. At first every answer is `start`."""

    feature: Tensor
    cut: Tensor
    left: Tensor
    value: Tensor

    def __init__(self, trees: int, nodes: int, actions: int, start: float = 0.0) -> None:
        super().__init__()
        self.actions = actions
        self.register_buffer("feature", torch.full((trees, nodes), LEAF, dtype=torch.int32))
        self.register_buffer("left", torch.zeros((trees, nodes), dtype=torch.int32))
        self.register_buffer("cut", torch.zeros((trees, nodes), dtype=torch.float64))
        self.register_buffer("value", torch.full((trees, nodes), float(start), dtype=torch.float64))

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """feature, cut, left, value: the buffers themselves."""
        return tuple(buffer.numpy() for buffer in (self.feature, self.cut, self.left, self.value))

    def forward(self, x: Tensor) -> Tensor:
        out = np.empty((len(x), self.actions))
        compiled(answer)(x.double().numpy(), *self.arrays(), out)
        return torch.from_numpy(out)

    def fit(
        self, x: NDArray[np.float64], action: NDArray[np.int64], y: NDArray[np.float64], leaf: int, seed: int
    ) -> None:
        """Grow every tree anew from rows x (N, D), action (N,), y (N,): a function of them and the seed."""
        by_action = np.argsort(action, kind="stable")
        bounds = np.searchsorted(action[by_action], np.arange(self.actions + 1))
        dice = np.random.default_rng(seed)
        for tree in zip(*self.arrays()):
            compiled(grow)(x, y, by_action.copy(), bounds, leaf, dice, *tree)

    def leaves(self, x: NDArray[np.float64]) -> NDArray[np.int32]:
        """The leaves of rows (N, D) in each tree, under each root: (T, N, A)."""
        feature, cut, left, _ = self.arrays()
        out = np.empty((len(feature), len(x), self.actions), np.int32)
        compiled(descend)(x, feature, cut, left, out)
        return out

    def at(self, leaves: NDArray[np.int32]) -> NDArray[np.float64]:
        """What these leaves (T, N, A) answer: (N, A), to the last bit as `forward`."""
        out = np.zeros(leaves.shape[1:])
        for value, where in zip(self.value.numpy(), leaves):
            out += value[where]
        return out / len(leaves)

    def refresh(self, leaves: NDArray[np.int32], y: NDArray[np.float64]) -> None:
        """Put the means of targets y (N,) into their leaves (T, N), and leave the cuts as they are."""
        for value, where in zip(self.value.numpy(), leaves):
            count = np.bincount(where, minlength=len(value))
            total = np.bincount(where, y, minlength=len(value))
            value[count > 0] = total[count > 0] / count[count > 0]
