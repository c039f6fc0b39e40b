"""Fictitious play: both players answer the other's average strategy by a best response, and average these

Paper: Brown, "Iterative Solution of Games by Fictitious Play", 1951; Robinson, "An Iterative Method of Solving a Game", 1951 (it
    converges where the game is zero-sum); Heinrich, Lanctot, Silver, "Fictitious Self-Play in Extensive-Form Games", ICML
    2015 (XFP: the average of strategies in a game with moves). The notes name it in their section 11.4.4.

Equation: π_i(s) is the product of player i's own probabilities along a sequence s of its actions. b^t is a best response to the
    other player's average strategy before t. Strategies are averaged as plans drawn once before the game, which is by π:
        X_i^T(s) = w_0 π_i^0(s) + Σ_{t ≤ T} w_t π_i(b_i^t)(s),      σ̄_i(I, a) = X_i(I, a) / Σ_b X_i(I, b)
    with w_t = 1 (Brown: step 1/(T + 1)), or w_t = t (the later ones count more). σ^0 is uniform, w_0 = 1.
    Exploitability ½ Σ_i max_{π'_i} u_i(π'_i, σ̄_{−i}) falls to 0.

Algorithm:
    1. X ← π of the uniform strategy
    2. for t = 1 … T:
    3.     σ̄ ← X, normalised in each information set
    4.     for each player i: b_i ← an exact best response to σ̄_{−i}, by its information sets, the deepest first
    5.     X_i(s) ← X_i(s) + w_t π_i(b_i)(s) for all sequences s of i
    6. the answer is σ̄; its exploitability by exact best responses

Differences:
    - The game is flattened once into its sequence form (`etude.games.parts.tree`), in which line 5 is a sum of arrays. It is
      XFP's mixture of the two strategies with the step α = w_t / Σ_{k ≤ t} w_k, not written as a quotient in each set.
    - Averaging probabilities in each information set, without π, is another thing and does not converge (a control below).
    - Ties go to the first action, and in sets that the opponent never allows all actions tie. OpenSpiel rounds otherwise: the
      traces are equal where no tie is met (Leduc poker), and part in Kuhn poker after a few iterations.
    - `--alternating`: the second player answers the first's new average. Both at once is Brown's and XFP's way.
    - Training draws nothing: chance is summed over. The seed only deals the hands that are played at the end.

Expect: CPU 1 s → Kuhn exploitability 0.0231 after 100 iterations, 0.0070 after 1,000 (CFR: 0.00094), value −0.0556; Leduc
    0.398 after 50.

Command: `etude run games/fictitious_play`, then `etude sample games/fictitious_play`. Your own game (the seven functions of
    `etude.games.parts.rules.Game`): `etude run games/fictitious_play --game path/to/my_game.py:Name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
from etude.games.parts.showing import curve_figure, deal, strategy_figure, strategy_table
from etude.games.parts.strategies import best_response, expected_value, exploitability, normalised, reach, uniform
from etude.games.parts.tree import Tree, flatten


@dataclass(frozen=True)
class Config:
    game: str = "kuhn"
    """kuhn, leduc, liars_dice, or a game of your own as path/to/file.py:Name (the file is run)."""
    averaging: Literal["uniform", "linear"] = "uniform"
    """Weight of the best response of iteration t in the average: 1, or t."""
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
    "tiny": Config(iterations=50, hands=200),
    "default": Config(),
    "leduc": Config(game="leduc", iterations=50),
    "leduc_linear": Config(game="leduc", averaging="linear", alternating=True, iterations=5000),
}

SETTINGS = {
    "game": "leduc",
    "limit": Idle("only refuses larger games"),
}

METRICS = answers.METRICS

EXPERIMENTS = ()


def mix(tree: Tree, average: np.ndarray, response: np.ndarray, share: float) -> None:
    """Line 5, in place: add `share` times π of a strategy (S,) to the sums of π (S,)."""
    average += share * reach(tree, response)


def answer(tree: Tree, average: np.ndarray, alternating: bool, share: float) -> np.ndarray:
    """Lines 3-5, in place in `average`, the sums X (S,); returns the best responses of both players (S,)."""
    owner = np.arange(tree.sequences[2]) >= tree.sequences[1]  # of each sequence
    before, both = normalised(tree, average), np.empty(tree.sequences[2])
    for player in (0, 1):
        own = owner == player
        both[own] = best_response(tree, before, player)[1][own]
        if alternating and player == 0:
            ahead = average.copy()
            mix(tree, ahead, np.where(own, both, before), share)
            before = np.where(own, normalised(tree, ahead), before)
    mix(tree, average, both, share)
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
        share = float(step + 1) if config.averaging == "linear" else 1.0
        held.strategy = answer(tree, held.average, config.alternating, share)  # lines 3-5
        if step + 1 in due:  # line 6
            average = normalised(tree, held.average)
            now, last = exploitability(tree, average), exploitability(tree, held.strategy)
            seen.curve.append([float(step + 1), now, last])
            seen.found = {"exploitability": now, "last_exploitability": last, "value": expected_value(tree, average)}
            if config.hands and step + 1 == config.iterations:
                rng = np.random.default_rng(fold(run.seed, step, 0, "hands"))
                won = np.array([deal(game, tree, average, rng)[1] for _ in range(config.hands)])
                error = float(won.std() / np.sqrt(len(won)))
                seen.found |= {"played_value": float(won.mean()), "played_error": error}
            run.log(**seen.found)
    average = normalised(tree, held.average)
    run.artifact("first_moves", strategy_figure(tree, average), "What the players do, by what they know.")
    run.artifact("curve", curve_figure(np.array(seen.curve)), "Exploitability by iteration, both axes logarithmic.")
    caption = "Probability of each action, by what the player knows; reach: its own probability of playing up to there."
    run.artifact("strategy", strategy_table(tree, average), caption)
    return seen.found


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Deal hands by the average strategy, move by move, and show the strategy."""
    return answers.sample(loaded, options, folder)
