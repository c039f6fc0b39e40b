"""What stands between an Atari screen and the agent: lives, stacks, clipping, the largest of two screens, exact continuation."""

import ale_py
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation

from etude.blocks.acting.atari import Atari, Game, reduced
from etude.blocks.acting.worlds import Worlds

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


@pytest.mark.long
def test_a_stack_is_gymnasiums_frame_stack_and_nothing_in_it_is_older_than_the_episode():
    """Frames by the same game without a stack, stacked by Gymnasium's wrapper; a game long."""
    ours, dice = Atari(Game("breakout", noops=5)), np.random.default_rng(1)
    theirs = FrameStackObservation(_Last(Atari(Game("breakout", noops=5, stack=1))), 4, padding_type="reset")
    for game in range(1):
        seen, (other, _) = ours.reset(seed=game)[0], theirs.reset(seed=game)
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
    assert scored._ale.game_over()
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
    """Asteroids draws its rocks in every other frame."""
    env, plain = Atari(Game("asteroids", noops=0, size=160)), Atari(Game("asteroids", noops=0, size=160))
    env.reset(seed=0), plain.reset(seed=0)
    for action in [1] * 8:
        seen = env.step(action)[0]
        screens = []
        for _ in range(4):
            plain._ale.act(plain._keys[action])
            screens.append(plain._ale.getScreenGrayscale())
        assert np.array_equal(seen[-1], reduced(np.maximum(*screens[-2:]), 160))
        assert not np.array_equal(seen[-1], reduced(screens[-1], 160))


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


@pytest.mark.long
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
