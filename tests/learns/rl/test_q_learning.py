"""Tabular Q-learning finds Q* and the known best policies."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import etude
from etude.blocks.acting.tables import optimal_q, tables
from etude.rl.q_learning import compiled, episodes_in_environment


@pytest.mark.parametrize(
    ("name", "gamma", "episodes"),
    [("FrozenLake-v1", 0.9, 600_000), pytest.param("Taxi-v4", 0.5, 150_000, marks=pytest.mark.long)],
)
def test_converges_to_the_optimal_values_with_steps_of_the_visits_to_the_minus_08(name, gamma, episodes):
    # what is left of the first guess after n visits is about exp(−5 (1 − γ) n^0.2): slow for γ near 1
    world = tables(name)
    best = optimal_q(world, gamma)
    q, visits = np.zeros_like(best), np.zeros_like(best)
    outcomes = (world.next_state, world.reward, world.terminated, world.cumulative, world.cumulative_start)
    dice, chance = np.random.default_rng(0), np.random.default_rng(1)
    compiled()(q, visits, *outcomes, np.ones(episodes), 0.0, gamma, 0.8, 100, chance, dice)
    known = visits > 500
    assert known.sum() >= 44
    # measured 0.0046 and 0.0008; with ε = 1 the episodes do not depend on q, so every machine sees these very ones
    # (other draws leave 0.0040 to 0.018 on the lake, whose noise falls slowly, and 0.0008 to 0.0049 in the taxi)
    assert np.abs(q - best)[known].max() < 0.01


class Chain(gymnasium.Env):
    """Five states; right (1) moves on, left (0) goes back to the start. Staying at the end pays 1. It never ends."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = int(self.np_random.integers(5))
        return self.s, {}

    def step(self, action):
        reward = float(self.s == 4 and action == 1)
        self.s = min(self.s + 1, 4) if action == 1 else 0
        return self.s, reward, False, False, {}


def chain_q(gamma):
    """Q* of the chain in closed form: V(4) = 1/(1 − γ), V(s) = γ^(4 − s) V(4)."""
    value = gamma ** np.arange(4, -1, -1) / (1 - gamma)
    return np.stack([np.full(5, gamma * value[0]), [gamma * value[min(s + 1, 4)] + (s == 4) for s in range(5)]], 1)


def test_a_time_limit_does_not_change_the_values():
    # cut after every 3 steps; called a termination instead, V(4) would be 1 + γ + γ² at most
    env, gamma = gymnasium.wrappers.TimeLimit(Chain(), 3), 0.9
    q, visits = np.zeros((5, 2)), np.zeros((5, 2))
    seeds, dice = list(range(3000)), np.random.default_rng(0)
    episodes_in_environment(env, seeds, q, visits, np.ones(3000), 0.0, gamma, 0.0, 10, dice)
    np.testing.assert_allclose(q, chain_q(gamma), atol=1e-9)


@pytest.mark.long
def test_frozen_lake_cliff_and_taxi(tmp_path):
    lake = etude.run("rl/q_learning", out=tmp_path / "lake", seed=0, quiet=True)
    assert lake.metrics["greedy_return"] >= 0.70  # measured 0.74016 on seeds 0-4: the best possible
    cliff = etude.run("rl/q_learning", preset="cliff", out=tmp_path / "cliff", seed=0, quiet=True)
    assert cliff.metrics["greedy_return"] == -13.0
    assert cliff.metrics["q_error"] < 1e-9
    taxi = etude.run("rl/q_learning", preset="taxi", out=tmp_path / "taxi", seed=0, quiet=True)
    assert taxi.metrics["greedy_return"] >= 7.9  # measured 7.93, exact
    assert (tmp_path / "lake" / "artifacts").is_dir()
