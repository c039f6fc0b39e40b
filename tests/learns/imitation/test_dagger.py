"""DAgger where cloning fails: the expert's few steps do not show what to do when the pole is far from upright."""

import gymnasium
import pytest

import etude


class Short(gymnasium.wrappers.TimeLimit):
    """CartPole of at most 200 steps."""

    def __init__(self, render_mode=None):
        super().__init__(gymnasium.make("CartPole-v1", render_mode=render_mode).unwrapped, 200)


@pytest.mark.long
def test_labels_of_its_own_states_make_the_learner_as_good_as_the_expert(tmp_path):
    settings = {"env": Short, "examples": 12, "iterations": 4, "worlds": 2, "updates": 300, "widths": ()}
    settings |= {"evaluation_episodes": 3, "final_episodes": 5}
    done = etude.run("imitation/dagger", out=tmp_path / "run", quiet=True, **settings)
    assert done.metrics["learner_return"] >= 195  # measured on seeds 0 to 2: 200, 200, 200
    assert done.metrics["cloned_return"] <= 100  # 30, 19, 76
