"""Worlds: no pair spans a reset under any of Gymnasium's three rules, exact continuation, clear refusals."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from etude.blocks.acting.environments import Environment, encoder
from etude.blocks.acting.episodes import film, play
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError


class Counter(gymnasium.Env):
    """Observes (episode, step). Action 1 at step 2 ends the task; the registered time limit cuts at 5."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2, start=3)  # actions 3 and 4
    metadata: ClassVar = {"render_modes": []}

    def __init__(self):
        self.episode, self.t = -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        ends = self.t == 2 and action == 4
        self.t += 1
        return self._observe(), 10.0 + self.t, ends, False, {}

    def _observe(self):
        return np.array([self.episode, self.t], np.float32)


class Saved(Counter):
    """The same, able to say and take its state; its reward is random."""

    def step(self, action):
        observation, _, ends, cut, info = super().step(action)
        return observation, self.np_random.normal(), ends, cut, info

    def state_dict(self):
        return {"episode": self.episode, "t": self.t}

    def load_state_dict(self, state):
        self.episode, self.t = state["episode"], state["t"]


class Lasting(gymnasium.Env):
    """Half of the episodes last 1 step, half 19; reward 1 a step: the mean return is 10."""

    observation_space = spaces.Discrete(2, start=1)
    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 19
        return 1, {}

    def step(self, action):
        self.left -= 1
        return 2, 1.0, self.left == 0, False, {}


for _name, _kind, _limit in (("Counter", Counter, 5), ("Saved", Saved, 5), ("Lasting", Lasting, None)):
    if f"etude-test/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(f"etude-test/{_name}-v0", entry_point=_kind, max_episode_steps=_limit)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_no_pair_spans_a_reset_and_none_is_lost(mode):
    makers = [lambda: gymnasium.make("etude-test/Counter-v0", disable_env_checker=True)] * 4
    worlds = Worlds(SyncVectorEnv(makers, autoreset_mode=mode))
    rng = np.random.default_rng(0)
    last = [(0.0, 0.0, False)] * 4  # (episode, step, over) in which each world stands
    terminations = truncations = rows = 0
    sums = [0.0] * 4
    finished = []
    for _ in range(200):
        row = worlds.step(rng.integers(0, 2, size=4))
        assert len({len(column) for column in row}) == 1
        rows += len(row.reward)
        for state, action, reward, following, terminated, truncated, world in zip(*row):
            episode, t, over = last[world]
            expected = (episode + 1, 0.0) if over else (episode, t)
            assert tuple(state) == expected, "a row starts where the world stood"
            assert tuple(following) == (expected[0], expected[1] + 1), "and ends one step later in the same episode"
            assert reward == 10 + following[1]
            assert terminated == (state[1] == 2 and action == 1)
            assert truncated == (following[1] == 5)
            last[world] = (*following, terminated or truncated)
            sums[world] += reward
            if terminated or truncated:
                finished.append(sums[world])
                sums[world] = 0.0
            terminations, truncations = terminations + terminated, truncations + truncated
    assert terminations > 20
    assert truncations > 20
    assert worlds.steps == rows
    assert worlds.episodes == terminations + truncations
    drained = worlds.drain()
    assert sorted(drained) == sorted(finished)
    assert worlds.drain() == []
    if mode is AutoresetMode.NEXT_STEP:
        assert rows == 800 - worlds.episodes + worlds._resetting.sum()  # each reset took a step
    else:
        assert rows == 800


def test_cart_pole_rows_obey_the_physics_across_ends():
    worlds = Worlds.make("CartPole-v1", 16, seed=1)
    assert type(worlds.env).__name__ == "CartPoleVectorEnv"
    rng, ends = np.random.default_rng(0), 0
    for _ in range(300):
        row = worlds.step(rng.integers(0, 2, size=16))
        # x' = x + τ ẋ and θ' = θ + τ θ̇ within one episode; a reset would jump
        np.testing.assert_allclose(row.next_state[:, 0], row.state[:, 0] + 0.02 * row.state[:, 1], atol=1e-5)
        np.testing.assert_allclose(row.next_state[:, 2], row.state[:, 2] + 0.02 * row.state[:, 3], atol=1e-5)
        outside = (np.abs(row.next_state[:, 0]) > 2.4) | (np.abs(row.next_state[:, 2]) > 12 * np.pi / 180)
        np.testing.assert_array_equal(row.terminated, outside)
        assert (row.reward == 1).all()
        ends += row.terminated.sum()
    assert ends > 100
    assert ends == worlds.episodes
    assert worlds.steps == 300 * 16 - ends + worlds._resetting.sum()


EXACT = (
    "CartPole-v1",
    "MountainCar-v0",
    "Acrobot-v1",
    "FrozenLake-v1",
    "CliffWalkingSlippery-v1",
    "Taxi-v4",
    "etude-test/Saved-v0",
)


@pytest.mark.parametrize("name", EXACT)
def test_continues_exactly(name, tmp_path):
    checkpoint = pytest.importorskip("etude.core.checkpoint")
    rng = np.random.default_rng(0)
    worlds = Worlds.make(name, 3, seed=5)
    for _ in range(215 if name != "Acrobot-v1" else 40):
        worlds.step(rng.integers(0, worlds.actions, size=3))
    checkpoint.save(tmp_path, 1, {"worlds": worlds.state_dict()})
    # the copy comes from another seed and has lived: nothing of that may remain
    again = Worlds.make(name, 3, seed=6)
    for _ in range(7):
        again.step(rng.integers(0, worlds.actions, size=3))
    again.load_state_dict(checkpoint.load(tmp_path)[1]["worlds"])
    assert again.note == ""
    np.testing.assert_array_equal(worlds.observation, again.observation)
    for _ in range(250 if name != "Acrobot-v1" else 60):
        action = rng.integers(0, worlds.actions, size=3)
        for ours, theirs in zip(worlds.step(action), again.step(action), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert worlds.drain() == again.drain()
    assert (worlds.steps, worlds.episodes) == (again.steps, again.episodes)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_continues_exactly_under_every_rule(mode):
    def make(seed):
        makers = [lambda: gymnasium.make("CartPole-v1", disable_env_checker=True)] * 3
        return Worlds(SyncVectorEnv(makers, autoreset_mode=mode), seed=seed)

    rng = np.random.default_rng(0)
    worlds, again = make(0), make(1)
    stopped_at_an_end = False
    for _ in range(60):
        worlds.step(rng.integers(0, 2, size=3))
        if worlds.episodes:
            stopped_at_an_end = True
            break
    assert stopped_at_an_end
    again.load_state_dict(worlds.state_dict())
    for _ in range(60):
        action = rng.integers(0, 2, size=3)
        for ours, theirs in zip(worlds.step(action), again.step(action), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_restored_is_restarted_and_says_so():
    worlds, again = Worlds.make("etude-test/Counter-v0", 2, seed=3), Worlds.make("etude-test/Counter-v0", 2, seed=3)
    for _ in range(4):
        worlds.step(np.zeros(2, int))
    state = worlds.state_dict()
    assert state["inner"] is None
    again.load_state_dict(state)
    assert again.steps == 8
    assert again.observation[:, 1].tolist() == [0.0, 0.0]
    assert again.note == (
        "etude-test/Counter-v0 cannot be restored exactly, so its 2 worlds were restarted at environment step 8; "
        "unfinished episodes were dropped."
    )
    for _ in range(5):
        again.step(np.zeros(2, int))
    assert again.drain() == [11.0 + 12 + 13 + 14 + 15] * 2  # nothing of the dropped episodes in the return


def test_state_of_another_kind_of_world_is_not_taken():
    frozen, again = Worlds.make("FrozenLake-v1", 2), Worlds.make("Taxi-v4", 2)
    again.load_state_dict(frozen.state_dict())
    assert "restarted" in again.note
    assert again.observation.shape == (2, 500)


def test_seeds_are_functions_of_seed_purpose_rank_and_copy():
    def first(**key):
        return Worlds.make("MountainCar-v0", 3, **key).observation

    base = first(seed=1)
    np.testing.assert_array_equal(base, first(seed=1))
    assert len(np.unique(base, axis=0)) == 3
    for other in (first(seed=2), first(seed=1, rank=1), first(seed=1, purpose="evaluation")):
        assert not (base == other).all(1).any()
    fast = Worlds.make("CartPole-v1", 3, seed=1).observation
    assert not (fast == Worlds.make("CartPole-v1", 3, seed=1, rank=1).observation).any()


def test_discrete_observations_are_one_hot_from_their_first_value():
    worlds = Worlds.make("etude-test/Lasting-v0", 2)
    assert worlds.observation.tolist() == [[1.0, 0.0]] * 2
    assert worlds.step(np.zeros(2, int)).next_state.tolist() == [[0.0, 1.0]] * 2


def test_play_does_not_favour_short_episodes():
    returns = play("etude-test/Lasting-v0", lambda states: np.zeros(len(states), int), 400, seed=0, limit=100)
    assert set(returns) == {1.0, 19.0}
    assert abs(returns.mean() - 10) < 3 * 9 / np.sqrt(400)
    cut = play("etude-test/Lasting-v0", lambda states: np.zeros(len(states), int), 50, seed=0, limit=4)
    assert set(cut) == {1.0, 4.0}


def test_play_counts_cart_pole_steps():
    returns = play("CartPole-v1", lambda states: np.zeros(len(states), int), 30, seed=0)
    assert 8 <= returns.min() <= returns.max() <= 11  # a constant push falls over in that many steps
    balanced = play("CartPole-v1", lambda s: (s @ [0.05, 0.1, 3.0, 1.0] > 0).astype(int), 10, seed=0)
    assert balanced.tolist() == [500.0] * 10


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("CartPole-v9", "did you mean 'CartPole-v"),
        ("FrozenLak-v1", "did you mean 'FrozenLake-v1'"),
        ("Pendulum-v1", "has the action space Box.*needs discrete actions"),
        ("Blackjack-v1", "has the observation space Tuple"),
        ("no_such_module:Thing-v0", "the module 'no_such_module' cannot be imported"),
    ],
)
def test_unusable_environments_are_answered_in_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        Worlds.make(name)
    assert f"--env {name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_package_and_images_are_answered():
    def lacking():
        raise gymnasium.error.DependencyNotInstalled("install box2d")

    with pytest.raises(UserError, match="--env X-v0 needs a package that is not installed"):
        Environment("X-v0", lacking).make()
    with pytest.raises(UserError, match="image observations"):
        encoder(spaces.Box(0, 255, (84, 84, 3), np.uint8), "X-v0", images=False)


def test_film_shows_the_episode_or_says_why_not():
    pytest.importorskip("pygame")
    pictures, total, reason = film("CartPole-v1", lambda states: np.zeros(len(states), int), seed=0, frames=5)
    assert reason == ""
    assert 8 <= total <= 11
    assert len(pictures) == 5
    assert pictures[0].size == (300, 200)
    assert pictures[0].tobytes() != pictures[-1].tobytes()
    pictures, total, reason = film("etude-test/Lasting-v0", lambda states: np.zeros(len(states), int), seed=0)
    assert pictures == []
    assert "etude-test/Lasting-v0 cannot be drawn here" in reason
