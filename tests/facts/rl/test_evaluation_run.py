"""Whole runs of policy evaluation against plain loops, round by round, every draw made again."""

import json

import numpy as np
import pytest

import etude
from etude.blocks.acting.tables import optimal_q, tables
from etude.core.randomness import fold
from etude.rl.evaluation import Config, exact_value, walk

SEED = 6
SMALL = {"episodes": 7, "rounds": 3}
CASES = [
    {},
    {"states": 4, "td_learning_rate": 0.3, "monte_carlo_learning_rate": 0.2, "initial_value": 0.1},
    {"gamma": 0.7, "max_episode_steps": 3},
    {"env": "FrozenLake-v1", "gamma": 0.9, "initial_value": 0.0},
    {"env": "FrozenLake-v1", "gamma": 0.9, "policy": "optimal", "rounds": 2},
]


def first_above(shares, u):
    total = 0.0
    for index, share in enumerate(shares):
        total += share
        if u < total:
            return index
    return len(shares) - 1


def plain(config):
    """(TD values, Monte Carlo values (n, S), exact values, errors after each episode)"""
    world = walk(config.states) if config.env == "walk" else tables(config.env)
    states, actions = world.next_state.shape[:2]
    policy = np.full((states, actions), 1 / actions)
    if config.policy == "optimal":
        policy = np.eye(actions)[optimal_q(world, config.gamma).argmax(1)]
    best = exact_value(world, policy, config.gamma)
    n = config.rounds
    td, mc = (np.full((n, states), config.initial_value) for _ in range(2))
    curve = []
    for episode in range(config.episodes):
        dice = np.random.default_rng(fold(SEED, episode, 0, "episode"))
        here = [first_above(world.start, u) for u in dice.random(n)]
        going, lives = [True] * n, [[] for _ in range(n)]
        for _ in range(config.max_episode_steps):
            uniform, chance = dice.random(n), dice.random(n)
            for i in range(n):
                s = here[i]
                a = first_above(policy[s], uniform[i])
                o = first_above(world.probability[s, a], chance[i])
                s2, r, over = world.next_state[s, a, o], world.reward[s, a, o], world.terminated[s, a, o]
                if going[i]:
                    lives[i].append((s, r))
                    y = r if over else r + config.gamma * td[i, s2]
                    td[i, s] += config.td_learning_rate * (y - td[i, s])
                    if over:
                        lives[i].append(None)
                        going[i] = False
                here[i] = s2
            if not any(going):
                break
        for i in range(n):
            y = 0.0 if lives[i][-1] is None else mc[i, here[i]]
            for step in reversed([step for step in lives[i] if step]):
                y = step[1] + config.gamma * y
                mc[i, step[0]] += config.monte_carlo_learning_rate * (y - mc[i, step[0]])
        curve.append([np.mean([np.sqrt(np.mean((v[i] - best) ** 2)) for i in range(n)]) for v in (td, mc)])
    return td, mc, best, curve


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    made = {}

    def run(extra):
        key = json.dumps(extra)
        if key not in made:
            out = tmp_path_factory.mktemp("evaluation") / "run"
            made[key] = etude.run("rl/evaluation", out=out, seed=SEED, quiet=True, **SMALL | extra)
        return made[key]

    return run


@pytest.mark.parametrize("extra", CASES)
def test_loop_equals_a_plain_one(extra, run_of):
    done = run_of(extra)
    td, mc, _, curve = plain(Config(**SMALL | extra))
    model = etude.load(done.folder).model
    np.testing.assert_allclose(model.td.numpy(), td, rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.monte_carlo.numpy(), mc, rtol=0, atol=1e-12)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([[row["td_rmse"], row["monte_carlo_rmse"]] for row in rows], curve, rtol=1e-6)
    assert np.abs(td - mc).max() > 1e-3


@pytest.mark.parametrize("extra", CASES)
def test_reported_numbers_are_those_of_the_saved_values(extra, run_of):
    done, config = run_of(extra), Config(**SMALL | extra)
    model, (_, _, best, _) = etude.load(done.folder).model, plain(config)
    for name, value in (("td_rmse", model.td), ("monte_carlo_rmse", model.monte_carlo)):
        errors = [np.sqrt(np.mean((one - best) ** 2)) for one in value.numpy()]
        assert done.metrics[name] == pytest.approx(np.mean(errors), rel=1e-12)
    assert done.metrics["first_rmse"] == pytest.approx(np.sqrt(np.mean((config.initial_value - best) ** 2)), rel=1e-12)
    assert done.metrics["fixed_point_gap"] < 1e-12
    assert done.metrics["death_gap"] < 1e-12
