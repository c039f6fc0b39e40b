"""PPO on a problem whose answer is known; that it balances a pole is the experiment `cartpole`."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import etude

runpy.run_path(str(Path(__file__).with_name("test_reinforce.py")))  # registers the world of signs


@pytest.mark.parametrize("update", ["torch", "compiled"])
def test_finds_the_action_of_every_state(update, tmp_path):
    settings = {"env": "etude-test/Signs-v0", "steps": 2048, "worlds": 8, "segment": 16, "passes": 4, "batch": 64}
    settings |= {"widths": (8,), "learning_rate": 0.02, "evaluate_every": 0, "final_episodes": 20, "quiet": True}
    settings |= {"update": update}
    result = etude.run("rl/ppo", out=tmp_path / "run", seed=0, **settings)
    assert result.metrics["greedy_return"] == 4
    with torch.no_grad():
        policy = etude.load(result.folder).model(torch.eye(3))[0].softmax(1).numpy()
    assert np.diag(policy).min() > 0.85
