"""What strategies are worth on a flattened game: reach, best response, exploitability, value.

A strategy of both players is one float64 array (S,) indexed by sequence (`etude.games.parts.tree`). The loops over arrays
are compiled by numba once a run has enough to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from etude.games.parts.tree import Tree

WARM_UP = 200_000  # array elements a kernel visits in Python before it is worth compiling (about 0.3 s)


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Run an array loop as machine code once that pays: ``call(work, *arguments)`` with the elements it will visit.

    The first WARM_UP elements are visited in Python, with equal results to the last bit, so that a small game needs
    neither numba nor its compile time. Machine code is kept on disk: beside the source file, or in NUMBA_CACHE_DIR or
    the user's cache folder where that is read-only; with no writable place each process compiles anew.
    ``call.build()`` compiles now.
    """
    spent = 0

    @functools.cache
    def build() -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True)(kernel)
        except RuntimeError:  # no writable place for the cache
            return numba.njit(kernel)

    @functools.wraps(kernel)
    def call(work: int, *arguments: Any) -> Any:
        nonlocal spent
        spent += work
        return (kernel if spent <= WARM_UP else build())(*arguments)

    call.build = build  # type: ignore[attr-defined]
    return call


@compiled
def _reach(first, parent, strategy, reach):
    for i in range(len(parent)):
        for s in range(first[i], first[i + 1]):
            reach[s] = reach[parent[i]] * strategy[s]


@compiled
def _best_response(first, parent, row, column, weight, begin, end, low, high, reach, value, strategy):
    for s in range(low, high):
        for z in range(row[s], row[s + 1]):  # expectation over chance and the other player
            value[s] += weight[z] * reach[column[z]]
    for i in range(end - 1, begin - 1, -1):  # maximum over the player's own actions, the deepest sets first
        best = first[i]
        for s in range(first[i], first[i + 1]):
            strategy[s] = 0.0
            if value[s] > value[best]:
                best = s
        strategy[best] = 1.0
        value[parent[i]] += value[best]


def reach(tree: Tree, strategy: np.ndarray) -> np.ndarray:
    """π(s), the product of the acting player's own probabilities along each sequence; float64 (S,)."""
    filled = np.ones(tree.sequences[2])
    _reach(tree.size, tree.first, tree.parent, strategy, filled)
    return filled


def best_response(tree: Tree, strategy: np.ndarray, player: int) -> tuple[float, np.ndarray]:
    """Return (value, strategy) of an exact best response of `player` to the other's part of `strategy` (S,).

    Expectation over chance and the opponent, maximum over the player's actions *information set by information set*
    (the player does not see what is hidden). Ties go to the first action. The strategy returned is that of both: the
    player's part is pure, the other's is as given.
    """
    arrays = (tree.first, tree.parent, tree.row, tree.column, tree.weight)
    bounds = (*tree.sets[player : player + 2], *tree.sequences[player : player + 2])
    value, response = np.zeros(tree.sequences[2]), strategy.copy()
    _best_response(tree.size, *arrays, *bounds, reach(tree, strategy), value, response)
    return float(value[0 if player == 0 else -1]), response


def exploitability(tree: Tree, strategy: np.ndarray) -> float:
    """½ Σ_i max_{π'_i} u_i(π'_i, π_{−i}) = NashConv / 2: 0 exactly at a Nash equilibrium, in units of utility.

    The value of the game cancels in the sum, so this is the mean over the two seats of what a player loses, relative to
    the game's value, against a best response.
    """
    return 0.5 * (best_response(tree, strategy, 0)[0] + best_response(tree, strategy, 1)[0])


def expected_value(tree: Tree, strategy: np.ndarray) -> float:
    """What player 0 wins on average when both follow this strategy (S,)."""
    own = reach(tree, strategy)
    mine = slice(0, tree.row[tree.sequences[1]])
    owner = np.repeat(np.arange(tree.sequences[1]), np.diff(tree.row[: tree.sequences[1] + 1]))
    return float(np.sum(tree.weight[mine] * own[owner] * own[tree.column[mine]]))


def normalised(tree: Tree, weights: np.ndarray) -> np.ndarray:
    """The strategy (S,) in proportion to nonnegative `weights` (S,); uniform in a set whose weights are all 0."""
    sizes = np.diff(tree.first)
    strategy = np.ones(tree.sequences[2])
    if len(sizes):
        inner = weights[1:-1]
        total = np.repeat(np.add.reduceat(inner, tree.first[:-1] - 1), sizes)
        strategy[1:-1] = np.where(total > 0, inner / np.where(total > 0, total, 1.0), np.repeat(1 / sizes, sizes))
    return strategy


def uniform(tree: Tree) -> np.ndarray:
    """The strategy (S,) by which both players take each legal action with equal probability."""
    return normalised(tree, np.zeros(tree.sequences[2]))


def policy(tree: Tree, strategy: np.ndarray, player: int, label: str) -> dict[str, float]:
    """Action names and probabilities in one information set; KeyError if the game has no such set."""
    i = tree.numbers[player, label]
    return dict(zip(tree.actions[i], strategy[tree.first[i] : tree.first[i + 1]].tolist()))
