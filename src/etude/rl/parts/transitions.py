"""Transitions to learn from in batches: drawn from an environment, or every one that the tables of a world know, with its chance.

N rows of data, B backups of each, O outcomes of each, P points (states), D numbers observed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.environments import Environment
from etude.blocks.acting.episodes import Policy
from etude.blocks.acting.tables import Tables
from etude.blocks.acting.worlds import Worlds
from etude.core.randomness import fold

COPIES = 10
"""Worlds in which transitions are drawn."""


class Data(NamedTuple):
    """What a regression learns from. A row has one backup (action values), or one for each action (values of states)."""

    points: NDArray[np.float32]
    """(P, D): all states, or those that were seen; discrete ones are one-hot"""
    here: NDArray[np.int64]
    """(N,): places of s_i in `points`"""
    action: NDArray[np.int64]
    """(N,): which output is fitted; 0 for values"""
    reward: NDArray[np.float64]
    """(N B, O)"""
    terminated: NDArray[np.bool_]
    """(N B, O)"""
    probability: NDArray[np.float64]
    """(N B, O); 1 for what was observed"""
    there: NDArray[np.int64]
    """(N B, O): places of s' in `points`"""


def collect(
    kind: Environment, count: int, seed: int, share: float = 1.0, greedy: Policy | None = None
) -> tuple[NDArray[Any], ...]:
    """`count` transitions: state (N, D), action, reward, next state (N, D), terminated. A function of the seed and the policy.

    Each action is uniform with probability `share`, else greedy. No row pairs the end of an episode with the next beginning,
    and what a time limit cut is not terminated.
    """
    copies = min(COPIES, count)
    worlds, dice = Worlds.make(kind, copies, seed, "data"), np.random.default_rng(fold(seed, 0, 0, "actions"))
    rows = []
    while worlds.steps < count:
        action = dice.integers(worlds.actions, size=copies)
        if greedy is not None and share < 1:
            action = np.where(dice.random(copies) < share, action, greedy(worlds.observation))
        rows.append(worlds.step(action))
    worlds.close()
    fields = ("state", "action", "reward", "next_state", "terminated")
    return tuple(np.concatenate([getattr(row, field) for row in rows])[:count] for field in fields)


def observed(rows: tuple[NDArray[Any], ...], discrete: bool) -> Data:
    """Rows of `collect` as data for action values; of `discrete` states every one is a point."""
    state, action, reward, next_state, terminated = rows
    if discrete:
        points, here, there = np.eye(state.shape[1], dtype=np.float32), state.argmax(1), next_state.argmax(1)
    else:
        points, here = np.concatenate([state, next_state]), np.arange(len(state))
        there = here + len(state)
    outcome: list[NDArray[Any]] = [reward.astype(np.float64), terminated, np.ones(len(state)), there]
    return Data(points, here, action, *(column[:, None] for column in outcome))


def known(world: Tables, values: bool, visited: NDArray[np.int64] | None = None) -> Data:
    """Exact backups of every action in every state, or in the states (N,) `visited`; for V (`values`) or for Q."""
    states, actions, outcomes = world.next_state.shape
    here = np.arange(states) if visited is None else visited
    columns: list[NDArray[Any]] = [world.reward, world.terminated, world.probability, world.next_state]
    backups = [column[here].reshape(-1, outcomes) for column in columns]
    action = np.zeros(len(here), np.int64) if values else np.tile(np.arange(actions), len(here))
    return Data(np.eye(states, dtype=np.float32), here if values else here.repeat(actions), action, *backups)


def two_states() -> Tables:
    """Tsitsiklis & Van Roy's example: both states lead to the second, nothing is ever paid, and it never ends."""
    shape = (2, 1, 1)
    return Tables(np.ones(shape, np.int64), np.zeros(shape), np.zeros(shape, bool), np.ones(shape), np.array([1.0, 0]))
