"""Whole runs of SAC against a plain one: torch's layers, distributions, Adam and autograd, a list as buffer, every draw made again."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal
from torch.distributions.transforms import TanhTransform

from etude.core.randomness import fold, generator
from etude.rl import sac
from etude.rl.sac import Config

NAME = "rl/sac"
box = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("boxes.py"))))
SMALL = box.SMALL | {"temperature": 0.3, "temperature_learning_rate": 0.05}


class Agent:
    """The method's networks and its lines 3 to 8, written plainly."""

    def __init__(self, config):
        torch.manual_seed(fold(box.SEED, 0, 0, "init"))
        self.config = config
        self.actor, self.critics = box.mlp((2, *config.widths, 2)), box.pair((3, *config.widths, 1))
        self.old_critics = copy.deepcopy(self.critics)
        self.log_alpha = torch.tensor(config.temperature).log().requires_grad_()
        self.adam = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        both = [p for net in self.critics for p in net.parameters()]
        self.critic_adam = torch.optim.Adam(both, lr=config.learning_rate)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=config.temperature_learning_rate)

    def draw(self, state, noise):
        mean, log_std = self.actor(state).chunk(2, -1)
        law = Independent(Normal(mean, log_std.exp()), 1)
        x = mean + log_std.exp() * noise
        return x.tanh(), law.log_prob(x) - TanhTransform().log_abs_det_jacobian(x, x.tanh()).sum(-1)

    def best(self, state):
        return self.actor(state)[..., :1].tanh()

    def act(self, state, noise):
        return self.draw(state, noise)[0]

    def value(self, state, u):
        return box.q(self.critics[0], state, u)

    def learn(self, step, draw):
        config, seen = self.config, []
        noise = torch.randn(2, config.updates, config.batch, 1, generator=generator(box.SEED, step, 0, "noise"))
        for k in range(config.updates):
            s, u, r, n, over = draw(k)
            alpha = self.log_alpha.detach().exp()
            with torch.no_grad():
                there, log_prob = self.draw(n, noise[0, k])
                behind = torch.min(*(box.q(net, n, there) for net in self.old_critics)) - alpha * log_prob
                y = r + config.gamma * (1 - over.float()) * behind
            found = [box.q(net, s, u) for net in self.critics]
            loss = sum(((v - y) ** 2).mean() / 2 for v in found)
            box.climb(self.critic_adam, -loss)
            here, log_prob = self.draw(s, noise[1, k])
            box.climb(self.adam, (torch.min(*(box.q(net, s, here) for net in self.critics)) - alpha * log_prob).mean())
            if config.automatic:
                box.climb(self.alpha_adam, (self.log_alpha * (log_prob.detach() + config.entropy_target)).mean())
            box.chase(self.old_critics, self.critics, config.tau)
            seen.append((loss.item(), torch.stack(found).mean().item(), -log_prob.mean().item()))
        row = dict(zip(("loss", "q_mean", "entropy"), np.mean(seen, 0)))
        return row | {"temperature": self.log_alpha.exp().item()}


def plain(config):
    agent = Agent(config)
    rows, numbers = box.plain(config, agent)
    numbers["temperature"] = agent.log_alpha.exp().item()
    nets = {"model": box.flat(agent.actor)}
    nets |= {"critic": torch.stack([box.flat(net) for net in agent.critics])}
    nets |= {"target_critic": torch.stack([box.flat(net) for net in agent.old_critics])}
    return SimpleNamespace(rows=rows, numbers=numbers, nets=nets)


CHANGES = (
    {},
    {"automatic": False},
    {"temperature": 0.05},
    {"entropy_target": -5.0, "temperature_learning_rate": 0.5},
    {"temperature_learning_rate": 0.5},
    {"tau": 0.5},
    {"learning_rate": 0.005, "actor_learning_rate": 0.002},
    {"buffer": 40, "gamma": 0.5},
    {"learning_starts": 0, "batch": 5, "updates": 3},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(sac, "show", lambda *given: None)


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
        assert max((want.nets[name] - base.nets[name]).abs().max() for name in want.nets) > 3e-3


def test_reported_numbers_are_those_of_the_saved_networks(tmp_path):
    got = box.ours(NAME, SMALL | {"evaluate_every": 0}, tmp_path / "run")
    actor, critic = got.loaded.model, got.loaded.modules["critic"]
    agent = SimpleNamespace(best=actor.best, value=lambda state, u: critic(state, u)[0])
    for name, value in box.final(Config(**SMALL), agent).items():
        assert got.numbers[name] == pytest.approx(value, rel=1e-5), name
    assert got.numbers["env_steps"] == got.rows[-1]["env_steps"] == got.loaded.state["worlds"]["steps"]
    alpha = got.loaded.state["temperature"]["log_alpha"].exp()
    assert got.numbers["temperature"] == pytest.approx(float(alpha)) != 0.3
    assert got.numbers["updates"] == 4 * 5  # rounds 2 to 5
    assert got.numbers["training_return"] == pytest.approx(np.mean(got.loaded.state["box"]["recent"]))
