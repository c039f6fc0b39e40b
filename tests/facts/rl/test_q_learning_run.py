"""Whole runs of Q-learning against a plain one: Gymnasium's own tables or its own `step`, every draw made again."""

import functools
import json
import math
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import etude
from etude.core.randomness import fold
from etude.rl import q_learning
from etude.rl.q_learning import Config

SEED = 4
SMALL = {"episodes": 90, "log_every": 20, "evaluate_every": 40, "evaluation_episodes": 3}


class Ring(gymnasium.Env):
    """Five places 2 … 6 in a ring, actions −1, 0, +1 counted from −1; place 6 pays a random reward and ends it."""

    observation_space = spaces.Discrete(5, start=2)
    action_space = spaces.Discrete(3, start=-1)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(4))
        return self.place + 2, {}

    def step(self, action):
        assert action in (-1, 0, 1)
        self.place = (self.place + action) % 5
        over = self.place == 4
        return self.place + 2, float(self.np_random.normal(3)) if over else -0.1, over, False, {}


def probabilities(q, config, epsilon):
    """π(· | s) of one state, ties shared equally."""
    actions, ties = len(q), sum(v == max(q) for v in q)
    if config.exploration == "boltzmann":
        weights = [math.exp((v - max(q)) / config.temperature) for v in q]
        return [w / sum(weights) for w in weights]
    if config.exploration == "notes_epsilon_greedy" and ties == 1:
        return [1 - epsilon if v == max(q) else epsilon / (actions - 1) for v in q]
    if config.exploration == "notes_epsilon_greedy":  # each of the tied ones is the best one time in `ties`
        one = [(1 - epsilon) / ties + (ties - 1) / ties * epsilon / (actions - 1), epsilon / (actions - 1)]
        return [one[0] if v == max(q) else one[1] for v in q]
    return [(1 - epsilon) / ties * (v == max(q)) + epsilon / actions for v in q]


def first_above(shares, u):
    """The first index whose cumulative share exceeds u."""
    total = 0.0
    for index, share in enumerate(shares):
        total += share
        if u < total:
            return index
    return len(shares) - 1


class Table:
    """A toy-text world walked through its own transition table, one uniform number a reset and one a step."""

    def __init__(self, name, limit):
        self.world = gymnasium.make(name).unwrapped
        self.limit, self.states, self.actions = limit, self.world.observation_space.n, self.world.action_space.n

    def reset(self, chance):
        self.chance = chance
        self.state = first_above(self.world.initial_state_distrib, chance.random())
        return self.state

    def step(self, action):
        outcomes = self.world.P[self.state][action]
        _, self.state, reward, over = outcomes[first_above([o[0] for o in outcomes], self.chance.random())]
        return self.state, reward, over

    def score(self, q, config, purpose):
        """Expected return of the greedy policy: all that can happen, with its probability, step by step."""
        where, total = dict(enumerate(self.world.initial_state_distrib)), 0.0
        for _ in range(self.limit):
            there = {}
            for state, share in where.items():
                for p, after, reward, over in self.world.P[state][int(np.argmax(q[state]))] if share else ():
                    total += share * p * reward
                    if not over:
                        there[after] = there.get(after, 0.0) + share * p
            where = there
        return total

    def best(self, gamma):
        return best_of(self, gamma)


@functools.cache
def best_of(table, gamma):
    """Q* by value iteration in plain Python."""
    q = np.zeros((table.states, table.actions))
    for _ in range(3000):
        v = q.max(1)
        backup = lambda s, a: sum(p * (r + gamma * (not over) * v[n]) for p, n, r, over in table.world.P[s][a])  # noqa: B023, E731
        q = np.array([[backup(s, a) for a in range(table.actions)] for s in range(table.states)])
        if np.abs(q.max(1) - v).max() < 1e-13:
            break
    return q


table = functools.cache(Table)


class Stepped:
    """The ring, stepped itself."""

    def __init__(self, limit):
        self.world, self.limit, self.states, self.actions = Ring(), limit, 5, 3

    def reset(self, seed):
        return self.world.reset(seed=seed)[0] - 2

    def step(self, action):
        state, reward, over, _, _ = self.world.step(action - 1)
        return state - 2, reward, over

    def score(self, q, config, purpose):
        returns = []
        for copy in range(config.evaluation_episodes):
            state, total = self.reset(fold(SEED, 0, 0, f"{purpose}/{copy}")), 0.0
            for _ in range(self.limit):
                state, reward, over = self.step(int(np.argmax(q[state])))
                total += float(np.float32(reward))
                if over:
                    break
            returns.append(total)
        return np.mean(returns)

    def best(self, gamma):
        return None


def plain(config):
    """Algorithm 19, written plainly."""
    registered = {"FrozenLake-v1": 100}.get(config.env, 10**9)
    limit = min(registered, config.max_episode_steps)
    world = Stepped(limit) if "Ring" in config.env else table(config.env, limit)
    q, visits = np.zeros((world.states, world.actions)), np.zeros((world.states, world.actions))
    best, returns, rows, taken = world.best(config.gamma), [], [], 0
    for step in range(math.ceil(config.episodes / config.log_every)):
        dice = np.random.default_rng(fold(SEED, step, 0, "explore"))
        chance = np.random.default_rng(fold(SEED, step, 0, "world"))
        before, began = taken, len(returns)
        for number in range(step * config.log_every, min((step + 1) * config.log_every, config.episodes)):
            done = min(1.0, number / config.episodes / config.epsilon_fraction)
            epsilon = config.epsilon_start + (config.epsilon_end - config.epsilon_start) * done
            s = world.reset(fold(SEED, number, 0, "world") if "Ring" in config.env else chance)
            total = 0.0
            for _ in range(limit):
                a = first_above(probabilities(q[s], config, epsilon), dice.random())
                n, reward, over = world.step(a)
                visits[s, a] += 1
                y = reward + (0.0 if over else config.gamma * max(q[n]))
                q[s, a] += (y - q[s, a]) / visits[s, a] ** config.learning_rate_power
                total, taken, s = total + reward, taken + 1, n
                if over:
                    break
            returns.append(total)
        last = len(returns)
        row = {"step": step + 1, "episodes": last, "training_return": np.mean(returns[began:])}
        row |= {"episode_length": (taken - before) / (last - began)}
        row |= {} if config.exploration == "boltzmann" else {"epsilon": epsilon}
        if best is not None:
            row |= {"q_error": np.abs(q - best)[visits > 0].max()}
        crossed = config.evaluate_every and last // config.evaluate_every - began // config.evaluate_every
        if crossed or last == config.episodes:
            row |= {"greedy_return": world.score(q, config, f"evaluation {step}")}
        rows.append(row)
    numbers = {"greedy_return": world.score(q, config, "final evaluation"), "env_steps": taken}
    numbers |= {"training_return": np.mean(returns[-100:])}
    numbers |= {"q_error": rows[-1]["q_error"]} if best is not None else {}
    return SimpleNamespace(q=q, visits=visits, rows=rows, numbers=numbers)


def ours(settings, folder, **given):
    result = etude.run("rl/q_learning", out=folder, seed=SEED, quiet=True, **settings | given)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result.metrics, rows, etude.load(folder).model


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(q_learning, "show", lambda *arguments: None)


CHANGES = (
    {},
    {"episodes": 120},
    {"gamma": 0.7},
    {"learning_rate_power": 1.0},
    {"max_episode_steps": 6},
    {"exploration": "notes_epsilon_greedy", "epsilon_start": 0.9},
    {"exploration": "boltzmann"},
    {"exploration": "boltzmann", "temperature": 0.9},
    {"epsilon_start": 0.6, "epsilon_end": 0.3, "epsilon_fraction": 0.9},
    {"log_every": 45, "evaluate_every": 0},
)


@pytest.mark.parametrize(
    ("env", "changes"),
    [("FrozenLake-v1", {}), *((env, changes) for env in ("CliffWalkingSlippery-v1", "Ring") for changes in CHANGES)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "base",
)
def test_loop_equals_a_plain_one_under_every_setting(env, changes, no_film, tmp_path):
    settings = SMALL | ({"max_episode_steps": 30, "episodes": 50} if env[0] == "C" else {}) | changes
    want = plain(Config(**settings, env=env))
    metrics, rows, model = ours(settings, tmp_path / "run", env=Ring if env == "Ring" else env)
    assert len(rows) == len(want.rows)
    for row, other in zip(rows, want.rows):
        assert row == pytest.approx(other, rel=1e-9, abs=1e-9)
    assert metrics == pytest.approx(want.numbers, rel=1e-9, abs=1e-9)
    np.testing.assert_array_equal(model.visits, want.visits)
    np.testing.assert_allclose(model.q, want.q, rtol=1e-9, atol=1e-12)
    if changes:
        usual = {"episodes": 50, "max_episode_steps": 30, "log_every": 20}
        base = plain(Config(**settings | {name: usual.get(name, getattr(Config(), name)) for name in changes}, env=env))
        assert not np.allclose(base.q, want.q, atol=1e-6), "the setting that is tested must matter"


def test_reported_numbers_are_those_of_the_saved_table(tmp_path):
    metrics, rows, model = ours({"preset": "tiny"}, tmp_path / "run")
    q, visits, lake = model.q.numpy(), model.visits.numpy(), table("FrozenLake-v1", 100)
    assert metrics["greedy_return"] == pytest.approx(lake.score(q, None, ""), abs=1e-12)
    assert metrics["env_steps"] == visits.sum()
    assert metrics["q_error"] == pytest.approx(np.abs(q - lake.best(0.99))[visits > 0].max(), abs=1e-9)
    assert rows[-1]["greedy_return"] == metrics["greedy_return"]
    assert rows[-1]["training_return"] == pytest.approx(metrics["training_return"])  # the last 100 of 600 episodes
    assert sum(row["episode_length"] * 100 for row in rows) == pytest.approx(metrics["env_steps"])
    one_hot = torch.eye(16, dtype=torch.float64)
    assert torch.equal(model(one_hot), model.q)
