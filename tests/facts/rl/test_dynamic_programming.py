"""Exact planning: the backups by a double loop, values by linear algebra and a linear program, and what E91 and E93 cost."""

import itertools
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from scipy.optimize import linprog

import etude
from etude.blocks.acting.environments import Environment
from etude.blocks.acting.tables import Tables, expected_return, optimal_q, tables
from etude.core.errors import UserError
from etude.rl.dynamic_programming import action_values, improve, operator, settled, solve, sweep
from etude.rl.parts.nulls import rested

LAKE = tables("FrozenLake-v1")


def random_world(seed, states=6, actions=3, outcomes=2):
    """Terminations lead to states that are worth something, so that a missing mask is seen."""
    dice = np.random.default_rng(seed)
    shape = (states, actions, outcomes)
    return Tables(
        dice.integers(states, size=shape),
        dice.normal(size=shape),
        dice.random(shape) < 0.2,
        dice.dirichlet(np.ones(outcomes), (states, actions)),
        dice.dirichlet(np.ones(states)),
    )


def dense(world, policy, gamma):
    """P_π (S, S) without what leads to a termination, and r_π (S,), written out."""
    states = len(policy)
    move, gain = np.zeros((states, states)), np.zeros(states)
    for s in range(states):
        for o, p in enumerate(world.probability[s, policy[s]]):
            gain[s] += p * world.reward[s, policy[s], o]
            if not world.terminated[s, policy[s], o]:
                move[s, world.next_state[s, policy[s], o]] += p
    return move, gain


@pytest.mark.parametrize("seed", range(3))
def test_action_values_are_those_of_a_double_loop(seed):
    world, value = random_world(seed), np.random.default_rng(seed).normal(size=6)
    q = np.zeros((6, 3))
    for s in range(6):
        for a in range(3):
            for o in range(2):
                behind = 0.0 if world.terminated[s, a, o] else value[world.next_state[s, a, o]]
                q[s, a] += world.probability[s, a, o] * (world.reward[s, a, o] + 0.9 * behind)
    np.testing.assert_allclose(action_values(world, value, 0.9), q, rtol=0, atol=1e-12)
    gain, leads = operator(world, 0.9)  # the same of all in one product
    np.testing.assert_allclose((gain + leads @ value).reshape(6, 3), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_solve_and_many_sweeps_give_the_value_of_the_policy(seed):
    world, policy = random_world(seed), np.random.default_rng(seed).integers(3, size=6)
    move, gain = dense(world, policy, 0.9)
    series, power = np.zeros(6), np.eye(6)
    for _ in range(600):  # V = Σ_t γ^t P^t r
        series, power = series + power @ gain, 0.9 * power @ move
    np.testing.assert_allclose(solve(*operator(world, 0.9), policy), series, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sweep(*operator(world, 0.9), policy, np.zeros(6), 600), series, rtol=0, atol=1e-12)
    once = gain + 0.9 * move @ series[::-1]
    np.testing.assert_allclose(sweep(*operator(world, 0.9), policy, series[::-1].copy(), 1), once, rtol=0, atol=1e-12)


def iterate(world, gamma):
    """Policy iteration; every policy and its value on the way."""
    policy, path = np.zeros(len(world.start), np.int64), []
    while True:
        value = solve(*operator(world, gamma), policy)
        path.append((policy, value))
        better = improve(action_values(world, value, gamma), policy)
        if (better == policy).all():
            return path
        policy = better


@pytest.mark.parametrize("world", [LAKE, *map(random_world, range(3))], ids=["lake", "0", "1", "2"])
def test_every_improvement_is_one_and_the_end_solves_the_linear_program(world):
    """min Σ_s V(s) over V(s) ≥ Q_V(s, a) for every action has V* as its only solution."""
    path = iterate(world, 0.9)
    for (_, before), (_, after) in itertools.pairwise(path):
        assert (after >= before - 1e-12).all()
        assert (after > before + 1e-9).any()
    states, actions = world.next_state.shape[:2]
    rows, limits = [], []
    for a in range(actions):
        move, gain = dense(world, np.full(states, a), 0.9)
        rows.append(0.9 * move - np.eye(states))
        limits.append(-gain)
    found = linprog(np.ones(states), np.concatenate(rows), np.concatenate(limits), bounds=(None, None))
    np.testing.assert_allclose(path[-1][1], found.x, rtol=0, atol=1e-7)
    np.testing.assert_allclose(path[-1][1], optimal_q(world, 0.9).max(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_value_iteration_contracts(seed):
    world = random_world(seed)
    best, value = iterate(world, 0.9)[-1][1], np.random.default_rng(seed).normal(size=6) * 10
    for _ in range(30):
        after = action_values(world, value, 0.9).max(1)
        assert np.abs(after - best).max() <= 0.9 * np.abs(value - best).max() + 1e-12
        value = after


def test_the_lake_has_its_known_values():
    """Catalogue: V*(start) at two discounts, 14/17 as γ → 1, 7 rounds, success within 100 steps."""
    for gamma, known in ((0.9, 0.0688909), (0.99, 0.5420259), (1 - 1e-9, 14 / 17)):
        assert iterate(LAKE, gamma)[-1][1][0] == pytest.approx(known, abs=6e-8)
    path = iterate(LAKE, 0.99)
    assert len(path) == 7
    assert expected_return(LAKE, path[-1][0], 100) == pytest.approx(0.740165, abs=1e-6)


def test_equally_good_actions_do_not_take_turns():
    q = np.array([[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-15, 2.0], [3.0, 3.0 - 1e-14, 0.0]])
    assert improve(q, np.array([1, 0, 1])).tolist() == [1, 2, 1]
    assert improve(q, np.array([2, 2, 2])).tolist() == [0, 2, 0]


def test_one_sweep_is_not_an_evaluation():
    """E91: on the lake the policy rests after one sweep, before any value has moved."""
    policy, value = np.zeros(16, np.int64), np.zeros(16)
    after = sweep(*operator(LAKE, 0.99), policy, value, 1)
    assert (improve(action_values(LAKE, after, 0.99), policy) == policy).all() or after[0] == 0
    assert after[0] == 0 < solve(*operator(LAKE, 0.99), iterate(LAKE, 0.99)[-1][0])[0]
    assert rested(True, 1.0, False, 1e-9)
    assert not settled(True, 1.0, False, 1e-9)
    assert settled(True, 1e-10, False, 1e-9)
    assert settled(True, 1.0, True, 1e-9)
    assert not settled(False, 0.0, True, 1e-9)


def test_behind_a_termination_nothing_is_worth_anything():
    """E93: what stands behind a termination does not reach any value."""
    world = random_world(0)
    rich = np.where(world.terminated, 5, world.next_state)
    value = np.array([0.0, 0, 0, 0, 0, 1e6])
    kept = replace(world, next_state=np.where(world.terminated, 0, world.next_state))
    masked = action_values(replace(world, next_state=rich), value, 0.9)
    np.testing.assert_array_equal(masked, action_values(kept, value, 0.9))
    gain, leads = operator(replace(world, next_state=rich), 0.9)
    np.testing.assert_allclose((gain + leads @ value).reshape(6, 3), masked, rtol=0, atol=1e-9)


class Walk(gymnasium.Env):
    """Four places in a row; at the right end 1 is paid, and it is over. Moving fails one time in five."""

    observation_space, action_space = spaces.Discrete(4), spaces.Discrete(2)
    metadata = {"render_modes": []}  # noqa: RUF012
    initial_state_distrib = (1.0, 0.0, 0.0, 0.0)
    wrong: tuple = ()

    def __init__(self):
        self.P = {
            s: {
                a: [
                    (0.8, min(max(s + 2 * a - 1, 0), 3), float(s == 2 and a == 1), s == 2 and a == 1),
                    (0.2, s, 0.0, False),
                ]
                for a in range(2)
            }
            for s in range(4)
        }
        if self.wrong:
            self.P[1][1][0] = self.wrong

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        return 0, {}

    def step(self, action):
        chances = self.P[self.s][int(action)]
        _, self.s, reward, over = chances[int(self.np_random.random() > chances[0][0])]
        return self.s, reward, over, False, {}


def test_a_world_of_ones_own_is_planned_in(tmp_path):
    """V of three moves that each take a geometric number of tries: (0.8 / (1 − 0.2 γ))³ γ²."""
    done = etude.run("rl/dynamic_programming", env=Walk, gamma=0.9, out=tmp_path / "run", quiet=True)
    assert done.metrics["start_value"] == pytest.approx((0.8 / (1 - 0.18)) ** 3 * 0.81, rel=1e-12)
    assert tables(Environment("walk", Walk, own=True)) is None  # q_learning steps it itself


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((0.7, 2, 0.0, False), r"P\[1\]\[1\] must sum to 1, and sum to 0.9"),
        ((0.8, 4, 0.0, False), r"outcome 0 of P\[1\]\[1\] leads to state 4 of 4"),
        ((0.8, 2, float("nan"), False), "for a reward of nan"),
        ((0.8, 2), "P that cannot be read"),
    ],
)
def test_a_wrong_table_is_said_in_a_sentence(wrong, said):
    kind = Environment("walk", type("Wrong", (Walk,), {"wrong": wrong}), own=True)
    with pytest.raises(UserError, match=said):
        tables(kind, declared=True)


def test_a_wrong_start_is_said_in_a_sentence():
    kind = Environment("walk", type("Wrong", (Walk,), {"initial_state_distrib": (0.5, 0.5)}), own=True)
    with pytest.raises(UserError, match="must be 4 probabilities"):
        tables(kind, declared=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"env": "CartPole-v1"}, "no table of probabilities"),
        ({"algorithm": "value_iteration", "evaluation_sweeps": 3}, "value iteration evaluates nothing"),
    ],
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/dynamic_programming", out=tmp_path / "run", quiet=True, **settings)
