"""Whole runs of A2C, replayed plainly: Gymnasium's vector CartPole, torch's layers, distributions, RMSprop and clipping."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.rl import a2c
from etude.rl.a2c import Config

plainly = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_ppo_run.py"))))
SEED = plainly.SEED
SMALL = {"steps": 400, "worlds": 3, "segment": 6, "widths": (6, 5), "learning_rate": 0.01, "log_every": 4, "gamma": 0.9}
SMALL |= {"evaluate_every": 150, "evaluation_episodes": 2, "final_episodes": 3}


def plain(config):
    """The run written plainly: its rows, its numbers and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = plainly.Plain(config)
    rms = torch.optim.RMSprop(net.parameters(), lr=config.learning_rate, alpha=0.99, eps=1e-5)
    n, whole = config.worlds, config.worlds * config.segment
    env = gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="vector_entry_point")
    state, resetting = env.reset(seed=fold(SEED, 0, 0, "training"))[0], np.zeros(n, bool)
    running, ended, taken, rows, finished = np.zeros(n), [], 0, [], []
    updates = math.ceil(config.steps / whole)
    for step in range(updates):
        act, lives = plainly.drawing(net, generator(SEED, step, 0, "act")), [[] for _ in range(n)]
        for _ in range(config.segment):
            action = act(torch.from_numpy(state))
            after, reward, terminated, truncated, _ = env.step(action)
            for i in range(n):
                if resetting[i]:
                    lives[i].append(None)
                    continue
                lives[i].append((state[i], action[i], float(reward[i]), after[i], terminated[i], truncated[i]))
                taken, running[i] = taken + 1, running[i] + reward[i]
                if terminated[i] or truncated[i]:
                    finished.append(running[i])
                    running[i] = 0.0
            state, resetting = after, terminated | truncated
        found = [
            (lives[i][t], plainly.advantage_of(net, lives[i], t, config))
            for t in range(config.segment)
            for i in range(n)
            if lives[i][t]
        ]
        s, a = torch.from_numpy(np.stack([row[0] for row, _ in found])), torch.tensor([int(row[1]) for row, _ in found])
        advantage = torch.tensor([value for _, value in found]).float()
        policy, v = net(s)
        error = ((v - (advantage + v.detach())) ** 2).mean()
        entropy = policy.entropy().mean()
        loss = (
            config.value_coefficient * error - (advantage * policy.log_prob(a)).mean() - config.entropy_bonus * entropy
        )
        rms.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        rms.param_groups[0]["lr"] = config.learning_rate * (1 - step / updates if config.schedule == "linear" else 1)
        rms.step()
        row = {"step": step + 1}
        if (step + 1) % config.log_every == 0 or step + 1 == updates:
            if finished:
                row["training_return"] = np.mean(finished)
                ended, finished = ended + finished, []
            row |= {"loss": loss.item(), "value_loss": error.item(), "entropy": entropy.item(), "env_steps": taken}
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == updates or (every and done // every > step * whole // every):
            score = plainly.returns_of(plainly.greedy(net), config.evaluation_episodes, "evaluation", fold(SEED, step))
            row["greedy_return"] = score.mean()
        if len(row) > 1:
            rows.append(row)
    scores = plainly.returns_of(plainly.greedy(net), config.final_episodes, "final evaluation")
    dice = generator(SEED, 0, 0, "final act")
    sampled = plainly.returns_of(plainly.drawing(net, dice), config.final_episodes, "final sampling")
    numbers = {"greedy_return": scores.mean(), "greedy_return_low": scores.min(), "sampled_return": sampled.mean()}
    numbers |= {"training_return": np.mean(ended[-100:]), "env_steps": taken}
    return SimpleNamespace(rows=rows, numbers=numbers, final=plainly.flat(net))


CHANGES = (
    {},
    {"gae_lambda": 0.5, "schedule": "constant"},
    {"entropy_bonus": 0.5, "value_coefficient": 2.0, "clip_norm": 0.05},
    {"shared": True, "gamma": 0.5},
    {"worlds": 2, "segment": 10, "evaluate_every": 0, "log_every": 7},
)


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(a2c, "show", lambda *arguments: None)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    """E90: the steps of all worlds are one batch and one update, which is A2C; nobody writes by himself."""
    settings = SMALL | changes
    want = plain(Config(**settings))
    done = etude.run("rl/a2c", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(want.rows)
    for one, other in zip(rows, want.rows):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=2e-4), (name, other["step"])
    torch.testing.assert_close(plainly.flat(etude.load(tmp_path / "run").model), want.final, atol=1e-4, rtol=2e-3)
    assert done.metrics == pytest.approx(want.numbers, rel=5e-3, abs=2e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert len(want.final) != len(base.final) or (want.final - base.final).abs().max() > 1e-3


def test_reported_numbers_are_those_of_the_saved_policy(no_film, tmp_path):
    got = etude.run("rl/a2c", out=tmp_path / "run", seed=SEED, quiet=True, **SMALL).metrics
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loaded = etude.load(tmp_path / "run")

    def net(state):
        logits, value = loaded.model(state)
        return torch.distributions.Categorical(logits=logits), value

    scores = plainly.returns_of(plainly.greedy(net), 3, "final evaluation")
    assert (got["greedy_return"], got["greedy_return_low"]) == (scores.mean(), scores.min())
    dice = generator(SEED, 0, 0, "final act")
    assert got["sampled_return"] == plainly.returns_of(plainly.drawing(net, dice), 3, "final sampling").mean()
    assert got["env_steps"] == rows[-1]["env_steps"] == loaded.state["worlds"]["steps"]
    assert got["training_return"] == pytest.approx(np.mean(loaded.state["box"]["recent"]))


def test_loop_makes_no_update_from_a_gradient_that_is_not_finite(tmp_path, monkeypatch):
    real, seen = a2c.slopes_of, []

    def slopes(*given):
        seen.append(1)
        return tuple(slope * (math.nan if len(seen) == 2 else 1) for slope in real(*given))

    monkeypatch.setattr(a2c, "slopes_of", slopes)
    with pytest.raises(RunError, match="not finite at step 1; the update was not made"):
        etude.run("rl/a2c", out=tmp_path / "run", seed=SEED, quiet=True, **SMALL)
