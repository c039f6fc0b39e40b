"""The compiled worlds do what Gymnasium's do, to the last bit, and are worlds like any other."""

import gymnasium
import numpy as np
import pytest

from etude.blocks.acting.compiled import KINDS, Compiled
from etude.blocks.acting.episodes import play
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError

NAMES = [name for name in KINDS if name != "CartPole-v0"]  # whose one difference is the time limit


def actions(name, count, dice):
    if name == "Pendulum-v1":
        return dice.uniform(-3, 3, (count, 1)).astype(np.float32)  # beyond its bounds, too
    return dice.integers(gymnasium.make(name).action_space.n, size=count)


def place(env, name, state):
    """Put one of Gymnasium's worlds into the state of a compiled copy."""
    env.reset()
    env.unwrapped.state = state.astype(np.float32) if name == "Acrobot-v1" else state.copy()


@pytest.mark.parametrize("name", NAMES)
def test_transitions_are_those_of_gymnasium_to_the_last_bit(name):
    count, dice = 8, np.random.default_rng(0)
    compiled, single = Compiled(name, count), [gymnasium.make(name) for _ in range(8)]
    compiled.reset(seed=3)
    for i, env in enumerate(single):
        place(env, name, compiled.state[i])
    ends = 0
    for _ in range(520):  # beyond every time limit
        action = actions(name, count, dice)
        seen, reward, terminated, truncated, info = compiled.step(action)
        reached = info.get("final_obs", seen)
        for i, env in enumerate(single):
            theirs = env.step(action[i])
            assert np.array_equal(theirs[0], reached[i])
            assert theirs[1:4] == (reward[i], terminated[i], truncated[i])
            if terminated[i] or truncated[i]:
                ends += 1
                place(env, name, compiled.state[i])
                first = np.asarray(env.unwrapped.state, dtype=float)
                assert ((first >= KINDS[name].low) & (first <= KINDS[name].high)).all()
            else:
                assert np.array_equal(np.asarray(env.unwrapped.state, dtype=float), compiled.state[i])
    assert ends >= count


@pytest.mark.parametrize("name", NAMES)
def test_first_states_are_drawn_as_gymnasium_draws_them(name):
    compiled = Compiled(name, 20_000)
    compiled.reset(seed=0)
    low, high = np.asarray(KINDS[name].low), np.asarray(KINDS[name].high)
    env = gymnasium.make(name)
    theirs = np.array([np.asarray((env.reset(seed=s), env.unwrapped.state)[1], dtype=float) for s in range(300)])
    assert (theirs.min(0) >= low).all()
    assert (theirs.max(0) <= high).all()
    assert (theirs.max(0) - theirs.min(0) >= 0.95 * (high - low)).all()  # the bounds are theirs, not wider ones
    assert np.allclose(compiled.state.mean(0), (low + high) / 2, atol=0.02 * (high - low).max())
    assert np.allclose(compiled.state.std(0), (high - low) / 12**0.5, rtol=0.02)
    assert np.array_equal(compiled.reset(seed=5)[0], compiled.reset(seed=5)[0])


def test_worlds_take_them_and_lose_no_transition():
    """No step is spent on a reset; what was reached is not the next episode's beginning."""
    worlds = Worlds.make("CartPole-v1", 32, 1, engine="compiled")
    dice = np.random.default_rng(0)
    for _ in range(60):
        before = worlds.observation
        row = worlds.step(dice.integers(2, size=32))
        assert len(row.reward) == 32
        assert np.array_equal(row.state, before)
        over = row.terminated | row.truncated
        assert (np.abs(row.next_state[row.terminated]) > (2.4, 0, 0.209, 0))[:, [0, 2]].any(1).all()
        assert np.array_equal(row.next_state[~over], worlds.observation[~over])
        assert (np.abs(worlds.observation[over]) <= 0.05).all()
    assert worlds.steps == 60 * 32
    assert len(worlds.drain()) == worlds.episodes > 30


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_they_continue_exactly(name):
    def made():
        return Worlds.make(name, 6, 2, engine="compiled", box=None)

    worlds, again, dice = made(), made(), np.random.default_rng(0)
    plan = [actions(name, 6, dice) for _ in range(230)]
    for action in plan[:115]:
        worlds.step(action)
    again.load_state_dict(worlds.state_dict())
    assert again.note == ""
    for action in plan[115:]:
        one, other = worlds.step(action), again.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert worlds.drain() == again.drain()


def test_other_worlds_are_refused():
    with pytest.raises(UserError, match="--env LunarLander-v3 is none of the compiled worlds .*leave out --engine"):
        Worlds.make("LunarLander-v3", 2, engine="compiled")
    with pytest.raises(UserError, match="did you mean 'Acrobot-v1'"):
        Compiled("Acrobot", 2)


@pytest.mark.parametrize("engine", ["gymnasium", "compiled"])
def test_continuous_actions_are_clipped_to_their_bounds_and_kept(engine):
    worlds = Worlds.make("Pendulum-v1", 3, 0, engine=engine, box=True)
    assert (worlds.actions, worlds.low.tolist(), worlds.high.tolist()) == (1, [-2.0], [2.0])
    row = worlds.step(np.array([[5.0], [-9.0], [0.5]]))
    assert row.action.dtype == np.float32
    assert row.action.tolist() == [[2.0], [-2.0], [0.5]]
    for _ in range(199):
        row = worlds.step(np.zeros((3, 1)))
    assert row.truncated.all()
    assert not row.terminated.any()
    assert np.allclose(np.hypot(row.next_state[:, 0], row.next_state[:, 1]), 1, atol=1e-6)


def test_the_kind_of_action_is_asked_for():
    with pytest.raises(UserError, match="Pendulum-v1 has the action space .*needs discrete actions"):
        Worlds.make("Pendulum-v1", 2)
    with pytest.raises(UserError, match="CartPole-v1 has the action space .*needs continuous actions between bounds"):
        Worlds.make("CartPole-v1", 2, box=True)
    assert play("Pendulum-v1", lambda state: np.zeros((len(state), 1)), 4, 0).max() < 0
