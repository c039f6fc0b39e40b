"""PPO's kernels: in float64 against torch's own parts, in machine code against the plain functions, whole runs against torch's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import etude
from etude.blocks.acting.returns import lambda_advantages
from etude.core.errors import RunError, UserError
from etude.optim.adam import Adam
from etude.optim.flat import flatten
from etude.rl import ppo
from etude.rl.parts import kernels
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.fused import Fused, laid_out, refuse
from etude.rl.parts.rollouts import Segment, advantages

NETS = {"apart": ((5, 6), False), "shared": ((5, 6), True), "linear": ((), False), "one shared": ((4,), True)}
RULE = kernels.Rule(
    batch=10, clip=0.2, value_coefficient=0.7, entropy_bonus=0.3, normalise=True, target_kl=0.0, clip_norm=0.5
)


def model_of(kind, dtype=torch.float64):
    """A network away from where it begins, and states, actions, old log-probabilities, advantages and returns (33 rows)."""
    torch.manual_seed(1)
    widths, shared = NETS[kind]
    model = ActorCritic(3, 4, widths, shared).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    state, action = torch.randn(33, 3).to(dtype), torch.randint(4, (33,))
    old, advantage, returns = (torch.randn(33).to(dtype) for _ in range(3))
    with torch.no_grad():
        old = model.judge(state, action)[0] + 0.2 * old
    return model, (state, action, old, advantage, returns)


def loss_of(model, rule, state, action, old, advantage, returns):
    """The loss by torch's distributions, and what else a minibatch reports."""
    logits, value = model(state)
    policy = Categorical(logits=logits)
    if rule.normalise and len(state) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_ratio = policy.log_prob(action) - old
    ratio = log_ratio.exp()
    gain = torch.min(ratio * advantage, ratio.clamp(1 - rule.clip, 1 + rule.clip) * advantage).mean()
    error, entropy = 0.5 * (value - returns).square().mean(), policy.entropy().mean()
    loss = rule.value_coefficient * error - gain - rule.entropy_bonus * entropy
    return loss, error, entropy, (ratio - 1 - log_ratio).mean(), (ratio - 1).abs() > rule.clip


def plain(model, rule, orders, rate, before, *data):
    """All passes by autograd, torch's Adam and a clip of the norm; `before` steps with no gradient were taken."""
    adam = torch.optim.Adam(model.parameters(), lr=rate, eps=1e-5)
    for _ in range(before):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
    losses, beyond = [], []
    for order in orders:
        for index in order.split(rule.batch):
            loss, error, entropy, kl, outside = loss_of(model, rule, *(x[index] for x in data))
            adam.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            for parameter in model.parameters():
                parameter.grad *= min(1.0, rule.clip_norm / norm)
            adam.step()
            losses.append(loss.item())
            beyond += outside.tolist()
        if rule.target_kl and kl > rule.target_kl:
            break
    return losses, np.mean(beyond), kl.item(), entropy.item(), error.item()


def room_of(size, dtype=np.float64):
    return tuple(np.empty((3, size), dtype))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "changes",
    [
        {"target_kl": 0.0},
        {"target_kl": 1e-3},
        {"normalise": False, "entropy_bonus": 0.0, "clip_norm": 9.0},
        {"batch": 33, "value_coefficient": 2.0},
        {"batch": 16, "clip": 0.02},
    ],
    ids=str,
)
def test_the_passes_are_those_of_autograd_and_torchs_adam(kind, changes):
    """float64, three passes of several minibatches, the last one smaller (of one row where 16 are taken)."""
    rule, (model, data) = RULE._replace(**changes), model_of(kind)
    orders = [torch.randperm(33) for _ in range(3)]
    vector = flatten(model)
    networks, size = laid_out(model, vector, rule.batch)
    theta, gradient = vector.detach().numpy().copy(), np.full(len(vector), 7.0)  # what stood there is written over
    averages, losses = np.zeros((2, len(vector))), np.zeros(99)
    updates, finite, *found = kernels.learn(
        theta, gradient, *averages, kernels.Adam(0.01, 0.9, 0.999, 1e-5, 5), networks, rule,
        kernels.Data(*(x.numpy() for x in data)), torch.stack(orders).numpy(), room_of(size), losses,
    )  # fmt: skip
    want, *numbers = plain(model, rule, orders, 0.01, 5, *data)
    assert finite
    assert updates == len(want)
    assert (updates < 3 * -(-33 // rule.batch)) == bool(rule.target_kl)
    np.testing.assert_allclose(losses[:updates], want, rtol=1e-9)
    np.testing.assert_allclose(found, numbers, rtol=1e-8, atol=1e-12)
    assert 0 < found[0] < 1
    np.testing.assert_allclose(theta, vector.detach().numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", NETS)
def test_values_densities_and_draws_are_the_models(kind):
    model, (state, action, *_) = model_of(kind)
    vector = flatten(model)
    networks, size = laid_out(model, vector, 10)
    theta, kept = vector.detach().numpy(), np.empty(size)
    found, value, drawn = np.empty((3, 33)), np.empty(33), np.empty(10, np.int64)
    kernels.judge(theta, networks, state.numpy(), action.numpy(), kept, 10, *found)
    kernels.values(theta, networks, state.numpy(), kept, 10, value)
    with torch.no_grad():
        for one, other in zip(found, model.judge(state, action), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(value, model.value(state), rtol=1e-12)
    for uniform in (torch.rand(10, dtype=torch.float64), torch.zeros(10).double(), torch.ones(10).double() - 1e-16):
        kernels.act(theta, networks, state[:10].numpy(), uniform.numpy(), kept, drawn)
        np.testing.assert_array_equal(drawn, model.act(state[:10], uniform))


def flags():
    dice = np.random.default_rng(0)
    reward, value, behind = (dice.standard_normal((40, 3)).astype(np.float32) for _ in range(3))
    terminated, truncated = dice.random((40, 3)) < 0.2, dice.random((40, 3)) < 0.2
    terminated[-1], truncated[-1] = [True, False, False], [False, True, False]
    return [torch.from_numpy(x) for x in (reward, terminated, truncated, value, behind)]


def test_advantages_are_those_of_every_other_method():
    parts = flags()
    for gamma, lam in ((0.9, 0.8), (1.0, 1.0), (0.7, 0.0)):
        found = np.empty((40, 3), np.float32)
        kernels.lambda_advantages(*(x.numpy() for x in parts), gamma, lam, found)
        want = lambda_advantages(*parts, gamma, lam)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
        fused, _ = learner(model_of("apart", torch.float32)[0])
        state, reached = torch.randn(41, 3, 3), torch.randn(int(parts[2].sum()), 3)
        segment = Segment(state, parts[0], *parts[:3], parts[1] < 2, reached)
        got, want = (call(segment, fused.value, gamma, lam) for call in (fused.advantages, advantages))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tanh_of_machine_code_is_within_three_units_in_the_last_place():
    from numba import njit

    x = np.linspace(-12, 12, 1_000_001).astype(np.float32)
    x = np.concatenate([x, np.logspace(-30, 1, 100_000).astype(np.float32)])
    h, want = x.copy(), np.tanh(x.astype(np.float64))
    njit(**kernels.LOOSE)(kernels.bend)(h)
    unit = np.spacing(np.maximum(np.abs(want), 1e-37).astype(np.float32))
    assert np.abs(h - want).max() > 0  # measured 2.2 units
    assert (np.abs(h - want) / unit).max() < 3
    assert h.min() == -1
    assert h.max() == 1
    odd = np.array([0.0, np.inf, -np.inf, np.nan], np.float32)
    njit(**kernels.LOOSE)(kernels.bend)(odd)
    np.testing.assert_array_equal(odd, [0, 1, -1, np.nan])
    few = x[::10_000].copy()
    kernels.bend(few)  # uncompiled
    np.testing.assert_allclose(few, want[::10_000], rtol=4e-7)


def learner(model, rule=RULE, rate=0.01):
    vector = flatten(model)
    return Fused(model, vector, Adam([vector], lr=rate, eps=1e-5), rule, 7), vector


def test_machine_code_is_the_plain_functions():
    """float32, a shared trunk: `Fused` against torch's modules, its updates against autograd."""
    model, data = model_of("shared", torch.float32)
    other, _ = model_of("shared", torch.float32)
    fused, vector = learner(model)
    state, action = data[:2]
    with torch.no_grad():
        torch.testing.assert_close(fused.value(state), model.value(state), rtol=1e-5, atol=1e-6)
        for one, two in zip(fused.judge(state, action), model.judge(state, action)):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    uniform = torch.rand(7, dtype=torch.float64)
    assert fused.act(state[:7], uniform).equal(model.act(state[:7], uniform))
    orders = [torch.randperm(33) for _ in range(2)]
    losses, found = fused.learn(0.1, (order for order in orders), *data)
    want, *numbers = plain(other, RULE._replace(clip=0.1), orders, 0.01, 0, *data)
    np.testing.assert_allclose(torch.stack(losses), want, rtol=1e-4)
    np.testing.assert_allclose([float(x) for x in found.values()], numbers, rtol=1e-3, atol=1e-5)
    assert list(found) == ["clip_fraction", "kl", "entropy", "value_loss"]
    torch.testing.assert_close(vector.detach(), flatten(other).detach(), rtol=1e-3, atol=1e-5)
    assert float(fused.optimizer.state[vector]["step"]) == len(want) == 8


def test_a_number_that_is_not_finite_ends_the_passes_before_the_update():
    model, data = model_of("apart", torch.float32)
    fused, vector = learner(model)
    data[4][0] = torch.inf
    before, orders = vector.detach().clone(), [torch.arange(33)]
    losses, _ = fused.learn(0.2, orders, *data)
    assert len(losses) == 1
    assert not losses[0].isfinite()
    assert vector.detach().equal(before)
    assert float(fused.optimizer.state[vector]["step"]) == 0


BASE = {"steps": 330, "worlds": 3, "segment": 18, "passes": 3, "batch": 20, "widths": (6, 5), "learning_rate": 0.02}
BASE |= {"evaluate_every": 150, "evaluation_episodes": 2, "final_episodes": 3, "gamma": 0.9, "gae_lambda": 0.7}
BASE |= {"clip_ratio": 0.1, "quiet": True, "seed": 3}
CHANGES = (
    {},
    {"engine": "compiled", "schedule": "constant", "normalise": False},
    {"target_kl": 1e-4, "clip_norm": 0.05, "value_coefficient": 2.0, "gae_lambda": 1.0},
    {"env": "Acrobot-v1", "engine": "compiled", "shared": True, "entropy_bonus": 0.2},
    {"env": "MountainCar-v0", "widths": (), "batch": 200, "segment": 70, "steps": 420},
)


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(ppo, "show", lambda *arguments: None)


def rows_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def flat(run):
    return torch.cat([p.detach().flatten() for p in etude.load(run.folder).model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [*CHANGES[:3], *(pytest.param(changes, marks=pytest.mark.long) for changes in CHANGES[3:])],
    ids=lambda changes: "-".join(changes) or "base",
)
def test_loop_in_machine_code_is_that_of_torch(changes, no_film, tmp_path):
    settings = BASE | changes
    one = etude.run("rl/ppo", out=tmp_path / "torch", **settings)
    two = etude.run("rl/ppo", out=tmp_path / "compiled", update="compiled", **settings)
    assert len(rows_of(one)) == len(rows_of(two)) > 1
    for want, row in zip(rows_of(one), rows_of(two)):
        assert row == pytest.approx(want, rel=2e-3, abs=2e-5)
    torch.testing.assert_close(flat(two), flat(one), rtol=2e-3, atol=1e-4)
    assert two.metrics == pytest.approx(one.metrics, rel=2e-3, abs=2e-5)


def test_a_run_goes_on_where_it_was_cut_to_the_last_bit(no_film, monkeypatch, tmp_path):
    settings = BASE | {"update": "compiled", "engine": "compiled", "save_every": 1}
    whole = etude.run("rl/ppo", out=tmp_path / "whole", **settings)
    real, calls = ppo.collect, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("power cut")
        return real(*arguments)

    monkeypatch.setattr(ppo, "collect", failing)
    with pytest.raises(RunError, match="power cut"):
        etude.run("rl/ppo", out=tmp_path / "parts", **settings)
    parts = etude.resume(tmp_path / "parts")
    assert rows_of(parts) == rows_of(whole)
    assert parts.metrics == whole.metrics
    assert flat(parts).equal(flat(whole))
    first, other = (etude.load(run.folder).state["optimizer"] for run in (whole, parts))
    torch.testing.assert_close(first, other, rtol=0, atol=0)


def test_a_run_that_diverges_ends_with_a_sentence(no_film, tmp_path):
    settings = BASE | {"learning_rate": 1e37, "update": "compiled", "clip_ratio": 1e3, "normalise": False}
    with pytest.raises(RunError, match="not finite"):
        etude.run("rl/ppo", out=tmp_path / "run", **settings)


def test_what_is_not_compiled_is_refused(tmp_path):
    for env, said in (("Pendulum-v1", "are continuous; leave it out"), ("atari:Pong,size=36", "shows images")):
        with pytest.raises(UserError, match=said):
            etude.run("rl/ppo", out=tmp_path / "run", env=env, update="compiled", quiet=True)
        assert not (tmp_path / "run").exists()
    worlds = SimpleNamespace(shape=(4,), box=False, name="CartPole-v1")
    for world, device, said in ((2, "cpu", "on one rank, and there are 2"), (1, "cuda", "add --device cpu$")):
        with pytest.raises(UserError, match=said):
            refuse(SimpleNamespace(world=world, device=torch.device(device)), worlds)
    model = ActorCritic(3, 2, (4,))
    model.critic[1] = torch.nn.ReLU()
    with pytest.raises(UserError, match="not ReLU"):
        laid_out(model, flatten(model), 8)
