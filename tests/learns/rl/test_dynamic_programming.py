"""Planning finds what is obviously best."""

import numpy as np
import pytest

import etude
from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import play


@pytest.mark.long
def test_the_plan_for_the_taxi_is_played_as_computed(tmp_path):
    """Real episodes bring what the tables promise: 7.93 a ride, and a random policy brings about −770."""
    done = etude.run("rl/dynamic_programming", preset="taxi", out=tmp_path / "run", quiet=True)
    policy = etude.load(done.folder).model.policy.numpy()
    returns = play(environment("Taxi-v4"), lambda state: policy[state.argmax(1)], 150, 0)
    spread = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - done.metrics["greedy_return"]) < 5 * spread  # measured 7.82 ± 0.15
    assert returns.min() >= 3
