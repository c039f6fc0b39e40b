"""Whole runs of TD3 against a plain one: torch's layers, Adam and autograd, a list as buffer, every draw made again."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from etude.core.randomness import fold, generator
from etude.rl import td3
from etude.rl.td3 import Config

NAME = "rl/td3"
box = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("boxes.py"))))
SMALL = box.SMALL | {"noise": 0.3, "target_noise": 0.4, "noise_clip": 0.5}


class Agent:
    """The method's networks and its lines 3 to 8, written plainly."""

    def __init__(self, config):
        torch.manual_seed(fold(box.SEED, 0, 0, "init"))
        self.config, self.updates = config, 0
        self.actor, self.critics = box.mlp((2, *config.widths, 1)), box.pair((3, *config.widths, 1))
        self.old_actor, self.old_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.adam = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        both = [p for net in self.critics for p in net.parameters()]
        self.critic_adam = torch.optim.Adam(both, lr=config.learning_rate)

    def best(self, state):
        return self.actor(state).tanh()

    def act(self, state, noise):
        return self.best(state) + self.config.noise * noise

    def value(self, state, u):
        return box.q(self.critics[0], state, u)

    def learn(self, step, draw):
        config, losses, values = self.config, [], []
        noise = torch.randn(config.updates, config.batch, 1, generator=generator(box.SEED, step, 0, "noise"))
        for k in range(config.updates):
            s, u, r, n, over = draw(k)
            with torch.no_grad():
                push = (config.target_noise * noise[k]).clamp(-config.noise_clip, config.noise_clip)
                there = (self.old_actor(n).tanh() + push).clamp(-1, 1)
                first, second = (box.q(net, n, there) for net in self.old_critics)
                if config.clipped:
                    first = second = torch.min(first, second)
                goals = [r + config.gamma * (1 - over.float()) * v for v in (first, second)]
            found = [box.q(net, s, u) for net in self.critics]
            loss = sum(((v - y) ** 2).mean() for v, y in zip(found, goals))
            box.climb(self.critic_adam, -loss)
            self.updates += 1
            if self.updates % config.delay == 0:
                box.climb(self.adam, self.value(s, self.best(s)).mean())
                sources = (*self.critics, self.actor)
                box.chase((*self.old_critics, self.old_actor), sources, config.tau)
            losses.append(loss.item())
            values.append(torch.stack(found).mean().item())
        return {"loss": np.mean(losses), "q_mean": np.mean(values)}


def plain(config):
    agent = Agent(config)
    rows, numbers = box.plain(config, agent)
    nets = {"model": box.flat(agent.actor), "target_model": box.flat(agent.old_actor)}
    nets |= {"critic": torch.stack([box.flat(net) for net in agent.critics])}
    nets |= {"target_critic": torch.stack([box.flat(net) for net in agent.old_critics])}
    return SimpleNamespace(rows=rows, numbers=numbers, nets=nets)


CHANGES = (
    {},
    {"clipped": False},
    {"delay": 1},
    {"delay": 3, "tau": 0.5},
    {"noise": 0.05},
    {"target_noise": 0.05},
    {"noise_clip": 0.1},
    {"learning_rate": 0.005, "actor_learning_rate": 0.002},
    {"buffer": 40, "gamma": 0.5},
    {"learning_starts": 0, "batch": 5, "updates": 3},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(td3, "show", lambda *given: None)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, tmp_path):
    settings = SMALL | changes
    want, got = plain(Config(**settings)) if changes else base, box.ours(NAME, settings, tmp_path / "run")
    assert [row.keys() for row in got.rows] == [row.keys() for row in want.rows]
    for row, other in zip(got.rows, want.rows):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, net in want.nets.items():
        torch.testing.assert_close(box.saved(got.loaded, name), net, atol=2e-5, rtol=1e-3)
    assert got.numbers == pytest.approx(want.numbers, rel=1e-3, abs=1e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert max((want.nets[name] - base.nets[name]).abs().max() for name in want.nets) > 1e-3


def test_reported_numbers_are_those_of_the_saved_networks(tmp_path):
    got = box.ours(NAME, SMALL | {"evaluate_every": 0}, tmp_path / "run")
    actor, critic = got.loaded.model, got.loaded.modules["critic"]
    agent = SimpleNamespace(best=actor, value=lambda state, u: critic(state, u)[0])
    for name, value in box.final(Config(**SMALL), agent).items():
        assert got.numbers[name] == pytest.approx(value, rel=1e-5), name
    assert got.numbers["env_steps"] == got.rows[-1]["env_steps"] == got.loaded.state["worlds"]["steps"]
    assert got.numbers["updates"] == 4 * 5  # rounds 2 to 5
    assert got.numbers["training_return"] == pytest.approx(np.mean(got.loaded.state["box"]["recent"]))
