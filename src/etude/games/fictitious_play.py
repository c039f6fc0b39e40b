"""Fictitious play: best responses to the other's average strategy, averaged

Paper: Brown, "Iterative Solution of Games by Fictitious Play", 1951; Robinson, "An Iterative Method of Solving a Game", 1951 (it
    converges where the game is zero-sum); Heinrich, Lanctot, Silver, "Fictitious Self-Play in Extensive-Form Games", ICML
    2015 (XFP: the average of strategies in a game with moves). The notes name it in their section 11.4.4.

Equation: π_i(s) is the product of player i's own probabilities along a sequence s of its actions. b^t is a best response to the
    other player's average strategy before t. Strategies are averaged as plans drawn once before the game, which is by π:
        X_i^T(s) = π_i^0(s) + Σ_{t ≤ T} π_i(b_i^t)(s),      σ̄_i(I, a) = X_i(I, a) / Σ_b X_i(I, b),      σ^0 uniform
    so the newest answer has the weight 1/(T + 1). Exploitability ½ Σ_i max_{π'_i} u_i(π'_i, σ̄_{−i}) falls to 0.

Algorithm:
    1. X ← π of the uniform strategy
    2. for t = 1 … T:
    3.     σ̄ ← X, normalised in each information set
    4.     for each player i: b_i ← an exact best response to σ̄_{−i}, by its information sets, the deepest first
    5.     X_i(s) ← X_i(s) + π_i(b_i)(s) for all sequences s of i
    6. the answer is σ̄; its exploitability by exact best responses

Differences:
    - The game is flattened once into its sequence form (`etude.games.parts.tree`), in which line 5 is a sum of arrays. It is
      XFP's mixture of the two strategies with the step 1/(T + 1), not written as a quotient in each set.
    - Averaging the probabilities in each information set, without π, is another thing: in Leduc poker it stays at 0.058.
    - Ties go to the first action; where the opponent's average never leads, all actions tie. OpenSpiel rounds otherwise: the
      traces are equal in Leduc poker, and part in Kuhn poker, full of ties, after a few iterations.
    - `--alternating`: the second player answers the first's new average, which falls three to six times as low. Both at once is
      Brown's and XFP's way.
    - The average is the answer. The last best responses are pure and far from an equilibrium (`last_exploitability`).
    - Training draws nothing: chance is summed over. The seed only deals the hands that are played at the end.

Expect: CPU 4 s in all → Kuhn exploitability 0.0231 after 100 iterations, 0.0070 after 1,000 (in turn 0.0012; CFR 0.00094), value
    −0.0556; Leduc 0.398 after 50, in turn 0.0076 after 5,000; liar's dice 0.106 after 300 (6 s).

Command: `etude run games/fictitious_play`, then `etude sample games/fictitious_play`. Your own game (the seven functions of
    `etude.games.parts.rules.Game`): `etude run games/fictitious_play --game path/to/my_game.py:Name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from torch import nn

from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Range
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.games.parts import answers
from etude.games.parts.answers import Sample, schedule
from etude.games.parts.rules import load_game
from etude.games.parts.strategies import best_response, expected_value, exploitability, normalised, reach, uniform
from etude.games.parts.tree import Tree, flatten


@dataclass(frozen=True)
class Config:
    game: str = "kuhn"
    """kuhn, leduc, liars_dice, or a game of your own as path/to/file.py:Name (the file is run)."""
    alternating: bool = False
    """The second player answers the first's new average; otherwise both answer at once."""
    iterations: Annotated[int, Range(1, 10**9)] = 1000
    """Number of iterations; in each both players answer."""
    evaluations: Annotated[int, Range(1, 10_000)] = 10
    """Measurements of exploitability per factor of ten in iterations, even on a logarithmic axis."""
    hands: Annotated[int, Range(0, 1_000_000)] = 5000
    """Hands dealt at the end by the average strategy, to see its value in play (0: none)."""
    limit: Count = 10_000_000
    """Refuse a game with more histories than this."""


PRESETS = {
    "tiny": Config(iterations=50, hands=200),  # 4 s → exploitability 0.038
    "default": Config(),  # 4 s → exploitability 0.0070, value −0.0556
    "leduc": Config(game="leduc", iterations=50),  # 4 s → exploitability 0.398
    "leduc_in_turn": Config(game="leduc", alternating=True, iterations=5000),  # 4 s → exploitability 0.0076
    "liars_dice": Config(game="liars_dice", iterations=300),  # 6 s → exploitability 0.106
}

SETTINGS = {
    "game": "leduc",
    "limit": Idle("only refuses larger games"),
}

METRICS = {
    "exploitability": "mean over players of what the average strategy loses to a best response; 0 at an equilibrium",
    "last_exploitability": "the same of the last best responses, which are pure",
    "value": "expected winnings of player 0 if both play the average strategy",
    "played_value": "mean winnings of player 0 in hands that were dealt and played",
    "played_error": "standard error of that mean",
}

TOLD = "Training draws nothing: one seed says all."
LAST = Control("the last best responses instead of the average", metric="last_exploitability")
LOCAL = Control("probabilities averaged in each set, not plans", swap={"mix": "etude.games.parts.nulls.behaviour"})

EXPERIMENTS = (
    Experiment(
        "kuhn", preset="default", metric="exploitability", bar=0.0075, better="lower", seeds=(0,), notes=TOLD,
        published="0.0067 (OpenSpiel 2.0.2, other ties)", controls=(LAST,),
    ),
    Experiment(
        "kuhn_value", preset="default", metric="value", bar=-0.0555556, better="near", tolerance=2e-4, seeds=(0,),
        published="−1/18 = −0.055556", notes=TOLD,
        controls=(Control("one iteration: half uniform play", flags={"iterations": 1}),),
    ),
    Experiment(
        "leduc_50", preset="leduc", metric="exploitability", bar=0.3981390704, better="near", tolerance=1e-9, seeds=(0,),
        published="0.3981390704 (OpenSpiel 2.0.2, 50 iterations)", notes=TOLD,
        controls=(LOCAL, Control("the second answers the first's new average", flags={"alternating": True})),
    ),
    Experiment(
        "leduc_in_turn", preset="leduc_in_turn", metric="exploitability", bar=0.008, better="lower", seeds=(0,), notes=TOLD,
        controls=(LAST, LOCAL, Control("both answer at once", flags={"alternating": False})),
    ),
)  # fmt: skip


def mix(tree: Tree, average: np.ndarray, response: np.ndarray) -> None:
    """Line 5, in place: add π of a strategy (S,) to the sums of π (S,)."""
    average += reach(tree, response)


def answer(tree: Tree, average: np.ndarray, alternating: bool = False) -> np.ndarray:
    """Lines 3-5, in place in `average`, the sums X (S,); returns the best responses of both players (S,)."""
    mine = np.arange(tree.sequences[2]) < tree.sequences[1]  # the sequences of player 0
    before = normalised(tree, average)
    first = best_response(tree, before, 0)[1]
    if alternating:
        ahead = average.copy()
        mix(tree, ahead, first)
        before = np.where(mine, normalised(tree, ahead), before)
    both = np.where(mine, first, best_response(tree, before, 1)[1])
    mix(tree, average, both)
    return both


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network: the strategy is a table."""
    return {}


@method("games/fictitious_play", paper="Brown 1951; ICML 2015", section="11.4.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    game = load_game(config.game)
    tree = flatten(game, config.limit)
    due = set(schedule(config.iterations, config.evaluations))
    start = uniform(tree)
    held = Box(average=reach(tree, start), strategy=start)  # line 1
    seen = Box(curve=[], fingerprint=tree.fingerprint, found={})
    run.say(
        f"{config.game}: {tree.histories:,} histories, {tree.sets[2]:,} information sets, {tree.sequences[2]:,} sequences"
    )
    run.describe(Spec(extra={"game": config.game, "histories": tree.histories, "information_sets": tree.sets[2]}))
    run.track(solution=held, seen=seen)
    if seen.fingerprint != tree.fingerprint:
        raise UserError(f"the game {config.game} has changed since this run began; start a new run")
    for step in run.steps(config.iterations):
        held.strategy = answer(tree, held.average, config.alternating)  # lines 3-5
        if step + 1 in due:  # line 6
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
