"""TD3's updates in machine code: in float64 against autograd and torch's Adam, whole runs against a plain one and torch's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import RunError
from etude.core.randomness import generator
from etude.rl import td3
from etude.rl.parts import replay_fused, replay_updates
from etude.rl.parts.continuous import Critics, DeterministicActor
from etude.rl.td3 import Config

HERE = Path(__file__)
box, replayed, whole = (
    SimpleNamespace(**runpy.run_path(str(HERE.with_name(name))))
    for name in ("boxes.py", "replayed.py", "test_td3_run.py")
)
SMALL = whole.SMALL
doubles = replayed.doubles


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(td3, "show", lambda *given: None)


@pytest.fixture
def plainly(monkeypatch):
    """The same loops, not compiled."""
    monkeypatch.setattr(replay_fused, "compiled", lambda loop: loop)


def rule_of(c):
    return replay_updates.Steps(c.gamma, c.tau, c.target_noise, c.noise_clip, c.delay, int(c.clipped), 0.0)


@pytest.mark.parametrize("widths", replayed.WIDTHS, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"updates": 1, "delay": 1}, {"delay": 2}, {"clipped": False, "delay": 3}, {"target_noise": 1.0, "gamma": 0.5}],
    ids=str,
)
def test_updates_are_those_of_autograd_and_torchs_adam(changes, widths, doubles, plainly):
    """float64; one update within 1e-12, also where units are asleep; three rounds of five within 1e-9."""
    config = Config(
        **SMALL | {"gamma": 0.875, "widths": widths} | changes
    )  # γ is exact in float32, which the plain ones have
    agent = whole.Agent(config)
    replayed.asleep([agent.actor, *agent.critics, agent.old_actor, *agent.old_critics])
    model, critic = DeterministicActor(2, 1, widths), Critics(2, 2, 1, widths)
    learner, target_model, target_critic, _ = replayed.learner_of(
        config, model, critic, agent.actor, agent.critics, target_model=True
    )
    one, done = config.updates == 1, 0
    for step in range(1 if one else 3):
        rows = replayed.rows_of(step, config.updates, config.batch, 2, 1)
        noise = torch.randn(config.updates, config.batch, 1, generator=generator(box.SEED, step, 0, "noise"))
        want = agent.learn(step, lambda k, rows=rows: [rows[name][k] for name in replayed.NAMES])
        losses, values, _ = learner.learn(replay_updates.td3, rule_of(config), rows, noise, done)
        done += config.updates
        assert np.mean(losses) == pytest.approx(want["loss"], rel=1e-9)
        assert np.mean(values) == pytest.approx(want["q_mean"], rel=1e-9)
    limit = 1e-12 if one else 1e-9
    replayed.same(model, [agent.actor], limit)
    replayed.same(critic, agent.critics, limit)
    replayed.same(target_model, [agent.old_actor], limit)
    replayed.same(target_critic, agent.old_critics, limit)


CHANGES = (
    {},
    {"clipped": False, "learning_rate": 0.005},
    {"delay": 3, "tau": 0.5, "actor_learning_rate": 0.002},
    {"target_noise": 0.05, "buffer": 40, "gamma": 0.5},
    {"learning_starts": 0, "batch": 5, "updates": 3, "noise_clip": 0.1, "widths": (7,)},
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_with_compiled_updates_equals_a_plain_one(changes, plainly, tmp_path):
    settings = SMALL | changes
    want, got = whole.plain(Config(**settings)), box.ours("rl/td3", settings | {"update": "compiled"}, tmp_path / "run")
    assert [row.keys() for row in got.rows] == [row.keys() for row in want.rows]
    for row, other in zip(got.rows, want.rows):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, net in want.nets.items():
        torch.testing.assert_close(box.saved(got.loaded, name), net, atol=2e-5, rtol=1e-3)
    assert got.numbers == pytest.approx(want.numbers, rel=1e-3, abs=1e-4)


def test_loop_in_machine_code_is_that_of_torch_and_goes_on_where_it_was_cut(monkeypatch, tmp_path):
    got = replayed.cut(td3, "rl/td3", SMALL, tmp_path, monkeypatch)
    want = etude.run("rl/td3", out=tmp_path / "torch", seed=box.SEED, quiet=True, **SMALL)
    for row, other in zip(replayed.log_of(got), replayed.log_of(want), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert got.metrics == pytest.approx(want.metrics, rel=1e-4, abs=1e-5)


@np.errstate(all="ignore")
def test_an_update_of_what_is_not_finite_is_not_made(plainly, tmp_path):
    config = Config(**SMALL)
    model, critic, agent = DeterministicActor(2, 1, (6, 5)), Critics(2, 2, 1, (6, 5)), whole.Agent(config)
    learner, *_, optimizers = replayed.learner_of(config, model, critic, agent.actor, agent.critics, target_model=True)
    rows = replayed.rows_of(0, 5, 8, 2, 1)
    rows["reward"][3, 2] = torch.inf
    noise = torch.zeros(5, 8, 1)
    losses, values, _ = learner.learn(replay_updates.td3, rule_of(config), rows, noise)
    assert len(losses) == len(values) == 4
    assert not losses[-1].isfinite()
    assert torch.stack(losses[:-1]).isfinite().all()
    assert all(p.isfinite().all() for net in (model, critic) for p in net.parameters())
    for optimizer, steps in zip(optimizers, (1, 3), strict=True):
        assert replay_fused.state_of(optimizer)[1]["step"] == steps
    with pytest.raises(RunError, match="loss is|not finite"):
        etude.run("rl/td3", out=tmp_path / "run", quiet=True, update="compiled", **SMALL | {"learning_rate": 1e37})


def test_what_is_not_compiled_is_refused():
    replayed.refused(replay_fused.refuse)
