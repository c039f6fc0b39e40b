"""Whole runs against a plain one: torch's layers, Normal, Adam and autograd, a list as buffer, every draw made again."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import etude
from etude.blocks.acting.replay import Replay
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.rl import off_policy_actor_critic as opac
from etude.rl.off_policy_actor_critic import Config

NAME = "rl/off_policy_actor_critic"
box = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("boxes.py"))))
SMALL = box.SMALL | {"noise": 0.3}


class Agent:
    """The method's networks and its lines 3 to 7, written plainly."""

    def __init__(self, config):
        torch.manual_seed(fold(box.SEED, 0, 0, "init"))
        self.config, self.updates = config, 0
        self.actor, self.critic = box.mlp((2, *config.widths, 1)), box.mlp((3, *config.widths, 1))
        self.old_actor, self.old_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.adam = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=config.learning_rate)

    def best(self, state):
        return self.actor(state).tanh()

    def act(self, state, noise):
        return self.best(state) + self.config.noise * noise

    def value(self, state, u):
        return box.q(self.critic, state, u)

    def learn(self, step, draw):
        config, losses, values = self.config, [], []
        size = (config.updates, 2, config.draws, config.batch, 1)
        noise = torch.randn(size, generator=generator(box.SEED, step, 0, "noise"))
        for k in range(config.updates):
            s, u, r, n, over = draw(k)
            with torch.no_grad():
                y, mean = torch.zeros(config.batch), self.old_actor(n).tanh()
                for e in noise[k, 0]:
                    there = mean if config.gradient == "mean" else mean + config.noise * e
                    y += box.q(self.old_critic, n, there) / config.draws
                y = r + config.gamma * (1 - over.float()) * y
            value = self.value(s, u)
            loss = ((value - y) ** 2).mean() / 2
            box.climb(self.critic_adam, -loss)
            mean, gain = self.best(s), 0.0
            for e in noise[k, 1]:
                if config.gradient == "mean":
                    gain += self.value(s, mean).mean() / config.draws
                elif config.gradient == "reparameterised":
                    gain += self.value(s, mean + config.noise * e).mean() / config.draws
                else:
                    a = mean.detach() + config.noise * e
                    better = (self.value(s, a) - self.value(s, mean)).detach()
                    log_prob = torch.distributions.Normal(mean, config.noise).log_prob(a)[:, 0]
                    gain += (better * log_prob).mean() / config.draws
            box.climb(self.adam, gain)
            self.updates += 1
            if self.updates % config.target_every == 0:
                box.chase((self.old_critic, self.old_actor), (self.critic, self.actor), config.tau)
            losses.append(loss.item())
            values.append(value.mean().item())
        return {"loss": np.mean(losses), "q_mean": np.mean(values)}


def plain(config):
    agent = Agent(config)
    rows, numbers = box.plain(config, agent)
    nets = {"model": agent.actor, "target_model": agent.old_actor}
    nets |= {"critic": agent.critic, "target_critic": agent.old_critic}
    return SimpleNamespace(rows=rows, numbers=numbers, nets={name: box.flat(net) for name, net in nets.items()})


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


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(opac, "show", lambda *given: None)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, tmp_path):
    settings = SMALL | changes
    want, got = plain(Config(**settings)) if changes else base, box.ours(NAME, settings, tmp_path / "run")
    assert [row.keys() for row in got.rows] == [row.keys() for row in want.rows]
    for row, other in zip(got.rows, want.rows):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, net in want.nets.items():
        torch.testing.assert_close(box.saved(got.loaded, name).flatten(), net, atol=2e-5, rtol=1e-3)
    assert got.numbers == pytest.approx(want.numbers, rel=1e-3, abs=1e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert max((want.nets[name] - base.nets[name]).abs().max() for name in want.nets) > 5e-3


def test_reported_numbers_are_those_of_the_saved_networks(tmp_path):
    got = box.ours(NAME, SMALL | {"evaluate_every": 0}, tmp_path / "run")
    actor, critic = got.loaded.model, got.loaded.modules["critic"]
    agent = SimpleNamespace(best=actor, value=lambda state, u: critic(state, u)[0])
    for name, value in box.final(Config(**SMALL), agent).items():
        assert got.numbers[name] == pytest.approx(value, rel=1e-5), name
    assert got.numbers["env_steps"] == got.rows[-1]["env_steps"] == got.loaded.state["worlds"]["steps"]
    assert got.numbers["updates"] == 4 * 5  # rounds 2 to 5
    assert got.numbers["training_return"] == pytest.approx(np.mean(got.loaded.state["box"]["recent"]))


def test_reported_zero_updates_are_said(tmp_path, capsys):
    etude.run(NAME, out=tmp_path / "short", **SMALL | {"steps": 32})
    assert "no update will be made, for --learning-starts is 40 and the run takes 32" in capsys.readouterr().err
    assert "untrained" in (tmp_path / "short" / "artifacts" / "no_updates.txt").read_text()
    etude.run(NAME, out=tmp_path / "off", **SMALL | {"steps": 32, "updates": 0})
    assert "--updates is 0" in capsys.readouterr().err


def test_loop_goes_on_exactly_after_a_failure(tmp_path, monkeypatch):
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
    assert (parts.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()
    for name in ("model", "critic", "target_model", "target_critic"):
        assert torch.equal(*(box.saved(etude.load(done.folder), name) for done in (whole, parts)))
