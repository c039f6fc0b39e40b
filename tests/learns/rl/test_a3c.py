"""A3C by two workers on a problem whose answer is known; that it balances a pole is the experiment `cartpole`."""

import runpy
from pathlib import Path

import numpy as np
import torch

import etude

runpy.run_path(str(Path(__file__).with_name("test_reinforce.py")))  # registers the world of signs


def test_two_find_the_action_of_every_state_and_still_learn_when_resumed(tmp_path):
    settings = {"env": "etude-test/Signs-v0", "steps": 1500, "workers": 2, "worlds": 8, "segment": 8, "widths": (8,)}
    settings |= {"learning_rate": 0.02, "gamma": 0.0, "evaluate_every": 0, "final_episodes": 20, "quiet": True}
    settings |= {"schedule": "constant"}
    first = etude.run("rl/a3c", out=tmp_path / "run", seed=0, **settings)

    def sure(folder):
        with torch.no_grad():
            return float(np.diag(etude.load(folder).model(torch.eye(3))[0].softmax(1).numpy()).min())

    early = sure(first.folder)
    result = etude.resume(first.folder, steps=8000)
    assert result.metrics["greedy_return"] == 4
    assert sure(result.folder) > max(0.85, early)
