"""One step, one answer: the best soft policy is a bell around 0.5 s + 1; that SAC swings a pendulum up is an experiment."""

import math
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import etude


class Bell(gymnasium.Env):
    """An episode is one step; its reward is −4 (a − 0.5 s − 1)², so π ∝ exp(reward/α) has the deviation √(α/8)."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Box(-1, 3, (1,), np.float32)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.uniform(-2, 2)
        return np.float32([self.s]), {}

    def step(self, action):
        return np.float32([self.s]), -4 * (float(action[0]) - 0.5 * self.s - 1) ** 2, True, False, {}


if "etude-test/Bell-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Bell-v0", entry_point=Bell)


def learned(folder, **changes):
    """Numbers of the run, and mean and deviation of 4,000 actions in the states −1, 0, 1: (3,) each."""
    settings = {"steps": 2000, "worlds": 8, "collect": 64, "updates": 40, "batch": 64, "widths": (32,), "gamma": 0.9}
    settings |= {"learning_starts": 300, "learning_rate": 1e-2, "actor_learning_rate": 3e-3, "evaluate_every": 0}
    settings |= {"env": "etude-test/Bell-v0", "final_episodes": 10, "quiet": True}
    result = etude.run("rl/sac", out=folder, seed=0, **settings | changes)
    state = torch.tensor([-1.0, 0.0, 1.0]).repeat(4000)[:, None]
    with torch.no_grad():
        u, _ = etude.load(result.folder).model.draw(state, torch.randn(12_000, 1))
    action = (1 + 2 * u).view(4000, 3)
    return result.metrics, action.mean(0).numpy(), action.std(0).numpy()


def test_a_given_temperature_gives_boltzmanns_bell(tmp_path):
    _, mean, deviation = learned(tmp_path / "run", automatic=False, temperature=0.5)
    np.testing.assert_allclose(mean, [0.5, 1.0, 1.5], atol=0.15)
    np.testing.assert_allclose(deviation, math.sqrt(0.5 / 8), rtol=0.25)  # measured 0.23 to 0.26, and 0.04 off


def test_the_temperature_finds_the_entropy_it_is_told(tmp_path):
    # u = (a − 1)/2 has half the deviation; a bell's entropy is log σ + ½ log 2πe
    metrics, _, deviation = learned(tmp_path / "run", entropy_target=-1.0, temperature_learning_rate=0.02)
    entropy = np.log(deviation / 2) + 0.5 * math.log(2 * math.pi * math.e)
    np.testing.assert_allclose(entropy, -1.0, atol=0.3)  # measured -1.09 to -0.95
    assert metrics["temperature"] == pytest.approx(
        8 * (2 * math.exp(-1) / math.sqrt(2 * math.pi * math.e)) ** 2, rel=0.5
    )
