"""CFR and CFR+: two regret matchers play themselves to a Nash equilibrium of a hidden-information game

Paper: Zinkevich, Johanson, Bowling, Piccione, "Regret Minimization in Games with Incomplete Information", NIPS 2007;
    CFR+: Tammelin, "Solving Large Imperfect Information Games Using CFR+", 2014, arXiv:1407.5042. Section 11.4.2 of
    the notes (Nash equilibrium, exploitability) and the solver that section 11.4.4 names.

Equation: with π_i(I) the product of player i's own action probabilities up to information set I, and v(I, a) the *counterfactual*
    value of action a: the sum over the histories of I of what the others and chance contribute to reaching them, times what
    player i then wins on average (own probabilities before I left out; those after it as σ plays),
        R^T(I, a) = Σ_t v^t(I, a) − Σ_b σ^t(I, b) v^t(I, b)                                     (eq. 7 of the paper)
        σ^{T+1}(I, a) = R⁺(I, a) / Σ_b R⁺(I, b), uniform where no regret is positive;  R⁺ = max(R, 0)        (eq. 8)
        σ̄(I, a) = Σ_t w_t π_i^t(I) σ^t(I, a) / Σ_t w_t π_i^t(I)                                          (eq. 4)
    CFR: w_t = 1. CFR+: R is replaced by R⁺ after each update, and w_t = max(t − delay, 0).
    Exploitability ½ Σ_i max_{π'_i} u_i(π'_i, σ̄_{−i}) ≤ ½ Σ_i R_i^T / T, so it falls at least like 1/√T.

Algorithm:
    1. σ uniform, R = 0
    2. for t = 1 … T, for each player i in turn:
    3.     v(s) ← Σ over the ends of the game whose last own sequence is s: chance · utility · π_{−i}
    4.     for each information set I of i, the deepest first:
    5.         V ← Σ_a σ(I, a) v(I, a);  R(I, a) ← R(I, a) + v(I, a) − V;  CFR+: R ← max(R, 0)
    6.         add V to v of the sequence that leads to I
    7.     for each I, the shallowest first:
    8.         average(I, a) ← average(I, a) + w_t π_i(I) σ(I, a)
    9.         σ(I, ·) ← regret matching of R(I, ·);  π_i(I, a) ← π_i of what leads to I, times σ(I, a)
    10. the answer is the average strategy; its exploitability is measured by exact best responses

Differences:
    - Players update in turn, the second against the first's new strategy, as CFR+ and OpenSpiel do; the paper updates both
      at once (--no-alternating). In turn converges faster and keeps the average's guarantee.
    - The game is flattened once into sequence form (`etude.blocks.games`), so one update is a sweep over two arrays; summing
      chance and opponent out first gives the same regrets as the paper's recursion over histories.
    - The *average* strategy is the answer; the last one (`last_exploitability`) need not converge.
    - Notes 11.4.2 (erratum E141): an equilibrium does not "ensure you will not lose": it ensures at least the game's
      value, averaged over the seats 0. The first player of Kuhn poker loses 1/18 a hand at every equilibrium. Hence
      exploitability is measured relative to that value.
    - The regret bound ½ Σ R_i / T is an upper bound, not the exploitability, and is not reported as such.

Expect: CPU 1 s → Kuhn exploitability 0.00094, value −0.0556 (−1/18); Leduc 1 s → 0.0134 with CFR+ in 100 iterations.

Command: `etude run games/cfr --game leduc --variant cfr_plus --iterations 1000`, then `etude sample games/cfr`; a game of
    your own: `--game path/to/my_game.py:Name` (the seven functions of `etude.blocks.games.Game`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from etude.blocks.games import (
    CHANCE,
    OVER,
    Game,
    Tree,
    compiled,
    expected_value,
    exploitability,
    flatten,
    load_game,
    normalised,
    policy,
    reach,
    table,
    uniform,
)
from etude.catalog import Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    game: str = "kuhn"
    """kuhn, leduc, liars_dice, or a game of your own as path/to/file.py:Name."""
    variant: Literal["cfr", "cfr_plus"] = "cfr"
    """cfr (2007), or cfr_plus: regrets kept nonnegative and later strategies weighted more."""
    iterations: Count = 1000
    """Number of iterations; in each both players update."""
    alternating: bool = True
    """Players update in turn, the second against the first's new strategy; otherwise both at once."""
    delay: Whole = 0
    """Iterations left out of the average strategy at the start."""
    evaluations: Count = 10
    """Measurements of exploitability per factor of ten in iterations, evenly spaced on a logarithmic axis."""
    limit: Count = 10_000_000
    """Refuse a game with more histories than this."""


PRESETS = {
    "tiny": Config(iterations=50),  # 1 s → exploitability 0.017
    "default": Config(),  # 1 s → exploitability 0.00094
    "leduc": Config(game="leduc", iterations=50),  # 1 s → exploitability 0.189
    "leduc_plus": Config(game="leduc", variant="cfr_plus", iterations=10_000),  # 3 s → exploitability < 0.001
    "liars_dice": Config(game="liars_dice", variant="cfr_plus", iterations=1000),
}

EXPERIMENTS = (
    Experiment("kuhn", preset="default", metric="exploitability", bar=0.001, better="lower", seeds=(0,)),
)


def tables(tree: Tree) -> Box:
    """Line 1: what CFR keeps, float64 arrays by sequence. No regret yet, everybody plays uniformly."""
    size, strategy = tree.sequences[2], uniform(tree)
    return Box(regret=np.zeros(size), average=np.zeros(size), strategy=strategy, reach=reach(tree, strategy))


@compiled
def _iterate(
    first, parent, row, column, weight, sets, sequences, R, average, strategy, reach, done, count, plus, delay, alternating
):
    v, old = np.zeros(len(reach)), reach.copy()
    theirs = reach if alternating else old
    for t in range(done + 1, done + count + 1):
        share = max(t - delay, 0) if plus else min(max(t - delay, 0), 1)
        if not alternating:
            old[:] = reach
        for me in range(2):
            for s in range(sequences[me], sequences[me + 1]):  # line 3
                worth = 0.0
                for z in range(row[s], row[s + 1]):
                    worth += weight[z] * theirs[column[z]]
                v[s] = worth
            for i in range(sets[me + 1] - 1, sets[me] - 1, -1):  # lines 4-6
                V = 0.0
                for s in range(first[i], first[i + 1]):
                    V += strategy[s] * v[s]
                for s in range(first[i], first[i + 1]):
                    R[s] += v[s] - V
                    if plus:
                        R[s] = max(R[s], 0.0)
                v[parent[i]] += V
            for i in range(sets[me], sets[me + 1]):  # lines 7-9
                positive = 0.0
                for s in range(first[i], first[i + 1]):
                    average[s] += share * reach[s]
                    positive += max(R[s], 0.0)
                for s in range(first[i], first[i + 1]):
                    strategy[s] = max(R[s], 0.0) / positive if positive > 0.0 else 1.0 / (first[i + 1] - first[i])
                    reach[s] = reach[parent[i]] * strategy[s]


def iterate(
    tree: Tree, held: Box, done: int, count: int = 1, variant: str = "cfr", delay: int = 0, alternating: bool = True
) -> None:
    """Iterations ``done + 1 … done + count`` of CFR or CFR+, in place in `held` (lines 2-9)."""
    arrays = (tree.first, tree.parent, tree.row, tree.column, tree.weight, tree.sets, tree.sequences)
    kept = (held.regret, held.average, held.strategy, held.reach)
    _iterate(*arrays, *kept, done, count, variant == "cfr_plus", delay, alternating)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network: the strategy is a table."""
    return {}
