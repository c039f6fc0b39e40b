"""Whole runs of dynamic programming against plain loops over Gymnasium's own table, and every returned number again."""

import json

import gymnasium
import numpy as np
import pytest

import etude
from etude.rl.dynamic_programming import Config


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A run with these settings, made once for all tests here."""
    made = {}

    def run(extra):
        key = json.dumps(extra)
        if key not in made:
            out = tmp_path_factory.mktemp("planning") / "run"
            made[key] = etude.run("rl/dynamic_programming", out=out, quiet=True, **extra)
        return made[key]

    return run


CASES = [
    {},
    {"evaluation_sweeps": 3, "tolerance": 1e-4},
    {"algorithm": "value_iteration", "tolerance": 1e-4, "gamma": 0.9},
    {"algorithm": "value_iteration", "iterations": 7},
    {"env": "CliffWalking-v1"},
]


def backup(table, value, gamma):
    """Q by three loops over P as Gymnasium gives it."""
    return np.array(
        [
            [sum(p * (r + gamma * (0.0 if over else value[s2])) for p, s2, r, over in table[s][a]) for a in table[s]]
            for s in sorted(table)
        ]
    )


def exact_value(table, policy, gamma):
    matrix, gain = np.eye(len(policy)), np.zeros(len(policy))
    for s, a in enumerate(policy):
        for p, s2, r, over in table[s][a]:
            gain[s] += p * r
            matrix[s, s2] -= 0.0 if over else gamma * p
    return np.linalg.inv(matrix) @ gain


def plain(table, states, config):
    """(V, π, logged rows) by Algorithms 13 to 15."""
    value, policy, rows = np.zeros(states), np.zeros(states, int), []
    for _ in range(config.iterations):
        before, old = value.copy(), policy.copy()
        if config.algorithm == "policy_iteration" and not config.evaluation_sweeps:
            value = exact_value(table, policy, config.gamma)
        elif config.algorithm == "policy_iteration":
            for _ in range(config.evaluation_sweeps):
                value = backup(table, value, config.gamma)[np.arange(states), policy]
        q = backup(table, value, config.gamma)
        for s in range(states):
            if q[s].max() > q[s, policy[s]] + 1e-12 * max(1.0, abs(q[s].max())):
                policy[s] = (q[s] >= q[s].max() - 1e-12 * max(1.0, abs(q[s].max()))).argmax()
        if config.algorithm == "value_iteration":
            value = q.max(1)
        change, moved = np.abs(value - before).max(), (policy != old).sum()
        rows.append((change, moved))
        exact = config.algorithm == "policy_iteration" and not config.evaluation_sweeps
        if moved == 0 and (exact or change <= config.tolerance):
            break
    return value, policy, rows


@pytest.mark.parametrize("extra", CASES)
def test_loop_equals_a_plain_one(extra, run_of):
    done = run_of(extra)
    config = Config(**extra)
    world = gymnasium.make(config.env).unwrapped
    value, policy, rows = plain(world.P, world.observation_space.n, config)
    model = etude.load(done.folder).model
    np.testing.assert_allclose(model.value.numpy(), value, rtol=1e-9, atol=1e-12)
    assert (model.policy.numpy() == policy).all()
    logged = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["changed_actions"] for row in logged] == [moved for _, moved in rows]
    np.testing.assert_allclose([row["change"] for row in logged], [change for change, _ in rows], rtol=1e-6, atol=1e-12)
    assert logged[-1]["start_value"] == pytest.approx(value @ world.initial_state_distrib, rel=1e-9)


@pytest.mark.parametrize("extra", [*CASES, {"max_episode_steps": 30}])
def test_reported_numbers_are_those_of_the_saved_plan(extra, run_of):
    done = run_of(extra)
    config = Config(**extra)
    env = gymnasium.make(config.env)
    world, model = env.unwrapped, etude.load(done.folder).model
    value, policy = model.value.numpy(), model.policy.numpy()
    got = done.metrics
    assert got["start_value"] == pytest.approx(world.initial_state_distrib @ value, rel=1e-12)
    error = np.abs(backup(world.P, value, config.gamma).max(1) - value).max()
    assert got["bellman_error"] == pytest.approx(error, rel=1e-6, abs=1e-14)
    _, _, rows = plain(world.P, len(value), config)
    assert got["iterations"] == len(rows)
    assert got["sweeps"] == len(rows) * (1 + config.evaluation_sweeps)
    limit = min(config.max_episode_steps, env.spec.max_episode_steps or 10**9)
    here, total = {s: p for s, p in enumerate(world.initial_state_distrib) if p}, 0.0
    for _ in range(limit):  # the distribution over states, step by step
        there = {}
        for s, share in here.items():
            for p, s2, r, over in world.P[s][policy[s]]:
                total += share * p * r
                if not over:
                    there[s2] = there.get(s2, 0.0) + share * p
        here = there
    assert got["greedy_return"] == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_an_episode_can_be_sampled(run_of):
    assert "return -13" in str(etude.sample(run_of({"env": "CliffWalking-v1"}).folder, count=1))
