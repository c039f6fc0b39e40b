"""Exploration as probabilities, the update by hand, compiled episodes against Gymnasium's own, clear refusals."""

import gymnasium
import numpy as np
import pytest
from scipy.stats import chisquare

import etude
from etude.blocks.acting.environments import environment
from etude.blocks.acting.tables import tables
from etude.core.errors import UserError
from etude.rl import q_learning
from etude.rl.q_learning import (
    boltzmann,
    choose,
    compiled,
    draw,
    episodes_in_environment,
    epsilon_greedy,
    linear,
    spread,
    update,
)

Q = np.array([[0.3, 1.0, -2.0, 0.9]])


def test_epsilon_greedy_in_both_conventions():  # E94
    np.testing.assert_allclose(epsilon_greedy(Q, 0.2)[0], [0.05, 0.85, 0.05, 0.05])
    np.testing.assert_allclose(epsilon_greedy(Q, 0.2, notes=True)[0], [0.2 / 3, 0.8, 0.2 / 3, 0.2 / 3])
    np.testing.assert_allclose(epsilon_greedy(Q, 0.0)[0], [0, 1, 0, 0])
    np.testing.assert_allclose(epsilon_greedy(Q, 1.0)[0], [0.25] * 4)
    np.testing.assert_allclose(epsilon_greedy(Q, 1.0, notes=True)[0], [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-15)
    np.testing.assert_allclose(epsilon_greedy(np.zeros((2, 3)), 0.4), np.full((2, 3), 1 / 3))
    np.testing.assert_allclose(epsilon_greedy(np.array([[1.0, 1.0, 0.0]]), 0.3)[0], [0.45, 0.45, 0.1])
    assert epsilon_greedy(np.zeros((1, 1)), 0.5).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="single action"):
        epsilon_greedy(np.zeros((1, 1)), 0.5, notes=True)


def test_boltzmann_limits_and_invariance():
    np.testing.assert_allclose(boltzmann(Q, 1e-3)[0], [0, 1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(boltzmann(Q, 1e9)[0], [0.25] * 4, atol=1e-8)
    np.testing.assert_allclose(boltzmann(Q + 1e4, 0.7), boltzmann(Q, 0.7), rtol=1e-9)
    np.testing.assert_allclose(boltzmann(Q, 2.0)[0], np.exp(Q[0] / 2) / np.exp(Q[0] / 2).sum(), rtol=1e-12)
    assert np.isfinite(boltzmann(Q * 1e6, 1e-3)).all()


@pytest.mark.parametrize("kind", ["standard", "notes", "boltzmann"])
def test_drawn_actions_have_these_frequencies(kind):
    if kind == "boltzmann":
        probability, epsilon, temperature = boltzmann(Q, 0.8), 0.0, 0.8
    else:
        probability = epsilon_greedy(Q, 0.3, notes=kind == "notes")
        epsilon, temperature = spread(0.3, 4) if kind == "notes" else 0.3, 0.0
    uniform = np.random.default_rng(0).random(30_000)
    drawn = draw(np.repeat(probability, len(uniform), 0), uniform)
    assert chisquare(np.bincount(drawn, minlength=4), probability[0] * len(uniform)).pvalue > 1e-3
    scalar = [choose(Q[0], epsilon, temperature, u) for u in uniform[:5000]]
    np.testing.assert_array_equal(scalar, drawn[:5000])  # the one-row form is the same function


def test_draw_at_the_ends_of_the_interval():
    probability = np.array([[0.0, 0.5, 0.5, 0.0]] * 3)
    assert draw(probability, np.array([0.0, 0.5, np.nextafter(1.0, 0)])).tolist() == [1, 2, 2]


def test_schedule_is_the_closed_form():
    assert [linear(1.0, 0.1, 0.5, x) for x in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert linear(1.0, 0.1, 0.0, 0.0) == 0.1


def test_update_by_hand():
    q, visits = np.array([[1.0, 2.0], [5.0, 3.0]]), np.zeros((2, 2))
    update(q, visits, 0, 1, 0.5, False, 1, 0.9, 0.5)  # first visit: α = 1
    assert q[0, 1] == 0.5 + 0.9 * 5
    update(q, visits, 0, 1, 1.0, True, 1, 0.9, 0.5)  # α = 1/√2, nothing behind the end
    assert q[0, 1] == pytest.approx(5.0 - (5.0 - 1.0) / np.sqrt(2))
    assert q[0, 0] == 1.0
    assert q[1].tolist() == [5.0, 3.0]
    assert visits.tolist() == [[0, 2], [0, 0]]


def test_fixed_point_on_a_one_state_loop():
    q, visits = np.zeros((1, 1)), np.zeros((1, 1))
    for _ in range(2000):
        update(q, visits, 0, 0, 2.0, False, 0, 0.9, 0.0)
    assert q[0, 0] == pytest.approx(2.0 / (1 - 0.9), abs=1e-9)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalkingSlippery-v1", "Taxi-v4"])
def test_compiled_episodes_are_those_of_the_environment(name):
    world, env = tables(name), gymnasium.make(name, disable_env_checker=True)
    shape, limit = world.probability.shape[:2], environment(name).limit(50)
    ours, theirs = [(np.zeros(shape), np.zeros(shape), np.random.default_rng(9)) for _ in range(2)]
    for seed in range(12):
        epsilon = np.array([0.7])
        (q, visits, dice), stream = ours, np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        outcomes = (world.next_state, world.reward, world.terminated, world.cumulative, world.cumulative_start)
        fast = compiled()(q, visits, *outcomes, epsilon, 0.0, 0.95, 0.7, limit, stream, dice)
        q, visits, dice = theirs
        slow = episodes_in_environment(env, [seed], q, visits, epsilon, 0.0, 0.95, 0.7, limit, dice)
        assert fast[0] == slow[0]
        assert fast[1] == slow[1]
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)  # pow differs in the last bit between the two
    assert ours[1].sum() > 60


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("CartPole-v1", "use rl/dqn for it"),
        ("FrozenLake-v7", "did you mean 'FrozenLake"),
        ("Pendulum-v1", "needs discrete actions"),  # rl/dqn would be no help for these two
        ("Blackjack-v1", "Box and Discrete observations are supported"),
    ],
)
def test_unusable_environments_are_answered(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        etude.run("rl/q_learning", env=name, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_any_discrete_environment_runs_without_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(q_learning, "tables", lambda env: None)
    run = {
        "env": "CliffWalking-v1",
        "episodes": 150,
        "log_every": 50,
        "learning_rate_power": 0.0,
        "gamma": 0.99,
        "epsilon_end": 0.0,
    }
    result = etude.run(
        "rl/q_learning", out=tmp_path / "run", quiet=True, max_episode_steps=100, evaluation_episodes=2, **run
    )
    assert result.metrics["greedy_return"] == -13.0
