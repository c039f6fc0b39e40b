"""Several updates from each batch, on a problem whose answer is known."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import etude

runpy.run_path(str(Path(__file__).with_name("test_reinforce.py")))  # registers the world of signs


@pytest.mark.parametrize("correction", ["per_decision", "first_order"])
def test_finds_the_action_of_every_state(correction, tmp_path):
    settings = {"env": "etude-test/Signs-v0", "episodes": 320, "batch": 16, "widths": (), "learning_rate": 0.1}
    settings |= {"evaluate_every": 0, "correction": correction, "updates": 4, "target_return": 3.5, "quiet": True}
    result = etude.run("rl/off_policy_gradient", out=tmp_path / "run", seed=0, **settings)
    assert result.metrics["greedy_return"] == 4
    with torch.no_grad():
        policy = etude.load(result.folder).model(torch.eye(3)).softmax(1).numpy()
    assert np.diag(policy).min() > 0.8
    assert result.metrics["steps_to_target"] < 320 * 4
