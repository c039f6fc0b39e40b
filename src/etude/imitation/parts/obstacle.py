"""A point that must pass an obstacle, on the left or on the right: the world in which an average is no answer

The point starts near (0, 0) and wants to get above y = 0.7. A disc of radius 0.12 round (0, 0.3) stands in its way.
An action is a displacement (dx, dy), shortened to length 0.2. The expert tosses a coin for its side and heads for the gate
there, so from the start two actions are right and their average, straight on, is a crash. Reward: 1 for passing, −1 for
touching the disc (on the way too, not only at the end of a step), 0 otherwise; both end the episode, 20 steps cut it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.recording import Policy, Recording
from etude.blocks.acting.worlds import Transition
from etude.core.randomness import fold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CENTRE, RADIUS, FINISH, SPEED, LIMIT = np.array([0.0, 0.3]), 0.12, 0.7, 0.2, 20
START = np.array([[-0.01, -0.02], [0.01, 0.02]])
"""Smallest and largest x, y of a start."""
GATE = np.array([0.3, 0.3])
"""Where the expert passes on the right; on the left it is (−0.3, 0.3)."""


class Obstacle:
    """n points stepped together, each through one episode; one that has ended stays where it is."""

    size, actions, limit = 2, 2, LIMIT

    def __init__(self, count: int, seed: int, purpose: str = "training", rank: int = 0) -> None:
        dice = np.random.default_rng(fold(seed, 0, rank, purpose))
        self.observation: NDArray[np.float32] = dice.uniform(START[0], START[1], (count, 2)).astype(np.float32)
        """(n, 2): x, y"""
        self._over = np.zeros(count, bool)
        self._elapsed = 0

    def step(self, action: NDArray[Any]) -> Transition:
        """Displace every point by `action` (n, 2)."""
        before = self.observation
        move = shortened(np.asarray(action, np.float32))
        crashed = touches(before, before + move)
        passed = (before[:, 1] + move[:, 1] > FINISH) & ~crashed
        reached = np.where(self._over[:, None], before, before + move)
        self._elapsed += 1
        ended = crashed | passed
        truncated = ~ended & (self._elapsed >= LIMIT)
        self._over = self._over | ended | truncated
        self.observation = reached
        reward = passed.astype(np.float32) - crashed
        return Transition(before, action, reward, reached, ended, truncated, np.arange(len(before)))


def shortened(move: NDArray[np.float32]) -> NDArray[np.float32]:
    """Displacements (n, 2) of at most length 0.2."""
    length = np.linalg.norm(move, axis=1, keepdims=True)
    return move * np.minimum(1.0, SPEED / np.maximum(length, 1e-12)).astype(np.float32)


def touches(start: NDArray[Any], end: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the way from `start` to `end`, (n, 2) each, comes nearer to the centre than the radius: (n,)."""
    way, back = end - start, CENTRE - start
    along = np.clip((way * back).sum(1) / np.maximum((way * way).sum(1), 1e-12), 0.0, 1.0)
    return np.linalg.norm(start + along[:, None] * way - CENTRE, axis=1) < RADIUS


def towards(state: NDArray[np.float32], side: NDArray[np.float64]) -> NDArray[np.float64]:
    """Displacements (n, 2) from `state` (n, 2) to the gate on `side` (n,), −1 or 1, and straight on behind it."""
    aim = np.stack([side * GATE[0], np.full(len(state), GATE[1])], 1) - state
    aim[state[:, 1] > 0.25] = 0.0, 1.0
    return SPEED * aim / np.linalg.norm(aim, axis=1, keepdims=True)


def two_ways(seed: int, purpose: str = "expert") -> Policy:
    """The expert for one set of episodes: every point keeps to the side of its coin, with a hand that shakes a little."""
    dice = np.random.default_rng(fold(seed, 0, 0, purpose))
    side = np.zeros(0)

    def act(state: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal side
        if not len(side):  # half of them go each way
            side = dice.permutation(np.arange(len(state)) % 2 * 2.0 - 1.0)
        move = towards(state, side)
        return (move + dice.normal(0.0, 0.01, move.shape)).astype(np.float32)

    return act


def nearer(state: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the expert says of a state whose coin it does not know: to the side on which the point is."""
    return towards(state, np.where(state[:, 0] < 0, -1.0, 1.0)).astype(np.float32)


def ways(recording: Recording) -> list[NDArray[np.float32]]:
    """The points (T + 1, 2) of each episode, with the one that its last action reached."""
    bounds = np.append(recording.first, len(recording))
    last = recording.observations + shortened(recording.actions)
    return [np.vstack([recording.observations[a:b], last[b - 1 : b]]) for a, b in pairwise(bounds)]


def outcome(recording: Recording) -> dict[str, float]:
    """Shares of the episodes: those that crashed, and those that passed on the side that fewer took."""
    returns, sides = recording.returns, np.array([way[-1, 0] for way in ways(recording)])
    passed = returns > 0
    left, right = float((passed & (sides < 0)).mean()), float((passed & (sides > 0)).mean())
    return {"crash_share": float((returns < 0).mean()), "rarer_side_share": min(left, right)}


def picture(recordings: Sequence[tuple[str, Recording]], shown: int = 40) -> Figure:
    """At most `shown` episodes of each recording, side by side, under its name; a crash ends in a cross."""
    from matplotlib.figure import Figure

    from etude.blocks.pictures.plots import INK, PALETTE, PAPER, RULE, SOFT, WIDTH

    figure = Figure(figsize=(WIDTH, 0.72 * WIDTH), dpi=160, facecolor=PAPER, layout="constrained")
    for axes, (name, recording) in zip(figure.subplots(1, len(recordings), squeeze=False)[0], recordings):
        angle = np.linspace(0, 2 * np.pi, 90)
        axes.fill(CENTRE[0] + RADIUS * np.cos(angle), CENTRE[1] + RADIUS * np.sin(angle), color=INK, linewidth=0)
        axes.axhline(FINISH, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        for way, total in list(zip(ways(recording), recording.returns))[:shown]:
            colour = PALETTE[1] if total <= 0 else PALETTE[0]
            axes.plot(way[:, 0], way[:, 1], color=colour, linewidth=1.0, alpha=0.6)
            if total < 0:
                axes.plot(*way[-1], "x", color=colour, markersize=5)
        axes.set(xlim=(-0.55, 0.55), ylim=(-0.1, 1.0), aspect="equal", xticks=[], yticks=[], facecolor=PAPER)
        axes.spines[:].set_color(RULE)
        axes.set_title(name, fontsize=9, color=INK, parse_math=False)
    return figure
