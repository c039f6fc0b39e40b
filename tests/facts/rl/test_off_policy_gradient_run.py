"""Whole runs of the off-policy gradient, replayed plainly: Gymnasium, torch's Adam, weights by double loops."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import etude
from etude.core.randomness import fold, generator
from etude.rl import off_policy_gradient
from etude.rl.off_policy_gradient import Config

plainly = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_reinforce_run.py"))))
brute = runpy.run_path(str(Path(__file__).with_name("test_off_policy_gradient.py")))["brute"]
SEED = plainly.SEED
SMALL = {"episodes": 11, "batch": 4, "updates": 3, "widths": (6, 5), "learning_rate": 0.05, "evaluate_every": 8}
SMALL |= {"evaluation_episodes": 2, "final_episodes": 2, "target_return": 15.0}


def weights_of(episodes, ratios, config):
    """w − m b of every step by the definitions; `ratios` [(T,)] of every episode."""
    longest = max(len(r) for _, _, r in episodes)
    weight = [
        brute(rho, r, [True] * len(r), config.correction, config.gamma) for rho, (_, _, r) in zip(ratios, episodes)
    ]
    m = []
    for rho in ratios:
        upto = np.cumprod(rho)
        known = {"none": [1.0] * len(rho), "first_order": list(rho), "trajectory": [upto[-1]] * len(rho)}
        m.append(known.get(config.correction, upto))
    if config.self_normalised:
        assert config.correction == "first_order"
        for t in range(longest):
            mean = np.mean([row[t] for row in m if len(row) > t])
            for row, values in zip(m, weight):
                if len(row) > t:
                    row[t], values[t] = row[t] / mean, values[t] / mean
    if not config.baseline:
        return weight
    found = []
    for i in range(len(episodes)):
        row = []
        for t, w in enumerate(weight[i]):
            others = [j for j in range(len(episodes)) if j != i and len(weight[j]) > t]
            b = sum(weight[j][t] for j in others) / sum(m[j][t] for j in others) if others else 0.0
            row.append(w - m[i][t] * b)
        found.append(row)
    return found


def plain(config):
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = plainly.network(config)
    adam = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    rounds = math.ceil(config.episodes / config.batch)
    rows, ended, taken, shares = [], [], 0, 0.0
    reached = rounds * config.batch * 500
    for step in range(rounds):
        adam.param_groups[0]["lr"] = config.learning_rate * (1 - step / rounds if config.schedule == "linear" else 1)
        episodes = plainly.play(net, config.batch, fold(SEED, step), "training", generator(SEED, step, 0, "act"))
        old = [Categorical(logits=net(s)).log_prob(a).detach() for s, a, _ in episodes]
        for _ in range(config.updates):
            new = [Categorical(logits=net(s)).log_prob(a) for s, a, _ in episodes]
            ratios = [(n.detach() - o).double().exp().tolist() for n, o in zip(new, old)]
            weights = weights_of(episodes, ratios, config)
            loss = -sum((torch.tensor(w).float() * n).sum() for w, n in zip(weights, new)) / config.batch
            adam.zero_grad()
            loss.backward()
            adam.step()
        whole = [math.prod(rho) for rho in ratios]
        share = sum(whole) ** 2 / sum(w * w for w in whole) / config.batch
        sums = [sum(r) for _, _, r in episodes]
        ended, taken, shares = ended + sums, taken + int(sum(map(len, (r for _, _, r in episodes)))), shares + share
        if reached == rounds * config.batch * 500 and len(ended) >= 20 and np.mean(ended[-20:]) >= config.target_return:
            reached = taken
        row = {"step": step + 1, "training_return": np.mean(sums), "effective_share": share, "env_steps": taken}
        row["episodes"] = (step + 1) * config.batch
        done, every = (step + 1) * config.batch, config.evaluate_every
        if step + 1 == rounds or (every and done // every > step * config.batch // every):
            score = plainly.returns_of(net, config.evaluation_episodes, "evaluation", seed=fold(SEED, step))
            row["greedy_return"] = np.mean(score)
        rows.append(row)
    greedy = plainly.returns_of(net, config.final_episodes, "final evaluation")
    sampled = plainly.returns_of(net, config.final_episodes, "final sampling", generator(SEED, 0, 0, "final act"))
    numbers = {"greedy_return": np.mean(greedy), "greedy_return_low": min(greedy), "sampled_return": np.mean(sampled)}
    numbers |= {"training_return": np.mean(ended[-100:]), "env_steps": taken, "steps_to_target": reached}
    return SimpleNamespace(rows=rows, numbers=numbers | {"effective_share": shares / rounds}, final=plainly.flat(net))


CHANGES = (
    {},
    {"correction": "per_decision", "updates": 2},
    {"correction": "trajectory", "schedule": "constant"},
    {"correction": "future_dropped", "gamma": 0.8},
    {"correction": "notes", "baseline": False},
    {"correction": "none"},
    {"self_normalised": True},
    {"updates": 1, "episodes": 24, "target_return": 30.0, "evaluate_every": 0},
)


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(off_policy_gradient, "show", lambda *arguments: None)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    result = etude.run("rl/off_policy_gradient", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    plainly.agree(rows, want.rows)
    loaded = etude.load(tmp_path / "run")
    torch.testing.assert_close(plainly.flat(loaded.model), want.final, atol=5e-5, rtol=1e-3)
    assert result.metrics == pytest.approx(want.numbers, rel=2e-3)
    if changes:  # what is tested must matter, far beyond rounding
        assert len(want.rows) != len(base.rows) or (want.final - base.final).abs().max() > 1e-3


def test_reported_numbers_are_those_of_the_saved_policy(no_film, tmp_path):
    settings = SMALL | {"episodes": 24, "target_return": 5.0, "final_episodes": 3}
    got = etude.run("rl/off_policy_gradient", out=tmp_path / "run", seed=SEED, quiet=True, **settings).metrics
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loaded = etude.load(tmp_path / "run")
    greedy = plainly.returns_of(loaded.model, 3, "final evaluation")
    assert (got["greedy_return"], got["greedy_return_low"]) == (np.mean(greedy), min(greedy))
    dice = generator(SEED, 0, 0, "final act")
    assert got["sampled_return"] == np.mean(plainly.returns_of(loaded.model, 3, "final sampling", dice))
    assert got["env_steps"] == rows[-1]["env_steps"]
    assert got["steps_to_target"] == rows[4]["env_steps"]  # 20 episodes are enough to say so
    assert got["effective_share"] == pytest.approx(np.mean([row["effective_share"] for row in rows]))
    assert got["training_return"] == pytest.approx(np.mean([row["training_return"] for row in rows]))
    assert 0 < got["effective_share"] <= 1
    assert (tmp_path / "run" / "artifacts" / "effective.png").is_file()
