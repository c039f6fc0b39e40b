"""What a solver of games shows: when it measures, hands played at the end, pictures, what `etude sample` tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etude.core.config import Count, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.games.parts.rules import Game, load_game
from etude.games.parts.showing import curve_figure, deal, hand_text, strategy_figure, strategy_table, strategy_text
from etude.games.parts.strategies import expected_value, exploitability, normalised
from etude.games.parts.tree import Tree, flatten


def schedule(iterations: int, per_decade: int) -> list[int]:
    """The iterations after which exploitability is measured: even on a logarithmic axis, and the last."""
    powers = range(int(per_decade * math.log10(iterations)) + 1)
    return sorted({min(round(10 ** (k / per_decade)), iterations) for k in powers} | {iterations})


def played(game: Game, tree: Tree, strategy: np.ndarray, hands: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean winnings of player 0 in so many hands dealt by `strategy` (S,), and their standard error."""
    won = np.array([deal(game, tree, strategy, rng)[1] for _ in range(hands)])
    return {"played_value": float(won.mean()), "played_error": float(won.std() / np.sqrt(len(won)))}


def show(run: Run, tree: Tree, average: np.ndarray, curve: list[list[float]]) -> None:
    """The artifacts of a run: what the players do, the curve (N, 3) of exploitability, and the whole strategy (S,)."""
    run.artifact("first_moves", strategy_figure(tree, average), "What the players do, by what they know.")
    run.artifact("curve", curve_figure(np.array(curve)), "Exploitability by iteration, both axes logarithmic.")
    caption = "Probability of each action, by what the player knows; reach: its own probability of playing up to there."
    run.artifact("strategy", strategy_table(tree, average), caption)


@dataclass(frozen=True)
class Sample:
    """Settings of `etude sample`."""

    count: Count = 5
    """Hands to deal."""
    seed: Whole = 0
    """Seed of the deal."""
    rows: Whole = 24
    """Information sets to show (the first decisions of either player come first)."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Deal hands by the average strategy, move by move, and show the strategy."""
    game = load_game(loaded.config.game)
    tree = flatten(game, loaded.config.limit)
    if loaded.state["seen"]["fingerprint"] != tree.fingerprint:
        raise UserError(f"the game {loaded.config.game} has changed since this run began; start a new run")
    strategy = normalised(tree, np.asarray(loaded.state["solution"]["average"]))
    strategy_figure(tree, strategy).savefig(folder / "strategy.png", dpi=144, bbox_inches="tight")
    rng = np.random.default_rng(options.seed)
    hands = [hand_text(f"hand {n + 1}", *deal(game, tree, strategy, rng)) for n in range(options.count)]
    summary = (
        f"exploitability {exploitability(tree, strategy):.6g}, value to player 0 {expected_value(tree, strategy):.6f}"
    )
    text = "\n".join([*hands, summary, "", strategy_text(tree, strategy, options.rows)])
    (folder / "hands.txt").write_text(text, encoding="utf-8")
    return text
