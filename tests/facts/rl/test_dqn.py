"""The written-out gradient against autograd, both parameterisations, the target's freezing, resume, refusals."""

import json
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.nn import functional as F

import etude
from etude.blocks.acting.replay import Replay
from etude.blocks.acting.returns import td_target
from etude.core.errors import RunError, UserError
from etude.rl import dqn
from etude.rl.dqn import Config, QNetwork, act, activations, backward, loss, slope

SMALL = {"steps": 160, "worlds": 2, "collect": 16, "updates": 4, "batch": 8, "buffer": 96, "learning_starts": 20}
SMALL |= {"widths": (6, 5), "evaluate_every": 64, "evaluation_episodes": 2, "final_episodes": 2, "quiet": True}


class Walk(gymnasium.Env):
    """A walk on a line whose state nobody can read: reward is the position, the time limit cuts at 7."""

    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal()
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += 1.0 if action else -1.0
        return np.array([self.x], np.float32), self.x, abs(self.x) > 5, False, {}


if "etude-test/Walk-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Walk-v0", entry_point=Walk, max_episode_steps=7)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("huber", [True, False])
@pytest.mark.parametrize("hidden", [(), (7,), (9, 6, 5)])
def test_written_out_gradient_is_that_of_autograd(heads, huber, hidden):  # E96: with the clipped error too
    torch.manual_seed(0)
    model = QNetwork(4, 3, hidden, heads).double()
    state, action, y = torch.randn(11, 4).double(), torch.randint(3, (11,)), 2 * torch.randn(11).double()
    q = model(state).gather(1, action[:, None])[:, 0]
    value = F.smooth_l1_loss(q, y) if huber else 0.5 * F.mse_loss(q, y)
    (want,) = torch.autograd.grad(value, model.phi)

    layers = model.layers(model.phi.detach())
    x, column = model.inputs(state, action)
    kept = activations(layers, x)
    error = kept[-1].gather(1, column)[:, 0] - y
    assert error.abs().max() > 1 > error.abs().min()  # both branches of Huber
    torch.testing.assert_close(loss(error, huber), value.detach())
    delta = torch.zeros_like(kept[-1]).scatter_(1, column, slope(error, huber)[:, None] / len(y))
    got = torch.full_like(want, float("nan"))  # everything must be written
    backward(layers, kept, delta, model.layers(got))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_network_is_the_mlp_it_says_and_starts_like_torch():
    torch.manual_seed(3)
    model = QNetwork(4, 2, (8, 5))
    torch.manual_seed(3)
    plain = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    )
    state = torch.randn(6, 4)
    torch.testing.assert_close(model(state), plain(state))


def test_both_parameterisations_give_equal_targets_on_shared_weights():
    # 7.6.6: each head's hidden units, switched on by its action alone, make one network with the action as input
    torch.manual_seed(0)
    state, actions, width, huge = 4, 3, 6, 1e3
    heads = QNetwork(state, actions, (width,), action_outputs=True).double()
    scalar = QNetwork(state, actions, (width * actions,), action_outputs=False).double()
    (w1, b1), (w2, b2) = heads.layers(heads.phi.detach())
    (v1, c1), (v2, c2) = scalar.layers(scalar.phi.detach())
    v1.zero_(), v2.zero_(), c2.zero_()
    for a in range(actions):
        rows = slice(a * width, (a + 1) * width)
        v1[rows, :state], c1[rows] = w1, b1 - huge
        v1[rows, state + a] = huge
        v2[0, rows] = w2[a]
    x = torch.randn(20, state).double()
    torch.testing.assert_close(scalar(x), heads(x) - b2, atol=1e-10, rtol=0)  # the heads' biases are set apart
    reward, over = torch.randn(20).double(), torch.rand(20) < 0.3
    b2.zero_()
    ours, theirs = (td_target(reward, over, net(x).detach().amax(1), 0.9) for net in (heads, scalar))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_actions_follow_the_configured_exploration():
    q, uniform = np.array([[0.0, 1.0, 0.5]]).repeat(3, 0), np.array([0.01, 0.5, 0.99])
    assert act(q, uniform, Config(), 0.0).tolist() == [1, 1, 1]
    assert act(q, uniform, Config(), 1.0).tolist() == [0, 1, 2]
    assert act(q, uniform, Config(exploration="notes_epsilon_greedy"), 1.0).tolist() == [0, 2, 2]
    assert act(q, uniform, Config(exploration="notes_epsilon_greedy"), 0.04).tolist() == [0, 1, 2]
    for temperature, actions in ((1e-3, [1, 1, 1]), (1e6, [0, 1, 2]), (1e-300, [1, 1, 1]), (1e300, [0, 1, 2])):
        config = Config(exploration="boltzmann", temperature=temperature)
        assert act(q.astype(np.float32), uniform, config, 0.5).tolist() == actions


@pytest.mark.parametrize(("every", "learning_rounds_between_copies"), [(1, 1), (16, 1), (48, 3)])
def test_target_is_frozen_bit_for_bit_between_copies(every, learning_rounds_between_copies, tmp_path, monkeypatch):
    seen, nets = [], {}
    original, real_backward = dqn.copy.deepcopy, dqn.backward

    def spy_copy(model):
        nets["online"], nets["target"] = model, original(model)
        return nets["target"]

    def spy_backward(*arguments):
        seen.append([net.phi.detach().clone() for net in (nets["online"], nets["target"])])
        return real_backward(*arguments)

    monkeypatch.setattr(dqn.copy, "deepcopy", lambda net: spy_copy(net) if isinstance(net, QNetwork) else original(net))
    monkeypatch.setattr(dqn, "backward", spy_backward)
    # one world: a step of its own goes into each reset, so rounds stay 16 transitions long
    etude.run("rl/dqn", out=tmp_path / "run", **{**SMALL, "worlds": 1, "learning_starts": 0}, target_every=every)
    assert len(seen) == 10 * 4
    first_copies = 0
    for update, (online, target) in enumerate(seen):
        starts_round = update % 4 == 0
        due = starts_round and (update // 4 + 1) % learning_rounds_between_copies == 0
        if due:
            assert torch.equal(target, online), "equal right after a copy"
            first_copies += 1
        elif update:
            assert torch.equal(target, seen[update - 1][1]), "frozen in between"
    assert first_copies == 10 // learning_rounds_between_copies
    assert nets["target"].phi.grad is None
    assert not torch.equal(seen[0][0], seen[-1][0])


def _crash_and_resume(folder, monkeypatch, **settings):
    """A run that fails in its 7th round, after a checkpoint of its 6th, and is then resumed."""
    calls, real = [], Replay.sample

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == 6:  # the first round draws nothing
            raise RunError("power cut")
        return real(self, *arguments)

    monkeypatch.setattr(Replay, "sample", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run("rl/dqn", out=folder, save_every=1, **settings)
    monkeypatch.setattr(Replay, "sample", real)
    return etude.resume(folder)


def test_resume_is_exact_with_buffer_and_worlds(tmp_path, monkeypatch):
    settings = {**SMALL, "seed": 4}
    whole = etude.run("rl/dqn", out=tmp_path / "whole", **settings)
    parts = _crash_and_resume(tmp_path / "parts", monkeypatch, **settings)
    assert parts.metrics == whole.metrics
    assert (parts.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()
    assert torch.equal(etude.load(parts.folder).model.phi, etude.load(whole.folder).model.phi)
    assert not (parts.folder / "artifacts" / "restarted_worlds.txt").exists()


def test_resume_restarts_what_cannot_be_restored_and_the_report_says_so(tmp_path, monkeypatch):
    result = _crash_and_resume(tmp_path / "run", monkeypatch, **{**SMALL, "env": "etude-test/Walk-v0"})
    note = (result.folder / "artifacts" / "restarted_worlds.txt").read_text()
    assert "etude-test/Walk-v0 cannot be restored exactly, so its 2 worlds were restarted" in note
    assert result.metrics["env_steps"] >= 160
    assert "restarted" in (result.folder / "report.html").read_text()
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))


def test_nan_stops_the_run_before_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(dqn, "slope", lambda error, huber: error * float("nan"))
    with pytest.raises(RunError, match="gradient_norm is nan at step"):
        etude.run("rl/dqn", out=tmp_path / "run", **SMALL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"env": "Pendulum-v1"}, "action space Box.*needs discrete actions"),
        ({"env": "CartPole-v2"}, "did you mean 'CartPole"),
        ({"worlds": 600}, "--worlds"),
    ],
)
def test_unusable_settings_are_answered(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        etude.run("rl/dqn", out=tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


def test_sample_plays_and_writes_films(tmp_path):
    pytest.importorskip("pygame")
    result = etude.run("rl/dqn", out=tmp_path / "run", **SMALL)
    folder = tmp_path / "samples"
    folder.mkdir()
    text = dqn.sample(etude.load(result.folder), dqn.Sample(count=2), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["episode-0.gif", "episode-1.gif"]
    assert text.count("return ") == 2
    assert (result.folder / "artifacts" / "episode.gif").stat().st_size > 1000
