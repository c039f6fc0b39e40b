"""CFR and CFR+: two regret matchers play each other to a Nash equilibrium

Paper: Zinkevich, Johanson, Bowling, Piccione, "Regret Minimization in Games with Incomplete Information", NIPS 2007;
    CFR+: Tammelin, "Solving Large Imperfect Information Games Using CFR+", 2014, arXiv:1407.5042. Section 11.4.2 of
    the notes (Nash equilibrium, exploitability), and the solver that their section 11.4.4 names.

Equation: π_i(I) is the product of player i's own action probabilities on the way to information set I, and v(I, a) the
    *counterfactual* value of action a there: the sum over the histories h of I of π_{−i}(h), the probability with which
    chance and the opponent allow h, times what player i wins after h and a when both go on by σ. Then
        R^T(I, a) = Σ_{t ≤ T} v^t(I, a) − Σ_b σ^t(I, b) v^t(I, b)            counterfactual regret (Section 3)
        σ^{T+1}(I, a) = R⁺(I, a) / Σ_b R⁺(I, b),  R⁺ = max(R, 0)             regret matching; uniform if all R⁺ are 0
        σ̄(I, a) = Σ_t w_t π_i^t(I) σ^t(I, a) / Σ_t w_t π_i^t(I)              the average strategy: the answer
    CFR: w_t = 1. CFR+: R becomes R⁺ after every update, and w_t = max(t − delay, 0).
    Exploitability ½ Σ_i max_{π'_i} u_i(π'_i, σ̄_{−i}) is O(1/√T).

Algorithm:
    1. σ uniform, R = 0
    2. for t = 1 … T, for each player i in turn:
    3.     v(s) ← Σ over the ends of the game whose last own sequence is s: chance · utility to i · π_{−i}
    4.     for each information set I of i, the deepest first:
    5.         V ← Σ_a σ(I, a) v(I, a);  R(I, a) ← R(I, a) + v(I, a) − V;  CFR+: R ← max(R, 0)
    6.         add V to v of the sequence that leads to I
    7.     for each I, the shallowest first:
    8.         average(I, a) ← average(I, a) + w_t π_i(I) σ(I, a)
    9.         σ(I, ·) ← regret matching of R(I, ·);  π_i after (I, a) ← π_i(I) σ(I, a)
    10. σ̄ ← average, normalised in each information set; its exploitability by exact best responses

Differences:
    - The players update in turn, the second against the first's new strategy, as CFR+ and OpenSpiel do and as Burch,
      Moravčík, Schmid (arXiv:1810.11542) prove sound; Zinkevich et al. update both at once (`--no-alternating`).
    - The game is flattened once into its sequence form (`etude.games.parts.tree`). Summing chance and the opponent out of
      the ends (line 3) gives the regrets that the paper's recursion over histories gives, without the histories.
    - The *average* strategy is the answer. The last one need not converge; `last_exploitability` shows it.
    - E141 (notes 11.4.2): an equilibrium does not "ensure you will not lose"; it ensures the value of the game, which
      is 0 only when averaged over the seats. The first player of Kuhn poker loses 1/18 a hand at every equilibrium.
    - Training draws nothing: chance is summed over. The seed only deals the hands that are played at the end.
    - Exploitability is measured; the sum of regrets, which only bounds it from above, is never shown in its place.

Expect: CPU 1 s → Kuhn exploitability 0.00094 after 1,000 iterations, value −0.0556; Leduc 0.189 after 50, 6.5e-6 after
    10,000 of CFR+ (value −0.085606); liar's dice, 294,883 histories, 1.3e-4 after 1,000 of CFR+ (8 s in all).

Command: `etude run games/cfr --preset leduc_plus`, then `etude sample games/cfr`. Your own game (the seven functions of
    `etude.games.parts.rules.Game`): `etude run games/cfr --game path/to/my_game.py:Name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torch import nn

from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Range, Whole
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.games.parts import answers
from etude.games.parts.answers import Sample, schedule
from etude.games.parts.rules import load_game
from etude.games.parts.strategies import compiled, expected_value, exploitability, normalised, reach, uniform
from etude.games.parts.tree import Tree, flatten


@dataclass(frozen=True)
class Config:
    game: str = "kuhn"
    """kuhn, leduc, liars_dice, or a game of your own as path/to/file.py:Name (the file is run)."""
    variant: Literal["cfr", "cfr_plus"] = "cfr"
    """cfr (2007), or cfr_plus: regrets stay nonnegative and later strategies weigh more."""
    iterations: Annotated[int, Range(1, 10**9)] = 1000
    """Number of iterations; in each both players update."""
    alternating: bool = True
    """The players update in turn, the second against the first's new strategy; otherwise both at once."""
    delay: Whole = 0
    """Iterations at the start that are left out of the average strategy."""
    evaluations: Annotated[int, Range(1, 10_000)] = 10
    """Measurements of exploitability per factor of ten in iterations, even on a logarithmic axis."""
    hands: Annotated[int, Range(0, 1_000_000)] = 5000
    """Hands dealt at the end by the average strategy, to see its value in play (0: none)."""
    limit: Count = 10_000_000
    """Refuse a game with more histories than this."""


PRESETS = {
    "tiny": Config(iterations=50, hands=200),  # 1 s → exploitability 0.015
    "default": Config(),  # 1 s → exploitability 0.00094, value −0.0556
    "leduc": Config(game="leduc", iterations=50),  # 2 s → exploitability 0.189
    "leduc_plus": Config(game="leduc", variant="cfr_plus", iterations=10_000),  # 4 s → 6.5e-6, value −0.085606
    "liars_dice": Config(game="liars_dice", variant="cfr_plus"),  # 8 s → 1.3e-4, value −0.0271
}

SETTINGS = {
    "game": "leduc",
    "limit": Idle("only refuses larger games"),
}

LAST = Control("the last strategy instead of the average", metric="last_exploitability")
AT_ONCE = Control("both players update at once", flags={"alternating": False})
PLAIN = Control("plain CFR", flags={"variant": "cfr"})
TOLD = "Training draws nothing: one seed says all."
METRICS = {
    "exploitability": "mean over players of what the average strategy loses to a best response; 0 at an equilibrium",
    "last_exploitability": "the same of the last strategy, which need not converge",
    "value": "expected winnings of player 0 if both play the average strategy",
    "played_value": "mean winnings of player 0 in hands that were dealt and played",
    "played_error": "standard error of that mean",
}

EXPERIMENTS = (
    Experiment(
        "kuhn", preset="default", metric="exploitability", bar=0.001, better="lower", seeds=(0,), notes=TOLD,
        controls=(LAST, AT_ONCE),
    ),
    Experiment(
        "kuhn_value", preset="default", metric="value", bar=-0.0555556, better="near", tolerance=8e-5, seeds=(0,),
        published="−1/18 = −0.055556", notes=TOLD,
        controls=(Control("one iteration: uniform play", flags={"iterations": 1}),),
    ),
    Experiment(
        "leduc_50", preset="leduc", metric="exploitability", bar=0.189083466, better="near", tolerance=1e-9, seeds=(0,),
        published="0.189083466 (OpenSpiel 2.0.2, 50 iterations)", notes=TOLD, controls=(AT_ONCE,),
    ),
    Experiment(
        "leduc", preset="leduc_plus", metric="exploitability", bar=7.5e-6, better="lower", seeds=(0,), notes=TOLD,
        controls=(LAST, PLAIN),
    ),
    Experiment(
        "leduc_value", preset="leduc_plus", metric="value", bar=-0.085606, better="near", tolerance=1e-6, seeds=(0,),
        published="−0.085606", notes=TOLD, controls=(PLAIN,),
    ),
    Experiment(
        "liars_dice", preset="liars_dice", metric="exploitability", bar=1.5e-4, better="lower", seeds=(0,), notes=TOLD,
        controls=(LAST, PLAIN),
    ),
)  # fmt: skip


def tables(tree: Tree) -> Box:
    """Line 1: what CFR keeps, float64 arrays by sequence. No regret yet, everybody plays uniformly."""
    size, strategy = tree.sequences[2], uniform(tree)
    return Box(regret=np.zeros(size), average=np.zeros(size), strategy=strategy, reach=reach(tree, strategy))


@compiled
def _iterate(
    first, parent, row, column, weight, sets, sequences,
    R, average, strategy, reach, v, old, done, count, plus, delay, alternating,
):  # fmt: skip
    theirs = reach if alternating else old
    for t in range(done + 1, done + count + 1):
        share = max(t - delay, 0) if plus else min(max(t - delay, 0), 1)
        if not alternating:
            for s in range(len(reach)):
                old[s] = reach[s]
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
    scratch = (np.zeros_like(held.reach), np.zeros_like(held.reach))
    _iterate(count * tree.size, *arrays, *kept, *scratch, done, count, variant == "cfr_plus", delay, alternating)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network: the strategy is a table."""
    return {}


@method("games/cfr", paper="NIPS 2007; arXiv:1407.5042", section="11.4.2, 11.4.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.delay >= config.iterations:
        raise UserError(f"--delay {config.delay} leaves no iteration of {config.iterations} for the average strategy")
    game = load_game(config.game)
    tree = flatten(game, config.limit)
    due = set(schedule(config.iterations, config.evaluations))
    held = tables(tree)  # line 1
    seen = Box(curve=[], fingerprint=tree.fingerprint, found={})
    memory = (tree.nbytes + sum(part.nbytes for part in held.state_dict().values())) / tree.histories
    run.say(
        f"{config.game}: {tree.histories:,} histories, {tree.sets[2]:,} information sets,"
        f" {tree.sequences[2]:,} sequences; {memory:.0f} bytes a history"
    )
    run.describe(Spec(extra={"game": config.game, "histories": tree.histories, "information_sets": tree.sets[2]}))
    run.track(solution=held, seen=seen)
    if seen.fingerprint != tree.fingerprint:
        raise UserError(f"the game {config.game} has changed since this run began; start a new run")
    for step in run.steps(config.iterations):
        iterate(tree, held, step, 1, config.variant, config.delay, config.alternating)  # lines 2-9
        if step + 1 in due:  # line 10
            average = normalised(tree, held.average)
            now, last = exploitability(tree, average), exploitability(tree, held.strategy)
            seen.curve.append([float(step + 1), now, last])
            seen.found = {"exploitability": now, "last_exploitability": last, "value": expected_value(tree, average)}
            if config.hands and step + 1 == config.iterations:
                rng = np.random.default_rng(fold(run.seed, step, 0, "hands"))
                seen.found |= answers.played(game, tree, average, config.hands, rng)
            run.log(**seen.found)
    answers.show(run, tree, normalised(tree, held.average), seen.curve)
    return seen.found


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Deal hands by the average strategy, move by move, and show the strategy."""
    return answers.sample(loaded, options, folder)
