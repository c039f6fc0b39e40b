"""Whole runs of fitted iteration against a plain one: numpy's least squares, autograd and torch's Adam, dictionaries of rows.

The plain run shares with the method the drawing of rows (`collect`) and the trees (`Trees`), which have tests of their own.
"""

import json
from itertools import pairwise
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from sklearn.preprocessing import PolynomialFeatures
from torch import nn

import etude
from etude.blocks.acting.environments import environment
from etude.blocks.acting.tables import optimal_q, tables
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.rl import fitted
from etude.rl.fitted import Config
from etude.rl.parts.transitions import collect
from etude.rl.parts.trees import Trees, most_nodes

SEED = 3
LAKE = {"env": "FrozenLake-v1", "features": "tabular", "transitions": 400, "iterations": 5, "gamma": 0.9}
POLE = {"transitions": 200, "iterations": 4, "gamma": 0.9, "evaluation_episodes": 3, "max_episode_steps": 30}
POLE |= {"widths": (7,), "updates": 4, "batch": 16, "learning_rate": 0.01, "trees": 4, "leaf": 6, "evaluate_every": 2}

CASES = (
    LAKE,
    LAKE | {"transitions": 0},
    LAKE | {"transitions": 0, "form": "fitted_value"},
    LAKE | {"form": "fitted_value"},
    LAKE | {"form": "fitted_q", "uniform_share": 0.3},
    LAKE | {"features": "linear", "degree": 3, "constant": False},
    LAKE | {"l2": 2.0, "initial_weight": 0.5},
    LAKE | {"iterations": 300, "tolerance": 1e-3, "evaluate_every": 50, "max_episode_steps": 20},
    LAKE | {"features": "trees", "trees": 3, "leaf": 4, "transitions": 0, "form": "fitted_value", "freeze": 3},
    POLE,
    POLE | {"widths": (5, 4), "updates": 6, "batch": 8, "learning_rate": 0.003},
    POLE | {"form": "fitted_q", "uniform_share": 0.5},
    POLE | {"features": "linear", "degree": 2},
    POLE | {"features": "trees"},
    POLE | {"features": "trees", "freeze": 2},
    POLE | {"features": "trees", "form": "fitted_q", "freeze": 2},
)


class Table:
    """Means of targets, or least squares on polynomials of the place, with a quarter of the penalty's textbook form."""

    def __init__(self, config, outputs, psi, size):
        self.config, self.psi = config, psi
        self.w = np.full((psi(np.eye(size)).shape[1] if size else 0, outputs), float(config.initial_weight))

    def __call__(self, x):
        return self.psi(x) @ self.w

    def fit(self, x, a, y, step):
        psi, l2 = self.psi(x), self.config.l2
        for output in range(self.w.shape[1]):
            rows = a == output
            if l2:
                gram = psi[rows].T @ psi[rows] + l2 * np.eye(psi.shape[1])
                self.w[:, output] = np.linalg.solve(gram, psi[rows].T @ y[rows])
            else:
                self.w[:, output] = np.linalg.lstsq(psi[rows], y[rows], rcond=None)[0]


class Forest:
    def __init__(self, config, outputs, rows, z):
        self.config, self.z = config, z
        self.trees = Trees(config.trees, most_nodes(rows, outputs, config.leaf), outputs)

    def __call__(self, x):
        return self.trees(torch.from_numpy(self.z(x))).numpy()

    def fit(self, x, a, y, step):
        if step < self.config.freeze:
            self.trees.fit(self.z(x), a, y, self.config.leaf, fold(SEED, step, 0, "trees"))
            return
        feature, cut, left, value = self.trees.arrays()
        for t in range(len(value)):
            bins = {}
            for row, action, target in zip(self.z(x), a, y):
                node = action
                while feature[t, node] >= 0:
                    node = left[t, node] + int(row[feature[t, node]] > cut[t, node])
                bins.setdefault(node, []).append(target)
            for node, members in bins.items():
                value[t, node] = np.mean(members)


class Net:
    def __init__(self, config, outputs, size, z):
        self.config, self.z = config, z
        torch.manual_seed(fold(SEED, 0, 0, "init"))
        layers = [part for a, b in pairwise((size, *config.widths, outputs)) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])
        self.adam = torch.optim.Adam(self.net.parameters(), lr=config.learning_rate)

    def __call__(self, x):
        with torch.no_grad():
            return self.net(torch.from_numpy(self.z(x)).float()).double().numpy()

    def fit(self, x, a, y, step):
        size = (self.config.updates, self.config.batch)
        z, target = torch.from_numpy(self.z(x)).float(), torch.from_numpy(y).float()
        for batch in torch.randint(len(y), size, generator=generator(SEED, step, 0, "minibatches")):
            q = self.net(z[batch])[torch.arange(len(batch)), torch.from_numpy(a)[batch]]
            loss = 0.5 * ((q - target[batch]) ** 2).mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()


def greedy_return(config, policy, purpose, world):
    """Exact by the distribution over states, or by episodes in worlds of Gymnasium."""
    env = gymnasium.make(config.env)
    limit = min(config.max_episode_steps, env.spec.max_episode_steps)
    if world is not None:
        here, total = {0: 1.0}, 0.0
        acts = policy(np.eye(16))
        for _ in range(limit):
            there = {}
            for s, share in here.items():
                for p, n, r, over in env.unwrapped.P[s][acts[s]]:
                    total += share * p * r
                    if not over:
                        there[n] = there.get(n, 0.0) + share * p
            here = there
        return total
    count = config.evaluation_episodes
    env = gymnasium.make_vec(config.env, num_envs=count, vectorization_mode="vector_entry_point")
    state, _ = env.reset(seed=fold(SEED, 0, 0, purpose))
    returns, going = np.zeros(count), np.ones(count, bool)
    for _ in range(limit):
        state, reward, terminated, truncated, _ = env.step(policy(state))
        returns += going * reward
        going &= ~(terminated | truncated)
    return returns.mean()


def plain(config):
    """The run written plainly. Gives its rows, numbers and function."""
    kind = environment(config.env)
    world, table = tables(kind), getattr(kind.make().unwrapped, "P", None)
    best = optimal_q(world, config.gamma) if world is not None else None
    size, actions = (16, 4) if world is not None else (4, 2)
    outputs = 1 if config.form == "fitted_value" else actions
    fresh = config.form == "fitted_q" and config.transitions
    function = mean = None

    def policy(x):
        if config.form != "fitted_value":
            return function(x).argmax(1)
        v = function(np.eye(16))[:, 0]
        look = [
            [sum(p * (r + config.gamma * (0 if over else v[n])) for p, n, r, over in table[s][a]) for a in range(4)]
            for s in range(16)
        ]
        return np.array(look).argmax(1)[x.argmax(1)]

    def z(x):
        return x if world is not None else (x - mean) / deviation

    def psi(x):
        if config.features == "tabular":
            return x
        inputs = z(x) if world is None else np.stack(np.divmod(x.argmax(1), 4), 1) / 1.5 - 1
        return PolynomialFeatures(config.degree, include_bias=config.constant).fit_transform(inputs)

    rows, change = [], 0.0
    data = None
    for step in range(config.iterations):
        if data is None or fresh:
            drawn = ()
            if config.transitions:
                start = Net(
                    config, outputs, size, lambda x: 0 * x
                )  # before the first fit: nothing of the state is seen
                greedy = policy if function else lambda x, start=start: start(x).argmax(1)
                drawn = collect(
                    kind, config.transitions, fold(SEED, step if fresh else 0, 0, "data"), config.uniform_share, greedy
                )
            if world is not None and (not drawn or outputs == 1):
                visited = drawn[0].argmax(1) if drawn else range(16)
                pairs = [(s, a) for s in visited for a in range(4)]
                moves = [table[s][a] for s, a in pairs]
                points = np.eye(16)
                data = [(s, a, [(p, r, o, np.eye(16)[n]) for p, n, r, o in move]) for (s, a), move in zip(pairs, moves)]
                action = np.array([a for _, a in pairs])
            else:
                points = np.eye(16) if world is not None else np.concatenate([drawn[0], drawn[3]]).astype(float)
                action = drawn[1]
                data = [(i, a, [(1.0, float(r), o, n.astype(float))]) for i, (a, r, n, o) in enumerate(zip(*drawn[1:]))]
            x = np.eye(16)[[row[0] for row in data]] if world is not None and not (drawn and outputs > 1) else drawn[0]
            x = np.asarray(x, float)
            if outputs == 1:
                x, action = x[::4], np.zeros(len(x) // 4, np.int64)
            if step == 0:
                mean, deviation = points.mean(0), points.std(0)
                if config.features == "mlp":
                    function = Net(config, outputs, size, z)
                elif config.features == "trees":
                    function = Forest(config, outputs, config.transitions or size * actions, z)
                else:
                    function = Table(config, outputs, psi, size)
            behind = np.stack([n for _, _, moves in data for *_, n in moves])
        zero = step == 0 and config.features == "mlp"
        before, follow = (np.zeros(len(part)) if zero else function(part).max(1) for part in (points, behind))
        each, k = [], 0
        for _, _, moves in data:
            total = 0.0
            for p, r, over, _ in moves:
                total += p * (r + (0.0 if over else config.gamma * follow[k]))
                k += 1
            each.append(total)
        y = np.array(each).reshape(len(x), -1).max(1)
        function.fit(x, action, y, step)
        after, last = function(points).max(1), change
        change, got = np.abs(after - before).max(), function(x)[np.arange(len(x)), action]
        row = {"step": step + 1, "largest_value": np.abs(after).max(), "change": change}
        row["fit_error"] = np.sqrt(np.mean((got - y) ** 2))
        if step:
            row["contraction"] = change / last if last else 0.0
        if best is not None:
            truth = best.max(1) if outputs == 1 else best
            row["value_error"] = max(
                abs(v - (truth[i.argmax()] if outputs == 1 else truth[i.argmax(), a]))
                for v, i, a in zip(got, x, action)
            )
        rests = change <= config.tolerance and not fresh
        due = config.evaluate_every and (step + 1) % config.evaluate_every == 0
        if rests or due or step + 1 == config.iterations:
            row["greedy_return"] = greedy_return(config, policy, "evaluation", world)
        rows.append(row)
        if rests:
            break
    numbers = {name: value for name, value in rows[-1].items() if name not in ("step", "greedy_return")}
    numbers["greedy_return"] = greedy_return(config, policy, "final evaluation", world)
    if world is None:
        env = gymnasium.make_vec(config.env, config.evaluation_episodes, vectorization_mode="vector_entry_point")
        begin = env.reset(seed=fold(SEED, 0, 0, "final evaluation"))[0]
    else:
        begin = np.eye(16)[[0]]
    numbers |= {"start_value": function(begin).max(1).mean(), "iterations": len(rows)}
    if config.transitions:
        numbers["env_steps"] = config.transitions * (len(rows) if fresh else 1)
    return SimpleNamespace(rows=rows, numbers=numbers, q=function(points), points=points)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(fitted, "pictures", lambda *arguments: None)


@pytest.fixture
def drawn():
    """Asks for the pictures."""


def ours(settings, folder):
    done = etude.run("rl/fitted", out=folder, seed=SEED, quiet=True, **settings)
    return done, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(value, config):
    tight = config.features != "mlp"
    return pytest.approx(value, rel=1e-6 if tight else 1e-3, abs=1e-8 if tight else 1e-5)


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(f"{v}" for v in s.values())[:60])
def test_loop_equals_a_plain_one(settings, tmp_path):
    config = Config(**settings)
    want = plain(config)
    done, rows = ours(settings, tmp_path / "run")
    assert len(rows) == len(want.rows)
    for one, other in zip(rows, want.rows):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == close(other[name], config), (name, other["step"])
    got = etude.load(done.folder).model.of(want.points.astype(np.float32))
    np.testing.assert_allclose(got, want.q, rtol=1e-3 if config.features == "mlp" else 1e-6, atol=1e-5)
    assert done.metrics.keys() == want.numbers.keys()
    for name, value in want.numbers.items():
        assert done.metrics[name] == close(value, config), name


def test_reported_numbers_are_those_of_the_saved_function(tmp_path, drawn):
    """And what the report shows is there."""
    done, rows = ours(LAKE | {"transitions": 3000, "iterations": 30}, tmp_path / "run")
    loaded = etude.load(done.folder)
    q = loaded.model.of(np.eye(16, dtype=np.float32))
    state, action = collect(environment("FrozenLake-v1"), 3000, fold(SEED, 0, 0, "data"))[:2]
    best = optimal_q(tables("FrozenLake-v1"), 0.9)
    gap = np.abs(q - best)[state.argmax(1), action].max()
    assert done.metrics["value_error"] == pytest.approx(gap, rel=1e-12)
    assert done.metrics["start_value"] == q[0].max()
    assert done.metrics["largest_value"] == np.abs(q.max(1)).max()
    config = Config(**LAKE)
    want = greedy_return(config, lambda x: q.argmax(1), "", tables("FrozenLake-v1"))
    assert done.metrics["greedy_return"] == pytest.approx(want, rel=1e-9)
    for name in ("change", "contraction", "fit_error"):
        assert done.metrics[name] == rows[-1][name]
    assert rows[-1]["contraction"] == pytest.approx(rows[-1]["change"] / rows[-2]["change"])
    assert done.metrics["env_steps"] == 3000
    names = {path.stem for path in (done.folder / "artifacts").iterdir()}
    assert {"values", "progress", "episode"} <= names


@pytest.mark.parametrize("extra", [{}, {"features": "trees", "freeze": 2}, {"form": "fitted_q", "uniform_share": 0.5}])
def test_resume_is_exact(extra, tmp_path, monkeypatch):
    settings = {**POLE, **extra, "iterations": 5}
    whole, rows = ours(settings, tmp_path / "whole")
    real, calls = fitted.targets, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("power cut")
        return real(*arguments)

    monkeypatch.setattr(fitted, "targets", fail)
    with pytest.raises(RunError, match="power cut"):
        ours(settings | {"save_every": 1}, tmp_path / "parts")
    monkeypatch.setattr(fitted, "targets", real)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    assert [json.loads(line) for line in (parts.folder / "metrics.jsonl").read_text().splitlines()] == rows
    one, two = (etude.load(done.folder).model.state_dict() for done in (parts, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pictures_of_what_is_observed_and_of_the_divergence(tmp_path, drawn):
    done, _ = ours(POLE | {"features": "linear"}, tmp_path / "pole")
    assert {"values", "progress", "episode"} <= {path.stem for path in (done.folder / "artifacts").iterdir()}
    settings = {"env": "two_states", "form": "fitted_value", "features": "linear", "transitions": 0, "iterations": 5}
    done, _ = ours(settings | {"degree": 1, "constant": False, "initial_weight": 1.0}, tmp_path / "two")
    assert {path.stem for path in (done.folder / "artifacts").iterdir()} == {"divergence", "index"}
