"""Values by linear algebra and by closed forms, the targets by hand, and what discounting means."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

import etude
from etude.blocks.acting.tables import tables
from etude.core.errors import UserError
from etude.rl.evaluation import action_values, draw, exact_value, rmse, td_targets, walk, with_death

LAKE = tables("FrozenLake-v1")


def uniform(world):
    states, actions = world.next_state.shape[:2]
    return np.full((states, actions), 1 / actions)


@pytest.mark.parametrize("states", [1, 2, 5, 19])
def test_the_walk_has_its_closed_form(states):
    """V(i) = i / (n + 1) of places 1 … n (Sutton & Barto, example 6.2)."""
    world = walk(states)
    want = np.arange(1, states + 1) / (states + 1)
    np.testing.assert_allclose(exact_value(world, uniform(world), 1.0), want, rtol=0, atol=1e-12)
    assert world.start.argmax() == states // 2


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_the_exact_value_is_the_sum_of_all_that_may_come(gamma):
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 16)
    value = np.zeros(16)
    for _ in range(4000):
        after = np.zeros(16)
        for s in range(16):
            for a in range(4):
                for o, p in enumerate(LAKE.probability[s, a]):
                    behind = 0.0 if LAKE.terminated[s, a, o] else value[LAKE.next_state[s, a, o]]
                    after[s] += policy[s, a] * p * (LAKE.reward[s, a, o] + gamma * behind)
        if np.abs(after - value).max() < 1e-13:
            break
        value = after
    np.testing.assert_allclose(exact_value(LAKE, policy, gamma), value, rtol=0, atol=1e-9)


def test_advantages_have_mean_zero_and_td_rests_at_the_value():
    """E85, E86: Σ_a π(a | s) A(s, a) = 0 in every state, which is TD(0)'s fixed point."""
    policy = np.random.default_rng(1).dirichlet(np.ones(4), 16)
    value = exact_value(LAKE, policy, 0.95)
    advantage = action_values(LAKE, value, 0.95) - value[:, None]
    np.testing.assert_allclose((policy * advantage).sum(1), 0, atol=1e-12)
    assert np.abs(advantage).max() > 1e-3


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.99])
def test_discounting_is_dying(gamma):
    """7.4.4.2: undiscounted values of the world with death are the discounted values of the world without."""
    for world in (LAKE, walk(7)):
        dying = with_death(world, gamma)
        np.testing.assert_allclose(dying.probability.sum(2), 1, atol=1e-12)
        assert dying.terminated[..., -1].all()
        one, other = exact_value(dying, uniform(world), 1.0), exact_value(world, uniform(world), gamma)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_targets_by_hand():
    """E93 and E87: nothing behind a termination; what stands behind is a number, no variable."""
    got = td_targets(np.array([1.0, 1.0, 0.0]), np.array([False, True, False]), np.array([2.0, 2.0, -3.0]), 0.5)
    assert got.tolist() == [2.0, 1.0, -1.5]


def test_monte_carlo_targets_are_filtered_rewards():
    reward = np.random.default_rng(2).normal(size=50)
    want = lfilter([1], [1, -0.9], reward[::-1])[::-1]
    y = np.zeros(1)
    for t in reversed(range(50)):
        y = td_targets(reward[t : t + 1], np.array([t == 49]), y, 0.9)
        assert y[0] == pytest.approx(want[t], abs=1e-12)


def test_draws_follow_their_shares():
    dice = np.random.default_rng(3)
    shares = np.array([0.2, 0.0, 0.5, 0.3])
    drawn = draw(np.broadcast_to(shares, (40_000, 4)), dice.random(40_000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 40_000, shares, atol=0.01)
    assert draw(np.array([[0.1] * 10]), np.array([1 - 1e-16])).tolist() == [9]  # rounding falls off no end


def test_rmse_is_the_mean_over_rounds_of_roots():
    assert rmse(np.array([[1.0, 1.0], [3.0, 5.0]]), np.array([0.0, 1.0])) == pytest.approx(
        (np.sqrt(0.5) + np.sqrt(12.5)) / 2
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"env": "CartPole-v1"}, "no table of probabilities"),
        ({"env": "CliffWalking-v1", "policy": "optimal", "gamma": 0.0, "td_learning_rate": 0.0}, "td-learning-rate"),
    ],
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/evaluation", out=tmp_path / "run", quiet=True, **settings)


def test_a_policy_that_never_ends_has_no_undiscounted_value():
    world = walk(3)
    left = np.tile([1.0, 0.0], (3, 1))
    staying = world.next_state.copy()
    staying[0, 0] = 0
    endless = type(world)(staying, world.reward - 1, np.zeros_like(world.terminated), world.probability, world.start)
    with pytest.raises(UserError, match="gives no finite values"):
        exact_value(endless, left, 1.0)
    assert np.isfinite(exact_value(endless, left, 0.9)).all()


def test_the_module_answers_with_mean_values(tmp_path):
    done = etude.run("rl/evaluation", preset="tiny", out=tmp_path / "run", quiet=True)
    model = etude.load(done.folder).model
    torch.testing.assert_close(model(torch.eye(5)), model.td.mean(0))
