"""MuJoCo's worlds go on exactly where they were, and their bounds are theirs."""

import gymnasium
import numpy as np
import pytest

from etude.blocks.acting.environments import Environment
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError


def walk(worlds, steps, dice):
    found = []
    for _ in range(steps):
        row = worlds.step(dice.uniform(-1, 1, (worlds.count, worlds.actions)).astype(np.float32))
        found.append(np.concatenate([np.ravel(column) for column in (*row, worlds.observation)]))
    return found


ALL = [
    "InvertedDoublePendulum",
    "Reacher",
    "Pusher",
    "Swimmer",
    "Hopper",
    "Walker2d",
    "HalfCheetah",
    "Ant",
    "HumanoidStandup",
]


@pytest.mark.parametrize(
    "name", ["InvertedPendulum", "Humanoid", *(pytest.param(name, marks=pytest.mark.long) for name in ALL)]
)
def test_it_goes_on_exactly_where_it_was(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where MuJoCo logs what it thinks of the humanoid
    worlds = Worlds.make(f"{name}-v5", 2, 1, box=True)
    walk(worlds, 25, np.random.default_rng(0))
    state = worlds.state_dict()
    want = walk(worlds, 25, np.random.default_rng(5))
    other = Worlds.make(f"{name}-v5", 2, 1, box=True)
    other.load_state_dict(state)
    assert other.note == ""
    for one, two in zip(walk(other, 25, np.random.default_rng(5)), want):
        assert np.array_equal(one, two)


def test_without_mujoco_it_says_what_to_install():
    def lacking():
        raise gymnasium.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    with pytest.raises(UserError, match=r"--env X-v5 needs MuJoCo, which is not installed; run: pip install .*mujoco"):
        Environment("X-v5", lacking).make()
