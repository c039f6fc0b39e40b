"""Whole runs of actor-critic, replayed plainly: Gymnasium's vector CartPole, torch's layers, distributions and Adam."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import etude
from etude.core.randomness import fold, generator
from etude.rl import actor_critic
from etude.rl.actor_critic import Config

plainly = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_ppo_run.py"))))
SEED = plainly.SEED
SMALL = {
    "steps": 300,
    "worlds": 3,
    "segment": 12,
    "widths": (6, 5),
    "learning_rate": 0.01,
    "critic_learning_rate": 0.02,
}
SMALL |= {"target_updates": 2, "critic_updates": 2, "gamma": 0.9, "log_every": 3}
SMALL |= {"evaluate_every": 120, "evaluation_episodes": 2, "final_episodes": 3}


def target_of(net, rows, t, dead, gamma, whole):
    """y of one world's row t: r + γ V, or the rewards to the end; a row is (s, a, r, s', terminated, truncated) or None."""
    total, weight = 0.0, 1.0
    for u, row in enumerate(rows[t:], t):
        _, _, reward, reached, terminated, truncated = row
        total, weight = total + weight * reward, weight * gamma
        if terminated or dead[u]:
            return total
        if truncated or not whole or u + 1 == len(rows):
            with torch.no_grad():
                return total + weight * float(net(torch.from_numpy(reached)[None])[1])
    return total


def plain(config):
    """The run written plainly: its rows, its numbers and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = plainly.Plain(config)
    parts = (list(part.parameters()) for part in (net.trunk, net.pi, net.v))
    trunk, head, v_head = parts
    actor = torch.optim.Adam([*trunk, *head], lr=config.learning_rate)
    critic = torch.optim.Adam([*trunk, *v_head], lr=config.critic_learning_rate)
    n, whole = config.worlds, config.worlds * config.segment
    gamma = 1.0 if config.discounting == "death_state" else config.gamma
    env = gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="vector_entry_point")
    state, resetting = env.reset(seed=fold(SEED, 0, 0, "training"))[0], np.zeros(n, bool)
    running, age, ended, taken, rows, finished = np.zeros(n), np.zeros(n, int), [], 0, [], []
    batches = math.ceil(config.steps / whole)
    for step in range(batches):
        act, lives = plainly.drawing(net, generator(SEED, step, 0, "act")), [[] for _ in range(n)]
        grown = [[] for _ in range(n)]
        for _ in range(config.segment):
            action = act(torch.from_numpy(state))
            after, reward, terminated, truncated, _ = env.step(action)
            for i in range(n):
                grown[i].append(age[i])
                if resetting[i]:
                    lives[i].append(None)
                    age[i] = 0
                    continue
                lives[i].append((state[i], action[i], float(reward[i]), after[i], terminated[i], truncated[i]))
                taken, running[i], age[i] = taken + 1, running[i] + reward[i], age[i] + 1
                if terminated[i] or truncated[i]:
                    finished.append(running[i])
                    running[i], age[i] = 0.0, 0
            state, resetting = after, terminated | truncated
        dead = np.zeros((config.segment, n), bool)
        if config.discounting == "death_state":
            coin = torch.rand(config.segment, n, generator=generator(SEED, step, 0, "deaths"))
            dead = (coin >= config.gamma).numpy()
        places = [(t, i) for t in range(config.segment) for i in range(n) if lives[i][t]]
        s = torch.from_numpy(np.stack([lives[i][t][0] for t, i in places])) if places else torch.empty(0, 4)
        a = torch.tensor([int(lives[i][t][1]) for t, i in places], dtype=torch.int64)
        count = max(len(places), 1)

        def targets(whole_return, places=places, lives=lives, dead=dead):
            return torch.tensor([target_of(net, lives[i], t, dead[:, i], gamma, whole_return) for t, i in places])

        for _ in range(config.target_updates):
            y = targets(config.target == "monte_carlo")
            for _ in range(config.critic_updates):
                error = ((net.v(net.trunk(s))[:, 0] - y) ** 2).sum() / count
                critic.zero_grad()
                error.backward()
                critic.step()
        with torch.no_grad():
            advantage = targets(False) - net.v(net.trunk(s))[:, 0]
        if config.normalise and len(places) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        if config.discounting == "exact":
            advantage = advantage * config.gamma ** torch.tensor([grown[i][t] for t, i in places])
        log_pi = net.pi(net.trunk(s)).log_softmax(1)
        entropy = -(log_pi.exp() * log_pi).sum().item() / count
        loss = -(advantage * log_pi[torch.arange(len(a)), a]).sum() / count
        actor.zero_grad()
        loss.backward()
        actor.param_groups[0]["lr"] = config.learning_rate * (1 - step / batches if config.schedule == "linear" else 1)
        actor.step()
        row = {"step": step + 1}
        if (step + 1) % config.log_every == 0 or step + 1 == batches:
            if finished:
                row["training_return"] = np.mean(finished)
                ended, finished = ended + finished, []
            row |= {"loss": loss.item(), "value_loss": error.item(), "entropy": entropy, "env_steps": taken}
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == batches or (every and done // every > step * whole // every):
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
    {"target": "monte_carlo", "schedule": "constant", "gamma": 0.6},
    {"discounting": "exact", "normalise": False},
    {"discounting": "death_state", "target_updates": 3, "critic_updates": 1},
    {"discounting": "death_state", "target": "monte_carlo"},
    {"shared": True, "log_every": 2, "evaluate_every": 0},
    {"worlds": 1, "segment": 1, "steps": 70, "target_updates": 1, "critic_updates": 1, "evaluate_every": 0},
)


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(actor_critic, "show", lambda *arguments: None)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    done = etude.run("rl/actor_critic", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(want.rows)
    for one, other in zip(rows, want.rows):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=5e-4), (name, other["step"])
    torch.testing.assert_close(plainly.flat(etude.load(tmp_path / "run").model), want.final, atol=5e-4, rtol=2e-3)
    assert done.metrics == pytest.approx(want.numbers, rel=5e-3, abs=5e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert len(want.final) != len(base.final) or (want.final - base.final).abs().max() > 2e-3


def test_reported_numbers_are_those_of_the_saved_policy(no_film, tmp_path):
    got = etude.run("rl/actor_critic", out=tmp_path / "run", seed=SEED, quiet=True, **SMALL).metrics
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
