"""SAC's updates in machine code: in float64 against autograd and torch's Adam, whole runs against a plain one and torch's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import RunError
from etude.core.randomness import generator
from etude.optim.adam import Adam
from etude.rl import sac
from etude.rl.parts import replay_fused, replay_updates
from etude.rl.parts.continuous import Critics, SquashedGaussian
from etude.rl.sac import Config

HERE = Path(__file__)
box, replayed, whole = (
    SimpleNamespace(**runpy.run_path(str(HERE.with_name(name))))
    for name in ("boxes.py", "replayed.py", "test_sac_run.py")
)
SMALL = whole.SMALL
doubles = replayed.doubles


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(sac, "show", lambda *given: None)


@pytest.fixture
def plainly(monkeypatch):
    """The same loops, not compiled."""
    monkeypatch.setattr(replay_fused, "compiled", lambda loop: loop)


def rule_of(c):
    return replay_updates.Steps(c.gamma, c.tau, 0.0, 0.0, 1, int(c.automatic), c.entropy_target)


@pytest.mark.parametrize("widths", replayed.WIDTHS, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"updates": 1}, {}, {"automatic": False}, {"entropy_target": 1.0, "gamma": 0.5, "temperature_learning_rate": 0.5}],
    ids=str,
)
def test_updates_are_those_of_autograd_and_torchs_adam(changes, widths, doubles, plainly):
    """float64; one update within 1e-12, also where units are asleep; three rounds of five within 1e-9."""
    config = Config(
        **SMALL | {"gamma": 0.875, "widths": widths} | changes
    )  # γ is exact in float32, which the plain ones have
    agent = whole.Agent(config)
    replayed.asleep([agent.actor, *agent.critics, *agent.old_critics])
    model, critic = SquashedGaussian(2, 1, widths), Critics(2, 2, 1, widths)
    temperature = sac.Temperature(config.temperature)
    adam = Adam(temperature.parameters(), lr=config.temperature_learning_rate)
    learner, _, target_critic, _ = replayed.learner_of(config, model, critic, agent.actor, agent.critics, more=(adam,))
    one = config.updates == 1
    for step in range(1 if one else 3):
        rows = replayed.rows_of(step, config.updates, config.batch, 2, 1)
        dice = generator(box.SEED, step, 0, "noise")
        noise = torch.randn(2, config.updates, config.batch, 1, generator=dice)
        want = agent.learn(step, lambda k, rows=rows: [rows[name][k] for name in replayed.NAMES])
        losses, values, entropies = learner.learn(replay_updates.sac, rule_of(config), rows, noise)
        assert np.mean(losses) == pytest.approx(want["loss"], rel=1e-9)
        assert np.mean(values) == pytest.approx(want["q_mean"], rel=1e-9)
        assert np.mean(entropies) == pytest.approx(want["entropy"], rel=1e-9)
        assert float(temperature()) == pytest.approx(want["temperature"], rel=1e-12 if one else 1e-10)
    limit = 1e-12 if one else 1e-9
    replayed.same(model, [agent.actor], limit)
    replayed.same(critic, agent.critics, limit)
    replayed.same(target_critic, agent.old_critics, limit)


CHANGES = (
    {},
    {"automatic": False, "learning_rate": 0.005},
    {"entropy_target": -5.0, "temperature_learning_rate": 0.5, "tau": 0.5},
    {"temperature": 0.05, "buffer": 40, "gamma": 0.5, "actor_learning_rate": 0.002},
    {"learning_starts": 0, "batch": 5, "updates": 3, "widths": (7,)},
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_with_compiled_updates_equals_a_plain_one(changes, plainly, tmp_path):
    settings = SMALL | changes
    want, got = whole.plain(Config(**settings)), box.ours("rl/sac", settings | {"update": "compiled"}, tmp_path / "run")
    assert [row.keys() for row in got.rows] == [row.keys() for row in want.rows]
    for row, other in zip(got.rows, want.rows):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, net in want.nets.items():
        torch.testing.assert_close(box.saved(got.loaded, name), net, atol=2e-5, rtol=1e-3)
    assert got.numbers == pytest.approx(want.numbers, rel=1e-3, abs=1e-4)


def test_loop_in_machine_code_is_that_of_torch_and_goes_on_where_it_was_cut(monkeypatch, tmp_path):
    got = replayed.cut(sac, "rl/sac", SMALL, tmp_path, monkeypatch)
    want = etude.run("rl/sac", out=tmp_path / "torch", seed=box.SEED, quiet=True, **SMALL)
    for row, other in zip(replayed.log_of(got), replayed.log_of(want), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert got.metrics == pytest.approx(want.metrics, rel=1e-4, abs=1e-5)


@np.errstate(all="ignore")
def test_an_update_of_what_is_not_finite_is_not_made(plainly, tmp_path):
    config = Config(**SMALL)
    model, critic, agent = SquashedGaussian(2, 1, (6, 5)), Critics(2, 2, 1, (6, 5)), whole.Agent(config)
    temperature = sac.Temperature(config.temperature)
    adam = Adam(temperature.parameters(), lr=config.temperature_learning_rate)
    learner, *_, optimizers = replayed.learner_of(config, model, critic, agent.actor, agent.critics, more=(adam,))
    rows = replayed.rows_of(0, 5, 8, 2, 1)
    rows["reward"][3, 2] = torch.inf
    noise = torch.zeros(2, 5, 8, 1)
    losses, values, _ = learner.learn(replay_updates.sac, rule_of(config), rows, noise)
    assert len(losses) == len(values) == 4
    assert not losses[-1].isfinite()
    assert torch.stack(losses[:-1]).isfinite().all()
    assert all(p.isfinite().all() for net in (model, critic) for p in net.parameters())
    for optimizer, steps in zip((*optimizers, adam), (3, 3, 3), strict=True):
        assert replay_fused.state_of(optimizer)[1]["step"] == steps
    with pytest.raises(RunError, match="loss is|not finite"):
        etude.run("rl/sac", out=tmp_path / "run", quiet=True, update="compiled", **SMALL | {"learning_rate": 1e37})


def test_what_is_not_compiled_is_refused():
    replayed.refused(replay_fused.refuse)
