"""A linear-quadratic world whose best gain is Riccati's; that it swings a pendulum up is the experiment `pendulum`."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.linalg import solve_discrete_are

import etude

A, B, Q, R, GAMMA = 0.9, 0.5, 1.0, 0.5, 0.8


class Linear(gymnasium.Env):
    """x' = A x + B a, cost Q x² + R a², x ~ U(−1, 1) at first; it never ends, a time limit cuts after 4 steps."""

    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.float32([self.x]), {}

    def step(self, action):
        reward = -(Q * self.x**2 + R * float(action[0]) ** 2)
        self.x = A * self.x + B * float(action[0])
        return np.float32([self.x]), reward, False, False, {}


if "etude-test/Linear-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Linear-v0", entry_point=Linear, max_episode_steps=4)


def riccati():
    """K of a = −K x: the discounted problem is the plain one of √γ A, √γ B. With P(1 step) alone K would be 0."""
    a, b = GAMMA**0.5 * np.array([[A]]), GAMMA**0.5 * np.array([[B]])
    p = solve_discrete_are(a, b, np.array([[Q]]), np.array([[R]]))
    return float((b @ p @ a / (R + b @ p @ b))[0, 0])


@pytest.mark.parametrize("gradient", ["score", pytest.param("reparameterised", marks=pytest.mark.long)])
def test_finds_the_gain_of_riccati(gradient, tmp_path):
    settings = {"steps": 2000, "worlds": 8, "collect": 64, "updates": 64, "batch": 64, "widths": (32, 32), "draws": 4}
    settings |= {"learning_starts": 600, "tau": 0.01, "learning_rate": 2e-3, "actor_learning_rate": 1e-3, "noise": 0.3}
    settings |= {"evaluate_every": 0, "final_episodes": 2, "quiet": True, "gamma": GAMMA, "gradient": gradient}
    result = etude.run(
        "rl/off_policy_actor_critic", out=tmp_path / "run", seed=0, env="etude-test/Linear-v0", **settings
    )
    loaded, x = etude.load(result.folder), torch.linspace(-1, 1, 41)[:, None]
    loaded.model.load_state_dict(loaded.state["target_model"])  # θ' is the mean of the last hundred or so θ
    with torch.no_grad():
        action = 2 * loaded.model(x)
    gain = -float((x * action).sum() / (x * x).sum())  # least squares through 0
    assert riccati() == pytest.approx(0.714, abs=1e-3)
    assert gain == pytest.approx(riccati(), rel=0.05)  # measured 0.977 and 0.994 times it
