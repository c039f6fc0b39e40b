"""Tables: the trajectories of the environment draw by draw, and the known optimal values."""

import gymnasium
import numpy as np
import pytest

from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.episodes import play
from etude.blocks.acting.tables import expected_return, optimal_q, tables
from etude.core.errors import UserError


@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalkingSlippery-v1", "Taxi-v4"])
def test_tables_give_the_trajectories_of_the_environment(name):
    table, env = tables(name), gymnasium.make(name, disable_env_checker=True)
    for seed in range(20):
        state, _ = env.reset(seed=seed)
        draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        assert state == np.argmax(table.cumulative_start > draws.random())
        for action in np.random.default_rng(seed).integers(0, env.action_space.n, size=200):
            following, reward, terminated, truncated, _ = env.step(action)
            outcome = np.argmax(table.cumulative[state, action] > draws.random())
            assert following == table.next_state[state, action, outcome]
            assert reward == table.reward[state, action, outcome]
            assert terminated == table.terminated[state, action, outcome]
            state = following
            if terminated or truncated:
                break
    assert tables("CartPole-v1") is None
    np.testing.assert_allclose(table.probability.sum(2), 1)


def test_a_wrapped_world_is_not_read_from_the_table_of_the_world_inside():
    name = "etude-test/Tripled-v0"
    if name not in gymnasium.registry:
        triple = gymnasium.wrappers.TransformReward.wrapper_spec(func=lambda reward: 3 * reward)
        inside = gymnasium.registry["CliffWalking-v1"].entry_point
        gymnasium.register(name, entry_point=inside, max_episode_steps=50, additional_wrappers=(triple,))
    assert tables(name) is None
    assert play(name, lambda state: np.zeros(len(state), np.int64), 1, seed=0)[0] == -150  # up against the wall


def test_optimal_values_of_frozen_lake_are_the_known_ones():
    world = tables("FrozenLake-v1")
    q = optimal_q(world, 0.99)
    assert q.max(1)[0] == pytest.approx(0.5420259, abs=5e-8)
    assert expected_return(world, q.argmax(1), 100) == pytest.approx(0.74016, abs=5e-6)
    backup = (world.probability * (world.reward + 0.99 * ~world.terminated * q.max(1)[world.next_state])).sum(2)
    np.testing.assert_allclose(q, backup, atol=1e-11)
    with pytest.raises(ValueError, match="gamma < 1"):
        optimal_q(world, 1.0)


def test_shortest_way_along_the_cliff_is_thirteen_steps():
    world = tables("CliffWalking-v1")
    assert expected_return(world, optimal_q(world, 0.999).argmax(1), 100) == pytest.approx(-13, abs=1e-12)
    assert environment("CliffWalking-v1").limit(77) == 77
    assert environment("CliffWalking-v1").limit() == 1000
    assert environment("FrozenLake-v1").limit() == 100  # registered
    assert [environment("FrozenLake-v1").limit(most) for most in (77, 177)] == [77, 100]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalkingSlippery-v1", "Taxi-v4"])
def test_optimal_values_are_those_of_plain_value_iteration(name, gamma):
    world = tables(name)
    q = np.zeros(world.probability.shape[:2])
    for _ in range(40_000):
        before, value = q, q.max(1)
        q = (world.probability * (world.reward + gamma * ~world.terminated * value[world.next_state])).sum(2)
        if np.abs(q - before).max() < 1e-13:
            break
    np.testing.assert_allclose(optimal_q(world, gamma), q, atol=1e-9)


def test_optimal_values_are_found_for_gamma_next_to_one():
    for gamma in (1 - 1e-9, np.nextafter(1.0, 0.0)):  # plain value iteration would take 10^9 sweeps and more
        assert optimal_q(tables("FrozenLake-v1"), gamma).max(1)[0] == pytest.approx(14 / 17, abs=1e-6)
        assert optimal_q(tables("CliffWalking-v1"), gamma).max(1)[36] == pytest.approx(-13, abs=1e-5)


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ([(-0.5, 0, 0.0, False), (1.5, 1, 0.0, False)], r"P\[0\]\[0\] has the probability -0.5"),
        ([(float("nan"), 0, 0.0, False)], r"P\[0\]\[0\] has the probability nan"),
        ([(0.5, 0, 0.0, False)], r"the probabilities in P\[0\]\[0\] must sum to 1, and sum to 0.5"),
        ([(1.0, 0, 1e308, False)], r"outcome 0 of P\[0\]\[0\] leads to state 0 of 2 for a reward of 1e[+]308"),
        ([(1.0, 7, 0.0, False)], r"leads to state 7 of 2"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_place(outcomes, sentence):
    class Own(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(1)
        P = {0: {0: outcomes}, 1: {0: [(1.0, 1, 0.0, True)]}}  # noqa: RUF012

    with pytest.raises(UserError, match=sentence):
        tables(Environment("own", Own), declared=True)
