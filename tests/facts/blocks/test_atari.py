"""Atari by name against ale-py's own batch (OpenCV inside), refusals; lives, stacks and screens: rl/test_dqn_atari.py."""

import builtins
import sys

import ale_py
import numpy as np
import pytest

from etude.blocks.acting import atari
from etude.blocks.acting.atari import Atari, Game, parsed, reduced, shares
from etude.blocks.acting.environments import environment
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def batch_of_ale(game, **options):
    """One copy by ale-py's batch, which reduces the screens with OpenCV; episodes begin anew in the next step."""
    kept = {"noop_max": 0, "use_fire_reset": False, "reward_clipping": False, "episodic_life": False, "num_threads": 1}
    return ale_py.AtariVectorEnv(game, 1, **(kept | options))


@pytest.mark.parametrize(("game", "repeat"), [("pong", 4), pytest.param("breakout", 3, marks=pytest.mark.long)])
def test_what_is_seen_and_paid_is_what_ale_pys_own_batch_gives_to_the_last_bit(game, repeat):
    env, theirs, dice = (
        Atari(Game(game, noops=0, repeat=repeat)),
        batch_of_ale(game, frameskip=repeat),
        np.random.default_rng(0),
    )
    seen, _ = env.reset(seed=0)
    assert np.array_equal(seen[-1], theirs.reset(seed=0)[0][0, -1])
    paid, ends = 0.0, 0
    for _ in range(330):
        action = int(dice.integers(env.action_space.n))
        seen, reward, terminated, truncated, _ = env.step(action)
        other, its, over, cut, _ = theirs.step(np.array([action]))
        assert (reward, terminated, truncated) == (its[0], over[0], cut[0])
        paid += abs(reward)
        if terminated:
            ends += 1
            seen, (other, *_) = env.reset()[0], theirs.step(np.array([0]))
        assert np.array_equal(seen[-1], other[0, -1])  # before an episode's first screen its stacks are black
    assert paid > 2
    assert ends == (game == "breakout")


def test_a_cut_game_is_truncated_not_terminated():
    env = Atari(Game("pong", noops=0, frames=40))
    env.reset(seed=0)
    flags = [env.step(0)[2:4] for _ in range(10)]
    assert flags[:9] == [(False, False)] * 9
    assert flags[9] == (False, True)
    env.reset()
    assert env.step(0)[2:4] == (False, False)
    kind = environment("atari:Pong,frames=42")
    assert kind.limit() == 11
    assert environment("atari:Pong").limit() == 27_000


@pytest.mark.parametrize(("shape", "size"), [((30, 16), 9), ((7, 5), 3), ((8, 8), 8), ((9, 12), 4)])
def test_reduced_is_the_mean_of_the_area(shape, size):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    fine = np.kron(
        picture.astype(float), np.ones((size, size))
    )  # every pixel size times, so that areas are whole pixels
    want = fine.reshape(size, shape[0], size, shape[1]).mean((1, 3))
    assert np.abs(reduced(picture, size) - want).max() <= 0.5 + 1e-3
    for length in shape:
        np.testing.assert_allclose(shares(length, size).share.sum(0), 1, atol=1e-6)


def test_worlds_of_images_are_bytes_and_the_state_reached_is_the_true_one():
    worlds = Worlds.make("atari:Pong,frames=24,noops=0", 2, 0, images=True)
    assert worlds.shape == (4, 84, 84)
    single = Atari(Game("pong", noops=0, frames=24), training=True)
    first = single.reset(seed=0)[0]
    row = None
    for _ in range(6):
        row, (seen, *_) = worlds.step(np.array([2, 2])), single.step(2)
        assert row.state.dtype == row.next_state.dtype == np.uint8
        assert np.array_equal(row.next_state[0], seen)
    assert row.truncated.all()
    assert not row.terminated.any()
    assert not np.array_equal(worlds.observation[0], row.next_state[0])
    assert np.array_equal(worlds.observation[0], first)


def test_settings_are_written_in_the_name():
    game = parsed("atari:SpaceInvaders,repeat=2,sticky=0.25,lives=false,actions=full")
    assert game == Game("space_invaders", repeat=2, sticky=0.25, lives=False, actions="full")
    assert parsed(game.says()) == game
    assert environment("atari:pong").about == Game("pong").says()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("atari:Pongg", "has no game 'Pongg'; did you mean 'pong'"),
        ("atari:Pong,repaet=2", "is none of its options .*; did you mean 'repeat'"),
        ("atari:Pong,repeat=0", "repeat must be a number from 1 to 60"),
        ("atari:Pong,repeat=x", "repeat must be a number"),
        ("atari:Pong,sticky=nan", "sticky must be a number"),
        ("atari:Pong,grey=1", "grey must be true or false"),
        ("atari:Pong,actions=all", "actions must be minimal or full"),
        ("ALE/Pon-v5", "not a registered Gymnasium environment.*did you mean 'ALE/Pong-v5'"),
    ],
)
def test_refusals(name, said):
    with pytest.raises(UserError, match=said) as caught:
        environment(name)
    assert f"--env {name}" in str(caught.value)


def test_without_ale_py_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def lacking(name, *rest, **more):
        if name == "ale_py":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "ale_py")
    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(
        UserError, match=r"--env atari:Pong needs ale-py, which is not installed; run: pip install .*atari"
    ):
        atari.parsed("atari:Pong")


def test_methods_of_vectors_refuse_images():
    with pytest.raises(UserError, match="observes images .*image observations are for rl/dqn and rl/ppo"):
        Worlds.make("atari:Pong", 2)
