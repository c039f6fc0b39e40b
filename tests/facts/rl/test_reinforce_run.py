"""Whole runs of REINFORCE, replayed plainly: Gymnasium, one `backward` a batch, torch's Adam, sums by double loops."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import etude
from etude.core.randomness import fold, generator
from etude.rl import reinforce
from etude.rl.reinforce import Config

SEED = 3
SMALL = {"episodes": 11, "batch": 4, "widths": (6, 5), "learning_rate": 0.05, "evaluate_every": 8}
SMALL |= {"evaluation_episodes": 2, "final_episodes": 2, "probe_episodes": 0}


def network(config):
    widths = (4, *config.widths, 2)
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def play(net, count, seed, purpose, dice=None):
    """Episodes of CartPole, one in each of `count` worlds: [(states, actions, rewards)]; greedy without dice."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
    state, _ = env.reset(seed=fold(seed, 0, 0, purpose))
    going, found = [True] * count, [([], [], []) for _ in range(count)]
    while any(going):
        with torch.no_grad():
            logits = net(torch.from_numpy(state))
        if dice is None:
            action = logits.argmax(1).numpy()
        else:
            uniform = torch.rand(count, generator=dice, dtype=torch.float64)
            action = (uniform >= logits.double().softmax(1)[:, 0]).long().numpy()
        after, reward, terminated, truncated, _ = env.step(action)
        for i in range(count):
            if going[i]:
                for column, value in zip(found[i], (state[i], int(action[i]), float(reward[i]))):
                    column.append(value)
            going[i] = going[i] and not (terminated[i] or truncated[i])
        state = after
    return [(torch.from_numpy(np.array(s)), torch.tensor(a), r) for s, a, r in found]


def returns_of(net, count, purpose, dice=None, seed=SEED):
    return [sum(r) for _, _, r in play(net, count, seed, purpose, dice)]


def q_hat(rewards, t, config):
    if config.credit == "full":
        return sum(config.gamma**u * r for u, r in enumerate(rewards))
    return sum(config.gamma ** (u - t) * rewards[u] for u in range(t, len(rewards)))


def weights_of(episodes, config):
    """Q̂ − b of every step, by the definition."""
    found = []
    for i, (_, _, rewards) in enumerate(episodes):
        row = []
        for t in range(len(rewards)):
            value = q_hat(rewards, t, config)
            if config.baseline in ("mean", "leave_one_out"):
                alive = [r for j, (_, _, r) in enumerate(episodes) if j != i or config.baseline == "mean"]
                alive = [r for r in alive if config.credit == "full" or len(r) > t]
                value -= np.mean([q_hat(r, t, config) for r in alive]) if alive else 0.0
            if config.exact_discount and config.credit == "to_go":
                value *= config.gamma**t
            row.append(value)
        found.append(row)
    if config.normalise:
        scale = np.std([value for row in found for value in row])
        found = [[value / (scale + 1e-8) for value in row] for row in found]
    return found


def terms_of(net, episodes, config):
    """The gradient of each episode (N, P), in float64 after autograd."""

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]).double()

    terms, scores = [], []
    for (s, a, _), row in zip(episodes, weights_of(episodes, config)):
        policy = Categorical(logits=net(s))
        value = (torch.tensor(row, dtype=torch.float32) * policy.log_prob(a)).sum()
        terms.append(gradient(value + config.entropy_bonus * policy.entropy().sum()))
        scores.append(gradient(Categorical(logits=net(s)).log_prob(a).sum()))
    if config.baseline == "optimal":
        fixed = list(terms)
        for i, score in enumerate(scores):
            others = [(g, s) for j, (g, s) in enumerate(zip(fixed, scores)) if j != i]
            above, below = sum(g * s for g, s in others), sum(s * s for _, s in others)
            if others:
                terms[i] = fixed[i] - torch.where(below > 0, above / below, 0.0) * score
    return torch.stack(terms)


def plain(config):
    """The run written plainly: its rows, its numbers and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = network(config)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    updates = math.ceil(config.episodes / config.batch)
    rows, ended, taken, numbers = [], [], 0, {}
    for step in range(updates):
        if step == 0 and config.probe_episodes >= 2 * config.batch:
            probe = play(
                net, config.probe_episodes, fold(SEED, 0, 0, "probe"), "training", generator(SEED, -1, 0, "probe")
            )
            spread = {}
            for name, one in (("ours", config), ("plain", Config(credit="full", baseline="none", gamma=config.gamma))):
                one = SimpleNamespace(**vars(one) | {"normalise": False, "entropy_bonus": 0.0})
                groups = [probe[k * config.batch : (k + 1) * config.batch] for k in range(len(probe) // config.batch)]
                means = torch.stack([terms_of(net, group, one).mean(0) for group in groups])
                spread[name] = means.var(0).sum().item()
            numbers["variance_ratio"] = spread["ours"] / spread["plain"]
        episodes = play(net, config.batch, fold(SEED, step), "training", generator(SEED, step, 0, "act"))
        terms = terms_of(net, episodes, config)
        mean = terms.mean(0)
        pieces = (-mean).float().split([p.numel() for p in net.parameters()])
        for p, piece in zip(net.parameters(), pieces):
            p.grad = piece.view_as(p).clone()
        left = 1 - step / updates if config.schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = config.learning_rate * left
        optimizer.step()
        sums = [sum(r) for _, _, r in episodes]
        ended += sums
        taken += sum(len(r) for _, _, r in episodes)
        deviation = (terms.var(0).sum() / len(terms)).sqrt() / mean.norm() if len(terms) > 1 else 0.0
        row = {"step": step + 1, "training_return": np.mean(sums), "gradient_noise": float(deviation)}
        row |= {"env_steps": taken, "episodes": (step + 1) * config.batch}
        done, every = (step + 1) * config.batch, config.evaluate_every
        if step + 1 == updates or (every and done // every > step * config.batch // every):
            row["greedy_return"] = np.mean(
                returns_of(net, config.evaluation_episodes, "evaluation", seed=fold(SEED, step))
            )
        rows.append(row)
    greedy = returns_of(net, config.final_episodes, "final evaluation")
    sampled = returns_of(net, config.final_episodes, "final sampling", generator(SEED, 0, 0, "final act"))
    numbers |= {"greedy_return": np.mean(greedy), "greedy_return_low": min(greedy), "sampled_return": np.mean(sampled)}
    numbers |= {"training_return": np.mean(ended[-100:]), "env_steps": taken}
    return SimpleNamespace(rows=rows, numbers=numbers, final=flat(net))


def ours(settings, folder):
    result = etude.run("rl/reinforce", out=folder, seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result.metrics, rows, etude.load(folder)


def agree(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), (name, other["step"])


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(reinforce, "show", lambda *arguments: None)


CHANGES = (
    {},
    {"credit": "full", "schedule": "constant"},
    {"baseline": "none", "gamma": 0.8},
    {"baseline": "mean", "learning_rate": 0.01},
    {"baseline": "optimal", "probe_episodes": 9},
    {"normalise": True},
    {"gamma": 0.8, "exact_discount": True, "probe_episodes": 8},
    {"gamma": 0.8, "credit": "full", "baseline": "optimal"},
    {"entropy_bonus": 2.0},
    {"batch": 1, "episodes": 4, "evaluate_every": 0},
    {"probe_episodes": 7},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    metrics, rows, loaded = ours(settings, tmp_path / "run")
    agree(rows, want.rows)
    torch.testing.assert_close(flat(loaded.model), want.final, atol=5e-5, rtol=1e-3)
    assert metrics == pytest.approx(want.numbers, rel=2e-3)
    if changes and "probe_episodes" not in changes:  # what is tested must matter, far beyond rounding
        assert len(want.rows) != len(base.rows) or (want.final - base.final).abs().max() > 1e-3


def test_reported_numbers_are_those_of_the_saved_policy(no_film, tmp_path):
    metrics, rows, loaded = ours(SMALL | {"probe_episodes": 8, "final_episodes": 3}, tmp_path / "run")
    greedy = returns_of(loaded.model, 3, "final evaluation")
    assert metrics["greedy_return"] == np.mean(greedy)
    assert metrics["greedy_return_low"] == min(greedy)
    dice = generator(SEED, 0, 0, "final act")
    assert metrics["sampled_return"] == np.mean(returns_of(loaded.model, 3, "final sampling", dice))
    assert metrics["env_steps"] == rows[-1]["env_steps"] == loaded.state["box"]["env_steps"]
    assert metrics["training_return"] == pytest.approx(np.mean(loaded.state["box"]["recent"]))
    spread = loaded.state["box"]["variances"]
    assert metrics["variance_ratio"] == pytest.approx(spread["to_go, leave_one_out"] / spread["full, none"])
    assert (tmp_path / "run" / "artifacts" / "variances.png").is_file()


def test_reported_training_return_is_of_the_last_hundred_episodes(no_film, tmp_path):
    settings = SMALL | {"episodes": 120, "batch": 40, "evaluate_every": 0, "probe_episodes": 0}
    metrics, rows, _ = ours(settings, tmp_path / "run")
    assert "variance_ratio" not in metrics
    means = [row["training_return"] for row in rows]
    box = etude.load(tmp_path / "run").state["box"]["recent"]
    assert len(box) == 100
    every = np.array(box)
    assert np.mean(every[-40:]) == pytest.approx(means[-1])
    assert np.mean(every[20:60]) == pytest.approx(means[1])
    assert metrics["training_return"] == pytest.approx(every.mean())
