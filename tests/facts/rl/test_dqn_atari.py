"""Atari's worlds against Gymnasium's wrappers and ale-py's own batch (OpenCV inside), episodes, refusals, exact continuation."""

import builtins
import sys

import ale_py
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation

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


@pytest.mark.long
def test_a_stack_is_gymnasiums_frame_stack_and_nothing_in_it_is_older_than_the_episode():
    """Frames by the same game without a stack, stacked by Gymnasium's wrapper; three games long."""
    ours, dice = Atari(Game("breakout", noops=5)), np.random.default_rng(1)
    theirs = FrameStackObservation(_Last(Atari(Game("breakout", noops=5, stack=1))), 4, padding_type="reset")
    for seed in range(1):
        seen, (other, _) = ours.reset(seed=seed)[0], theirs.reset(seed=seed)
        assert np.array_equal(seen, other)
        assert all(np.array_equal(plane, seen[0]) for plane in seen)  # the first screen fills it
        over = False
        while not over:
            action = int(dice.integers(4))
            (seen, *mine), (other, *its) = ours.step(action), theirs.step(action)
            assert np.array_equal(seen, other)
            assert mine[:3] == its[:3]
            over = mine[1]


class _Last(gymnasium.ObservationWrapper):
    """(1, H, W) → (H, W)."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, env.observation_space.shape[1:], np.uint8)

    def observation(self, observation):
        return observation[0]


def test_a_lost_life_ends_an_episode_in_training_but_not_the_game():
    game = Game("breakout", noops=0)
    training, scored, dice = Atari(game, training=True), Atari(game), np.random.default_rng(0)
    training.reset(seed=0), scored.reset(seed=0)
    ends, lives, rewards = 0, scored._ale.lives(), set()
    assert lives == 5
    while True:
        action = int(dice.integers(4))
        _, reward, terminated, _, _ = training.step(action)
        rewards.add(reward)
        if terminated:
            ends += 1
            if training._ale.game_over():
                break
            before = training._ale.getEpisodeFrameNumber()
            seen, _ = training.reset()
            assert training._ale.getEpisodeFrameNumber() == before + 1  # the same game
            assert all(np.array_equal(plane, seen[0]) for plane in seen)
    assert ends == lives
    assert rewards <= {0.0, 1.0}
    while not scored.step(int(dice.integers(4)))[2]:
        assert scored._ale.lives() > 0
    whole = Atari(Game("breakout", noops=0, lives=False), training=True)
    whole.reset(seed=0)
    while not whole.step(int(dice.integers(4)))[2]:
        pass
    assert whole._ale.game_over()


@pytest.mark.long
def test_rewards_are_clipped_in_training_alone():
    game = Game("space_invaders", noops=0)
    training, scored, dice = Atari(game, training=True), Atari(game), np.random.default_rng(3)
    unclipped = Atari(Game("space_invaders", noops=0, clip=False), training=True)
    for env in (training, scored, unclipped):
        env.reset(seed=0)
    paid = []
    for _ in range(90):
        action = int(dice.integers(6))
        rewards = [env.step(action)[1] for env in (training, scored, unclipped)]
        assert rewards[0] == np.sign(rewards[1])
        assert rewards[1] == rewards[2]
        paid.append(rewards[1])
    assert max(paid) > 1


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


@pytest.mark.long
def test_noops_are_drawn_from_1_to_their_most():
    env, begun = Atari(Game("pong", noops=3)), set()
    env.reset(seed=0)
    for _ in range(12):
        env._over = True
        env.reset()
        begun.add(env._begun)
    assert begun == {env._ale.getEpisodeFrameNumber() - env._begun + more for more in (1, 2, 3)}


@pytest.mark.long
def test_the_largest_of_the_last_two_screens_is_seen():
    """Space Invaders draws its shots in every other frame."""
    env, plain = Atari(Game("space_invaders", noops=0, size=160)), Atari(Game("space_invaders", noops=0, size=160))
    env.reset(seed=0), plain.reset(seed=0)
    for action in [1] * 20:
        seen = env.step(action)[0]
        screens = []
        for _ in range(4):
            plain._ale.act(plain._keys[action])
            screens.append(plain._ale.getScreenGrayscale())
        assert np.array_equal(seen[-1], reduced(np.maximum(*screens[-2:]), 160))


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


@pytest.mark.long
def test_colour_and_all_keys():
    env = Atari(Game("pong", grey=False, stack=2, actions="full", size=20))
    seen, _ = env.reset(seed=0)
    assert seen.shape == (6, 20, 20)
    assert env.action_space.n == 18
    screen = env._ale.getScreenRGB()
    for plane in range(3):
        assert np.array_equal(seen[plane], reduced(np.ascontiguousarray(screen[..., plane]), 20))
    assert env.render().shape == (210, 160, 3)


@pytest.mark.parametrize(
    "name",
    [
        "atari:Pong,sticky=0.5,noops=3,size=20",
        pytest.param("atari:Breakout,grey=false,size=20", marks=pytest.mark.long),
    ],
)
def test_it_goes_on_exactly_where_it_was(name):
    def walk(worlds, steps, dice):
        rows = [worlds.step(dice.integers(0, worlds.actions, worlds.count)) for _ in range(steps)]
        return [np.concatenate([np.ravel(column) for column in row]) for row in rows]

    worlds = Worlds.make(name, 6, 1, images=True)
    walk(worlds, 60, np.random.default_rng(0))
    state = worlds.state_dict()
    want = walk(worlds, 40, np.random.default_rng(5))
    other = Worlds.make(name, 6, 1, images=True)
    other.load_state_dict(state)
    assert other.note == ""
    for one, two in zip(walk(other, 40, np.random.default_rng(5)), want):
        assert np.array_equal(one, two)


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
