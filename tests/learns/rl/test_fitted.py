"""Fitted Q-iteration finds its way and keeps a pole up from rows that the uniform policy has left."""

import pytest

import etude
from etude.rl import fitted


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(fitted, "pictures", lambda *arguments: None)


def test_a_pole_is_balanced_from_data_of_the_uniform_policy(tmp_path):
    """The uniform policy keeps it up for 22 steps; no step of a better one is ever seen."""
    settings = {"features": "linear", "transitions": 3000, "iterations": 15, "evaluation_episodes": 20}
    done = etude.run("rl/fitted", out=tmp_path / "run", quiet=True, evaluate_every=0, max_episode_steps=120, **settings)
    assert done.metrics["greedy_return"] > 90  # measured 120, 118, 120 with seeds 0 to 2


def test_the_shortest_way_along_the_cliff_is_found(tmp_path):
    """-13 is the best; the uniform policy, whose rows these are, falls off the cliff again and again."""
    settings = {"features": "tabular", "transitions": 20_000, "iterations": 60, "gamma": 0.9, "evaluate_every": 0}
    done = etude.run("rl/fitted", out=tmp_path / "run", quiet=True, env="CliffWalking-v1", **settings)
    assert done.metrics["greedy_return"] == -13
