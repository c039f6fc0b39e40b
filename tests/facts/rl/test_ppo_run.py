"""Whole runs of PPO, replayed plainly: Gymnasium's vector CartPole, torch's layers, distributions, Adam and clipping."""

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
from etude.core.spec import Spec
from etude.rl import ppo
from etude.rl.ppo import Config

SEED = 3
SMALL = {"steps": 110, "worlds": 3, "segment": 18, "passes": 2, "batch": 20, "widths": (6, 5), "learning_rate": 0.02}
SMALL |= {
    "evaluate_every": 60,
    "evaluation_episodes": 2,
    "final_episodes": 3,
    "gamma": 0.9,
    "gae_lambda": 0.7,
    "clip_ratio": 0.1,
}


class Plain(nn.Module):
    """torch's layers, with the weights that the method draws first (orthogonal ones have tests of their own)."""

    def __init__(self, config):
        super().__init__()

        def layers(sizes):
            parts = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
            return nn.Sequential(*parts[:-1])

        drawn = ppo.build(config, Spec(extra={"size": 4, "actions": 2}))["model"]
        if config.shared:
            self.trunk = nn.Sequential(layers((4, *config.widths)), nn.Tanh())
            self.pi, self.v = layers((config.widths[-1], 2)), layers((config.widths[-1], 1))
        else:
            self.trunk = nn.Identity()
            self.pi, self.v = layers((4, *config.widths, 2)), layers((4, *config.widths, 1))
        with torch.no_grad():
            for mine, its in zip(self.parameters(), drawn.parameters(), strict=True):
                mine.copy_(its)

    def forward(self, state):
        seen = self.trunk(state)
        return Categorical(logits=self.pi(seen)), self.v(seen)[:, 0]


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def returns_of(act, count, purpose, seed=SEED):
    """Undiscounted returns of `act` (states → actions), one episode in each of `count` worlds."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
    state, _ = env.reset(seed=fold(seed, 0, 0, purpose))
    going, total = np.ones(count, bool), np.zeros(count)
    while going.any():
        state, reward, terminated, truncated, _ = env.step(act(torch.from_numpy(state)))
        total += reward * going
        going &= ~(terminated | truncated)
    return total


def greedy(net):
    return lambda state: net(state)[0].logits.argmax(1).numpy()


def drawing(net, dice):
    def act(state):
        with torch.no_grad():
            left = net(state)[0].logits.double().softmax(1)[:, 0]
        return (torch.rand(len(state), generator=dice, dtype=torch.float64) >= left).long().numpy()

    return act


def advantage_of(net, rows, t, config):
    """Σ_k (γλ)^k δ of one world's row t; a row is (state, action, reward, reached, terminated, truncated) or None."""
    total, weight = 0.0, 1.0
    for row in rows[t:]:
        if row is None:
            break
        state, _, reward, reached, terminated, truncated = row
        with torch.no_grad():
            here, there = (float(net(torch.from_numpy(x)[None])[1]) for x in (state, reached))
        total += weight * (reward + config.gamma * (0.0 if terminated else there) - here)
        weight *= config.gamma * config.gae_lambda
        if terminated or truncated:
            break
    return total


def plain(config):
    """The run written plainly: its rows, its numbers and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = Plain(config)
    adam = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=1e-5)
    n, whole = config.worlds, config.worlds * config.segment
    env = gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="vector_entry_point")
    state, resetting = env.reset(seed=fold(SEED, 0, 0, "training"))[0], np.zeros(n, bool)
    running, ended, taken, rows, last = np.zeros(n), [], 0, [], {}
    segments = math.ceil(config.steps / whole)
    for step in range(segments):
        left = 1 - step / segments if config.schedule == "linear" else 1.0
        adam.param_groups[0]["lr"], clip = config.learning_rate * left, config.clip_ratio * left
        act = drawing(net, generator(SEED, step, 0, "act"))
        lives, finished = [[] for _ in range(n)], []
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
            (lives[i][t], advantage_of(net, lives[i], t, config))
            for t in range(config.segment)
            for i in range(n)
            if lives[i][t]
        ]
        s = torch.from_numpy(np.stack([row[0] for row, _ in found]))
        a = torch.tensor([int(row[1]) for row, _ in found])
        advantage = torch.tensor([value for _, value in found]).float()
        with torch.no_grad():
            policy, v = net(s)
            old, returns = policy.log_prob(a), advantage + v
        last = {"explained_variance": float(1 - (returns - v).var(unbiased=False) / returns.var(unbiased=False))}
        order, beyond, losses, kl = generator(SEED, step, 0, "order"), [], [], 0.0
        for _ in range(config.passes):
            for index in torch.randperm(len(a), generator=order).split(config.batch):
                policy, v = net(s[index])
                ratio, w = (policy.log_prob(a[index]) - old[index]).exp(), advantage[index]
                if config.normalise and len(index) > 1:
                    w = (w - w.mean()) / (w.std() + 1e-8)
                gain = torch.min(ratio * w, ratio.clamp(1 - clip, 1 + clip) * w).mean()
                error, entropy = 0.5 * ((v - returns[index]) ** 2).mean(), policy.entropy().mean()
                loss = config.value_coefficient * error - gain - config.entropy_bonus * entropy
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
                adam.step()
                beyond += ((ratio - 1).abs() > clip).tolist()
                kl = (ratio - 1 - ratio.log()).mean().item()
                losses.append(loss.item())
                last |= {"kl": kl, "entropy": entropy.item(), "value_loss": error.item()}
            if config.target_kl and kl > config.target_kl:
                break
        last["clip_fraction"] = float(np.mean(beyond))
        row = {"step": step + 1, "loss": np.mean(losses), "env_steps": taken, **last}
        if finished:
            row["training_return"] = np.mean(finished)
            ended += finished
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == segments or (every and done // every > step * whole // every):
            row["greedy_return"] = returns_of(
                greedy(net), config.evaluation_episodes, "evaluation", fold(SEED, step)
            ).mean()
        rows.append(row)
    scores = returns_of(greedy(net), config.final_episodes, "final evaluation")
    sampled = returns_of(drawing(net, generator(SEED, 0, 0, "final act")), config.final_episodes, "final sampling")
    numbers = {"greedy_return": scores.mean(), "greedy_return_low": scores.min(), "sampled_return": sampled.mean()}
    numbers |= {"training_return": np.mean(ended[-100:]), "env_steps": taken}
    numbers |= {name: last[name] for name in ("explained_variance", "clip_fraction", "kl")}
    return SimpleNamespace(rows=rows, numbers=numbers, final=flat(net))


CHANGES = (
    {},
    {"gae_lambda": 1.0, "normalise": False, "schedule": "constant"},
    {"entropy_bonus": 0.5, "value_coefficient": 2.0, "clip_norm": 0.05},
    {"shared": True, "gamma": 0.5},
    {"target_kl": 1e-5, "passes": 5},
    {"worlds": 2, "segment": 40, "evaluate_every": 0, "batch": 64, "passes": 3},
)


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(ppo, "show", lambda *arguments: None)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    done = etude.run("rl/ppo", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(want.rows)
    for one, other in zip(rows, want.rows):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=2e-4), (name, other["step"])
    torch.testing.assert_close(flat(etude.load(tmp_path / "run").model), want.final, atol=1e-4, rtol=2e-3)
    assert done.metrics == pytest.approx(want.numbers, rel=5e-3, abs=2e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert len(want.final) != len(base.final) or (want.final - base.final).abs().max() > 1e-3


def test_reported_numbers_are_those_of_the_saved_policy(no_film, tmp_path):
    got = etude.run("rl/ppo", out=tmp_path / "run", seed=SEED, quiet=True, **SMALL).metrics
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loaded = etude.load(tmp_path / "run")

    def net(state):
        logits, value = loaded.model(state)
        return Categorical(logits=logits), value

    scores = returns_of(greedy(net), 3, "final evaluation")
    assert (got["greedy_return"], got["greedy_return_low"]) == (scores.mean(), scores.min())
    dice = generator(SEED, 0, 0, "final act")
    assert got["sampled_return"] == returns_of(drawing(net, dice), 3, "final sampling").mean()
    assert got["env_steps"] == rows[-1]["env_steps"] == loaded.state["worlds"]["steps"]
    assert got["training_return"] == pytest.approx(np.mean(loaded.state["box"]["recent"]))
    for name in ("explained_variance", "clip_fraction", "kl"):
        assert got[name] == pytest.approx(rows[-1][name], rel=1e-6)
