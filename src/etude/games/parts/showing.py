"""Strategies to be read: as a table, as a picture, and as hands that are dealt by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, SOFT
from etude.games.parts.rules import CHANCE, OVER, Game
from etude.games.parts.strategies import policy, reach
from etude.games.parts.tree import Tree

MOST_COLUMNS = 16  # actions of a game whose table has a column for each


def table(tree: Tree, strategy: np.ndarray) -> list[dict[str, Any]]:
    """The strategy as rows ``{"player", "knows", "reach", "plays": {action: probability}}``, JSON-able.

    `reach` is the player's own probability of playing up to there. Sets of a player come in the order of the tree.
    """
    own = reach(tree, strategy)
    rows = []
    for i, knows in enumerate(tree.labels):
        player = int(i >= tree.sets[1])
        plays = policy(tree, strategy, player, knows)
        rows.append({"player": player, "knows": knows, "reach": float(own[tree.parent[i]]), "plays": plays})
    return rows


@dataclass(frozen=True)
class Move:
    """One move of a hand: who, what the player knew ("" for chance), the choice, and the probabilities it came from."""

    player: int
    knows: str
    choice: str
    shares: dict[str, float]


def deal(game: Game, tree: Tree, strategy: np.ndarray, rng: np.random.Generator) -> tuple[list[Move], float]:
    """Play one hand by `strategy` (S,); return its moves and what player 0 wins."""
    state, moves = game.initial(), []
    while (player := game.player(state)) != OVER:
        if player == CHANCE:
            outcomes, shares = zip(*game.chances(state))
            knows = ""
        else:
            knows, outcomes = str(game.information(state)), tuple(game.actions(state))
            shares = tuple(policy(tree, strategy, player, knows).values())
        pick = min(int(np.searchsorted(np.cumsum(shares), rng.random(), side="right")), len(shares) - 1)
        moves.append(Move(player, knows, str(outcomes[pick]), dict(zip(map(str, outcomes), shares))))
        state = game.next(state, outcomes[pick])
    return moves, float(game.utility(state))


def hand_text(title: str, moves: list[Move], won: float) -> str:
    """A hand as a table: who moved, what that player knew, what it did, and the probabilities it drew from."""
    names = {CHANCE: "chance", 0: "player 0", 1: "player 1"}
    knows, choice = (max((len(getattr(move, part)) for move in moves), default=0) for part in ("knows", "choice"))
    lines = [title]
    for move in moves:
        shares = "  ".join(f"{name} {share:.2f}" for name, share in move.shares.items() if move.player != CHANCE)
        line = f"  {names[move.player]:<8}  {move.knows:<{knows}}  → {move.choice:<{choice}}  {shares}"
        lines.append(line.rstrip())
    end = "nobody wins" if won == 0 else f"player {int(won < 0)} wins {abs(won):g}"
    return "\n".join([*lines, f"  {end}", ""])


def strategy_text(tree: Tree, strategy: np.ndarray, most: int) -> str:
    """The strategy as a table of at most `most` information sets, the first decisions first."""
    rows, order = table(tree, strategy), _by_depth(tree)
    wide = max((len(rows[i]["knows"]) for i in order[:most]), default=5)
    lines = [f"{'player':<6}  {'knows':<{wide}}  reach  plays"]
    for i in order[:most]:
        plays = "  ".join(f"{name} {share:.3f}" for name, share in rows[i]["plays"].items())
        lines.append(f"{rows[i]['player']:<6}  {rows[i]['knows']:<{wide}}  {rows[i]['reach']:.3f}  {plays}")
    left = len(rows) - most
    return "\n".join([*lines, *([f"… and {left:,} more information sets"] if left > 0 else []), ""])


def strategy_table(tree: Tree, strategy: np.ndarray) -> dict[str, list[Any]]:
    """The strategy as ``{"columns", "rows"}``, a column an action, the first decisions first.

    Where an action is not legal there is None. A game of more than `MOST_COLUMNS` actions has one column of text instead.
    """
    rows, names = table(tree, strategy), list(dict.fromkeys(name for known in tree.actions for name in known))
    chosen = [rows[i] for i in _by_depth(tree)]
    about = [[row["player"], row["knows"], row["reach"]] for row in chosen]
    if len(names) > MOST_COLUMNS:
        names = ["plays"]
        plays = [[", ".join(f"{name} {share:.3f}" for name, share in row["plays"].items())] for row in chosen]
    else:
        plays = [[row["plays"].get(name) for name in names] for row in chosen]
    return {"columns": ["player", "knows", "reach", *names], "rows": [one + two for one, two in zip(about, plays)]}


def strategy_figure(tree: Tree, strategy: np.ndarray, most: int = 12) -> Any:
    """A matplotlib Figure: for each player a bar for each of its first `most` information sets, divided by action."""
    from matplotlib.colors import to_rgb

    order, rows = _by_depth(tree), table(tree, strategy)
    chosen = [[i for i in order if rows[i]["player"] == player][:most] for player in (0, 1)]
    names = list(dict.fromkeys(name for i in (*chosen[0], *chosen[1]) for name in rows[i]["plays"]))
    figure, both = panels(2, width=9.6, height=1.3 + 0.26 * max(map(len, chosen)))
    for player, axes in enumerate(both):
        mine = [rows[i] for i in chosen[player]]
        left = np.zeros(len(mine))
        for k, name in enumerate(names):
            width = np.array([row["plays"].get(name, 0.0) for row in mine])
            pale = k // len(PALETTE) % 2  # after the strong colours their pale sisters
            colour = [channel + pale * 0.6 * (1 - channel) for channel in to_rgb(PALETTE[k % len(PALETTE)])]
            axes.barh(range(len(mine)), width, left=left, color=colour, label=name.replace("$", r"\$"))
            left += width
        axes.set_yticks(range(len(mine)), [row["knows"] for row in mine], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        count = sum(row["player"] == player for row in rows)
        shown = f"the first {len(mine)} of {count:,} information sets" if count > len(mine) else "all information sets"
        label(axes, f"player {player}: {shown}", "probability", "what the player knows" if player == 0 else "")
    handles, labels = both[0].get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 7), **style)
    return figure


def curve_figure(curve: np.ndarray) -> Any:
    """A matplotlib Figure of `curve` (N, 3): iteration, exploitability of the average and of the last strategy."""
    figure, (axes,) = panels(height=3.2)
    t, average, last = np.maximum(curve, 1e-17).T  # an equilibrium found exactly has a place on a logarithmic axis too
    axes.loglog(t, last, color=PALETTE[1], linewidth=1.2, label="last strategy")
    axes.loglog(t, average, ".-", color=PALETTE[0], linewidth=1.8, label="average strategy")
    axes.loglog(t, average[0] / np.sqrt(t), ":", color=SOFT, label=r"slope of $1/\sqrt{T}$")
    label(axes, "Exploitability of the average and of the last strategy", "iterations T", "exploitability")
    legend(axes)
    return figure


def _by_depth(tree: Tree) -> list[int]:
    """Information sets by how many moves of its own a player has behind it, then in the order of the tree."""
    depth = np.zeros(tree.sets[2], int)
    owner = np.searchsorted(tree.first, tree.parent, side="right") - 1  # of the roots: outside the player's sets
    for i, before in enumerate(owner):
        if 0 <= before < tree.sets[2]:
            depth[i] = depth[before] + 1
    return np.argsort(depth, kind="stable").tolist()
