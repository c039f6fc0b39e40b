"""DQN on worlds whose answer is known; that it balances a pole is the experiment `cartpole`."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import etude


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


for _limit in (4, 1000):
    if f"etude-test/Chain{_limit}-v0" not in gymnasium.registry:
        gymnasium.register(f"etude-test/Chain{_limit}-v0", entry_point=Chain, max_episode_steps=_limit)


def chain_q(gamma):
    """Q* of the chain in closed form: V(4) = 1/(1 − γ), V(s) = γ^(4 − s) V(4)."""
    value = gamma ** np.arange(4, -1, -1) / (1 - gamma)
    return np.stack([np.full(5, gamma * value[0]), [gamma * value[min(s + 1, 4)] + (s == 4) for s in range(5)]], 1)


@pytest.mark.parametrize(
    ("limit", "extra"),
    [
        (1000, {}),
        (4, {"double": True}),
        *(pytest.param(4, e, marks=pytest.mark.long) for e in ({}, {"action_outputs": False, "widths": (32,)})),
    ],
)
def test_finds_the_values_of_a_chain_with_or_without_a_time_limit(limit, extra, tmp_path):
    # one-hot states and no hidden layer: the tabular limit. Were the cut after 4 steps taken for a termination, V(4)
    # would be at most 1 + γ + γ² + γ³ = 2.53 instead of 3.33
    settings = {"steps": 12_000, "collect": 64, "updates": 32, "widths": (), "gamma": 0.7, "learning_rate": 0.01}
    settings |= {"epsilon_end": 1.0, "evaluate_every": 0, "final_episodes": 3, "keep_best": False, "quiet": True}
    settings |= {"env": f"etude-test/Chain{limit}-v0", **extra}
    result = etude.run("rl/dqn", out=tmp_path / "run", seed=0, **settings)
    with torch.no_grad():
        got = etude.load(result.folder).model(torch.eye(5)).numpy()
    # measured 3.2e-7 in all four, which is where q ← 1 + 0.7 q itself stops in float32
    np.testing.assert_allclose(got, chain_q(0.7), atol=1e-2)
