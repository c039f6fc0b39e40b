"""Whole runs against a plain one: torch's layers, Normal, Adam and autograd, a list as buffer, every draw made again.

The plain run shares with the method only `Worlds` (tests of its own) and the documented random streams.
"""

import copy
import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import etude
from etude.blocks.acting.replay import Replay
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.rl import off_policy_actor_critic as opac
from etude.rl.off_policy_actor_critic import Config

NAME, SEED = "rl/off_policy_actor_critic", 3


class Slide(gymnasium.Env):
    """A point is pushed along a line, in [−1, 3]; beyond 1.5 it falls off, and the time limit cuts at 6."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Box(np.float32([-1]), np.float32([3]))
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self.x.astype(np.float32), {}

    def step(self, action):
        reward = float(-(self.x[0] ** 2) - 0.1 * action[0] ** 2)
        self.x = np.array([self.x[0] + 0.3 * self.x[1], 0.8 * self.x[1] + 0.3 * (action[0] - 0.5)])
        return self.x.astype(np.float32), reward, bool(self.x[0] > 1.5), False, {}

    def state_dict(self):
        return {"x": self.x.copy()}

    def load_state_dict(self, state):
        self.x = state["x"].copy()


if "etude-test/Slide-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Slide-v0", entry_point=Slide, max_episode_steps=6)

SMALL = {"env": "etude-test/Slide-v0", "steps": 160, "worlds": 2, "collect": 32, "updates": 5, "batch": 8}
SMALL |= {"buffer": 96, "learning_starts": 40, "widths": (6, 5), "evaluate_every": 64, "evaluation_episodes": 3}
SMALL |= {
    "final_episodes": 4,
    "learning_rate": 0.02,
    "actor_learning_rate": 0.01,
    "noise": 0.3,
    "tau": 0.1,
    "gamma": 0.9,
}


def mlp(sizes):
    return nn.Sequential(*[part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1])


def episodes(actor, count, seed, purpose, gamma=1.0):
    """Returns of episodes by the actor's means, one in each world, and the states in which they begin."""
    returns, begun = np.zeros(count), []
    for i in range(count):
        env = gymnasium.make("etude-test/Slide-v0")
        state, _ = env.reset(seed=fold(seed, 0, 0, f"{purpose}/{i}"))
        begun.append(state)
        for t in range(6):
            with torch.no_grad():
                u = actor(torch.from_numpy(state)[None])[0].tanh().numpy()
            state, reward, terminated, truncated, _ = env.step(1 + 2 * u)
            returns[i] += gamma**t * np.float32(reward)
            if terminated or truncated:
                break
    return returns, torch.from_numpy(np.stack(begun))


def q(net, state, u):
    """Q(s, clip(u)) (N,)."""
    return net(torch.cat([state, u.clamp(-1, 1)], -1))[..., 0]


def plain(config):
    """The run written plainly: its rows, its numbers and its networks."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    actor, critic = mlp((2, *config.widths, 1)), mlp((3, *config.widths, 1))
    old_actor, old_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    adam = torch.optim.Adam(actor.parameters(), lr=config.actor_learning_rate)
    critic_adam = torch.optim.Adam(critic.parameters(), lr=config.learning_rate)
    worlds = Worlds.make(config.env, config.worlds, SEED, "training", 0, box=True)
    memory, sums, ended, rows, taken, updates = [], np.zeros(config.worlds), [], [], 0, 0
    rounds = math.ceil(config.steps / config.collect)
    for step in range(rounds):
        dice, finished, row = generator(SEED, step, 0, "act"), [], {"step": step + 1}
        while taken < (step + 1) * config.collect:
            if taken < config.learning_starts:
                u = torch.rand(config.worlds, 1, generator=dice) * 2 - 1
            else:
                noise = torch.randn(config.worlds, 1, generator=dice)
                with torch.no_grad():
                    u = actor(torch.from_numpy(worlds.observation)).tanh() + config.noise * noise
            u = u.clamp(-1, 1).numpy()
            seen = worlds.step(1 + 2 * u)
            taken += len(seen.reward)
            for s, r, n, over, cut, world in zip(*seen[:1], *seen[2:]):
                memory.append((s, u[world], r, n, over))
                sums[world] += r
                if over or cut:
                    finished.append(sums[world])
                    sums[world] = 0.0
        memory = memory[-config.buffer :]
        ended += finished
        row |= {"training_return": np.mean(finished)} if finished else {}
        row["env_steps"] = taken
        if (step + 1) * config.collect > config.learning_starts:
            shape = (config.updates, config.batch)
            index = torch.randint(len(memory), shape, generator=generator(SEED, step, 0, "replay"))
            size = (config.updates, 2, config.draws, config.batch, 1)
            noise, losses, values = torch.randn(size, generator=generator(SEED, step, 0, "noise")), [], []
            for k in range(config.updates):
                s, u, r, n, over = (
                    torch.from_numpy(np.stack([np.asarray(memory[i][j]) for i in index[k].tolist()])) for j in range(5)
                )
                with torch.no_grad():
                    y, mean = torch.zeros(config.batch), old_actor(n).tanh()
                    for e in noise[k, 0]:
                        there = mean if config.gradient == "mean" else mean + config.noise * e
                        y += q(old_critic, n, there) / config.draws
                    y = r + config.gamma * (1 - over.float()) * y
                value = q(critic, s, u)
                loss = ((value - y) ** 2).mean() / 2
                critic_adam.zero_grad()
                loss.backward()
                critic_adam.step()
                adam.zero_grad()
                mean, gain = actor(s).tanh(), 0.0
                for e in noise[k, 1]:
                    if config.gradient == "mean":
                        gain += q(critic, s, mean).mean() / config.draws
                    elif config.gradient == "reparameterised":
                        gain += q(critic, s, mean + config.noise * e).mean() / config.draws
                    else:
                        law = torch.distributions.Normal(mean, config.noise)
                        a = mean.detach() + config.noise * e
                        better = (q(critic, s, a) - q(critic, s, mean)).detach()
                        gain += (better * law.log_prob(a)[:, 0]).mean() / config.draws
                (-gain).backward()
                adam.step()
                updates += 1
                if updates % config.target_every == 0:
                    with torch.no_grad():
                        for net, source in ((old_critic, critic), (old_actor, actor)):
                            for p, new in zip(net.parameters(), source.parameters()):
                                p += config.tau * (new - p)
                losses.append(loss.item())
                values.append(value.mean().item())
            row |= {"loss": np.mean(losses), "q_mean": np.mean(values)}
        done, every = (step + 1) * config.collect, config.evaluate_every
        if step + 1 == rounds or (every and done // every > step * config.collect // every):
            scores, _ = episodes(actor, config.evaluation_episodes, fold(SEED, step), "evaluation")
            row["greedy_return"] = scores.mean()
        rows.append(row)
    fresh = (actor, config.final_episodes, SEED, "final evaluation")
    (scores, begun), (discounted, _) = episodes(*fresh), episodes(*fresh, gamma=config.gamma)
    with torch.no_grad():
        promised = q(critic, begun, actor(begun).tanh()).numpy()
    numbers = {
        "greedy_return": scores.mean(),
        "greedy_return_low": scores.min(),
        "overestimation": (promised - discounted).mean(),
        "training_return": np.mean(ended[-100:]),
        "env_steps": taken,
        "updates": updates,
    }
    nets = {"model": actor, "target_model": old_actor, "critic": critic, "target_critic": old_critic}
    return SimpleNamespace(
        rows=rows, numbers=numbers, nets={name: flat(net.parameters()) for name, net in nets.items()}
    )


def flat(parameters):
    """One vector: layer by layer the weights as (in, out), then the biases."""
    return torch.cat([p.detach().t().flatten() if p.dim() == 2 else p.detach().flatten() for p in parameters])


def saved(loaded, name):
    """The network of that name from the checkpoint, in the order of `flat`."""
    state = loaded.state[name] if name in loaded.state else loaded.modules[name].state_dict()
    if "critic" not in name:
        return flat(state.values())
    layers = len(state) // 2
    return torch.cat([state[f"{kind}.{i}"].flatten() for i in range(layers) for kind in ("weights", "biases")])


def ours(settings, folder):
    result = etude.run(NAME, out=folder, seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result.metrics, rows, etude.load(folder)


CHANGES = (
    {},
    {"gradient": "score", "draws": 3},
    {"gradient": "mean"},
    {"draws": 2},
    {"noise": 0.05},
    {"tau": 1.0, "target_every": 4},
    {"target_every": 3},
    {"gamma": 0.5},
    {"learning_rate": 0.005},
    {"actor_learning_rate": 0.001},
    {"buffer": 40},
    {"learning_starts": 0},
    {"batch": 5, "updates": 3},
    {"worlds": 3, "collect": 40},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(opac, "show", lambda *given: None)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings)) if changes else base
    metrics, rows, loaded = ours(settings, tmp_path / "run")
    assert [row.keys() for row in rows] == [row.keys() for row in want.rows]
    for got, row in zip(rows, want.rows):
        assert got == pytest.approx(row, rel=1e-3, abs=1e-4)
    for name, net in want.nets.items():
        torch.testing.assert_close(saved(loaded, name), net, atol=2e-5, rtol=1e-3)
    assert metrics == pytest.approx(want.numbers, rel=1e-3, abs=1e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert max((want.nets[name] - base.nets[name]).abs().max() for name in want.nets) > 5e-3


def test_reported_numbers_are_those_of_the_saved_networks(no_film, tmp_path):
    metrics, rows, loaded = ours(SMALL | {"evaluate_every": 0}, tmp_path / "run")
    returns, begun = episodes(loaded.model.net, 4, SEED, "final evaluation")
    discounted, _ = episodes(loaded.model.net, 4, SEED, "final evaluation", 0.9)
    with torch.no_grad():
        promised = loaded.modules["critic"](begun, loaded.model(begun))[0].numpy()
    assert metrics["greedy_return"] == pytest.approx(returns.mean(), rel=1e-6)
    assert metrics["greedy_return_low"] == pytest.approx(returns.min(), rel=1e-6)
    assert metrics["overestimation"] == pytest.approx((promised - discounted).mean(), rel=1e-5)
    assert metrics["env_steps"] == rows[-1]["env_steps"] == loaded.state["worlds"]["steps"]
    assert metrics["updates"] == 4 * 5  # rounds 2 to 5
    assert metrics["training_return"] == pytest.approx(np.mean(loaded.state["box"]["recent"]))


def test_reported_zero_updates_are_said(no_film, tmp_path, capsys):
    etude.run(NAME, out=tmp_path / "short", **SMALL | {"steps": 32})
    assert "no update will be made, for --learning-starts is 40 and the run takes 32" in capsys.readouterr().err
    assert "untrained" in (tmp_path / "short" / "artifacts" / "no_updates.txt").read_text()
    etude.run(NAME, out=tmp_path / "off", **SMALL | {"steps": 32, "updates": 0})
    assert "--updates is 0" in capsys.readouterr().err


def test_loop_goes_on_exactly_after_a_failure(no_film, tmp_path, monkeypatch):
    whole = etude.run(NAME, out=tmp_path / "whole", quiet=True, **SMALL)
    calls, real = [], Replay.sample

    def fail(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise RunError("power cut")
        return real(self, *given)

    monkeypatch.setattr(Replay, "sample", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run(NAME, out=tmp_path / "parts", quiet=True, save_every=1, **SMALL)
    monkeypatch.setattr(Replay, "sample", real)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    for name in ("metrics.jsonl",):
        assert (parts.folder / name).read_text() == (whole.folder / name).read_text()
    for name in ("model", "critic", "target_model", "target_critic"):
        assert torch.equal(*(saved(etude.load(done.folder), name) for done in (whole, parts)))
