"""DQN's updates in machine code: in float64 against autograd and torch's Adam, whole runs against a plain one and torch's."""

import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.core.errors import RunError, UserError
from etude.optim.adam import Adam
from etude.rl import dqn
from etude.rl.dqn import Config, QNetwork
from etude.rl.parts import replay_fused
from etude.rl.parts.replay_updates import Choices

HERE = Path(__file__)
replayed, whole = (
    SimpleNamespace(**runpy.run_path(str(HERE.with_name(name)))) for name in ("replayed.py", "test_dqn_run.py")
)
SMALL = whole.SMALL
doubles = replayed.doubles


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(dqn, "show", lambda *given: None)


@pytest.fixture
def plainly(monkeypatch):
    """The same loops, not compiled."""
    monkeypatch.setattr(replay_fused, "compiled", lambda loop: loop)


def rows_of(step, updates=5, batch=8):
    rows = replayed.rows_of(step, updates, batch, 4, 1)
    return rows | {"action": (rows["action"][..., 0] > 0).long(), "reward": 3 * rows["reward"]}


def learner_of(config):
    """A plain network with units that are asleep, ours of the same weights, and what makes its updates."""
    net = whole.network(config)
    replayed.asleep([net])
    model = QNetwork(4, 2, config.widths)
    model.phi.data.copy_(whole.flat(net))
    adam = Adam(model.parameters(), lr=config.learning_rate)
    return net, model, adam, replay_fused.ValueLearner(adam, list(pairwise(model.widths)), config.batch)


def goals_of(rows, behind, gamma):
    return rows["reward"] + gamma * behind.amax(-1) * ~rows["terminated"]


@pytest.mark.parametrize("widths", replayed.WIDTHS, ids=str)
@pytest.mark.parametrize(
    "changes", [{"updates": 1}, {}, {"huber": False, "clip_norm": 100.0}, {"double": True, "gamma": 0.5}], ids=str
)
def test_updates_are_those_of_autograd_and_torchs_adam(changes, widths, doubles, plainly):
    """float64; one update within 1e-12, also where units are asleep; three rounds of five within 1e-9."""
    torch.manual_seed(0)
    config = Config(**SMALL | {"updates": 5, "widths": widths} | changes)
    net, model, _, learner = learner_of(config)
    plain_adam = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    one = config.updates == 1
    for step in range(1 if one else 3):
        rows = rows_of(step, config.updates)
        behind = torch.randn(config.updates, 8, 2)
        y, want, lengths = goals_of(rows, behind, config.gamma), [], []
        choices = Choices(config.gamma, config.clip_norm, config.huber, config.double)
        said, norms = learner.learn(choices, rows, behind, given := y.clone())
        for k in range(config.updates):
            if config.double:
                best = net(rows["next_state"][k]).argmax(1)
                behind_k = behind[k].gather(1, best[:, None])[:, 0]
                y[k] = rows["reward"][k] + config.gamma * behind_k * ~rows["terminated"][k]
            q = net(rows["state"][k])
            chosen = q.gather(1, rows["action"][k][:, None])[:, 0]
            value = F.smooth_l1_loss(chosen, y[k]) if config.huber else 0.5 * F.mse_loss(chosen, y[k])
            plain_adam.zero_grad()
            value.backward()
            lengths.append(nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm))
            plain_adam.step()
            want.append(q.detach())
        torch.testing.assert_close(said, torch.stack(want), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(given, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norms, torch.stack(lengths), rtol=1e-8, atol=1e-9)
    assert (norms > config.clip_norm).any() == (config.clip_norm < 1)
    limit = 1e-12 if one else 1e-9
    torch.testing.assert_close(model.phi.detach(), whole.flat(net), rtol=0, atol=limit)


CHANGES = (
    {},
    {"double": True, "target_every": 64, "learning_rate": 0.05},
    {"huber": False, "gamma": 0.8, "clip_norm": 100.0},
    {"updates": 7, "batch": 5, "widths": (7,), "buffer": 32},
    {"collect": 24, "worlds": 3, "exploration": "boltzmann", "temperature": 0.05},
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_with_compiled_updates_equals_a_plain_one(changes, plainly, tmp_path):
    settings = SMALL | changes
    want = whole.plain(Config(**settings))
    metrics, rows, loaded = whole.ours(settings | {"engine": "compiled_update"}, tmp_path / "run")
    whole.agree(rows, want.rows)
    torch.testing.assert_close(loaded.model.phi.detach(), want.final, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.as_tensor(loaded.state["target"]["phi"]), want.target, atol=2e-5, rtol=1e-4)
    assert metrics == pytest.approx(want.numbers, rel=2e-4, abs=2e-5)


def test_loop_in_machine_code_is_that_of_torch_and_goes_on_where_it_was_cut(monkeypatch, tmp_path):
    got = replayed.cut(dqn, "rl/dqn", SMALL | {"engine": "compiled_whole"}, tmp_path, monkeypatch)
    want = etude.run("rl/dqn", out=tmp_path / "torch", seed=replayed.SEED, quiet=True, engine="compiled", **SMALL)
    whole.agree(replayed.log_of(got), replayed.log_of(want))
    assert got.metrics == pytest.approx(want.metrics, rel=2e-4, abs=2e-5)


@np.errstate(all="ignore")
def test_an_update_of_what_is_not_finite_is_not_made(plainly, tmp_path):
    _, model, adam, learner = learner_of(Config(**SMALL))
    rows = rows_of(0)
    rows["state"][3, 2] = torch.inf
    said, norms = learner.learn(Choices(0.9, 1.0, True, False), rows, torch.zeros(5, 8, 2), torch.zeros(5, 8))
    assert norms[:3].isfinite().all()
    assert len(norms) == 4
    assert not norms[3].isfinite()
    assert model.phi.isfinite().all()
    assert said[:3].isfinite().all()
    assert replay_fused.state_of(adam)[1]["step"] == 3
    with pytest.raises(RunError, match="gradient_norm is|no longer finite|loss is"):
        etude.run(
            "rl/dqn", out=tmp_path / "run", quiet=True, engine="compiled_update", **SMALL | {"learning_rate": 1e37}
        )


def test_what_is_not_compiled_is_refused(tmp_path):
    replayed.refused(replay_fused.refuse, (False, "never"))
    for flags, said in (
        ({"env": "atari:Pong,size=36"}, "Pong.* shows images"),
        ({"action_outputs": False}, "--no-action"),
    ):
        with pytest.raises(UserError, match=said):
            etude.run("rl/dqn", out=tmp_path / "run", engine="compiled_update", quiet=True, **flags)
        assert not (tmp_path / "run").exists()


def test_loop_is_compiled_where_it_is_said(monkeypatch, tmp_path):
    """Four engines: which worlds, and whose updates."""
    asked, real = [], dqn.Worlds.make.__func__

    def spy(kind, *given, **more):
        asked.append(given[5])
        return real(kind, *given, **more)

    monkeypatch.setattr(
        dqn.Worlds, "make", classmethod(lambda kind, *g, **m: spy(kind, *g, **m) if len(g) > 5 else real(kind, *g, **m))
    )
    learned = replay_fused.ValueLearner.learn
    for engine in ("gymnasium", "compiled", "compiled_update", "compiled_whole"):
        calls = []
        monkeypatch.setattr(replay_fused.ValueLearner, "learn", lambda *g, c=calls: c.append(1) or learned(*g))
        asked.clear()
        etude.run(
            "rl/dqn", out=tmp_path / engine, engine=engine, quiet=True, **SMALL | {"steps": 40, "evaluate_every": 0}
        )
        assert bool(calls) == (engine in ("compiled_update", "compiled_whole"))
        assert asked[0] == ("compiled" if engine in ("compiled", "compiled_whole") else "gymnasium")
