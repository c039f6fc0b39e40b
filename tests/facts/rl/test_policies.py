"""The parts that policy gradients share: densities against torch.distributions, draws, and the enumerated world."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal

from etude.rl.parts.policies import (
    CategoricalPolicy,
    GaussianPolicy,
    ValueNetwork,
    categorical_draw,
    categorical_entropy,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_log_prob,
)

exact = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("enumeration.py"))))


def test_categorical_equals_torch_distributions():
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, 5, 4, dtype=torch.float64)
    action = torch.randint(4, (7, 5))
    peer = Categorical(logits=logits)
    torch.testing.assert_close(categorical_log_prob(logits, action), peer.log_prob(action), atol=1e-13, rtol=0)
    torch.testing.assert_close(categorical_entropy(logits), peer.entropy(), atol=1e-13, rtol=0)
    assert categorical_entropy(torch.zeros(3)).item() == pytest.approx(math.log(3))
    assert categorical_entropy(torch.tensor([0.0, -math.inf, 0.0])).item() == pytest.approx(math.log(2))
    far = torch.tensor([0.0, -300.0])  # the probability is 0 in float32, its logarithm is not
    assert categorical_log_prob(far, torch.tensor(1)).item() == -300.0


def test_gaussian_equals_torch_distributions():
    torch.manual_seed(0)
    mean, action, log_std = torch.randn(7, 3).double(), torch.randn(7, 3).double(), torch.randn(3).double()
    peer = Independent(Normal(mean, log_std.exp().expand(7, 3)), 1)
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, action), peer.log_prob(action), atol=1e-12, rtol=0)
    torch.testing.assert_close(gaussian_entropy(log_std).expand(7), peer.entropy(), atol=1e-12, rtol=0)


def test_draws_have_the_probabilities_they_should():
    logits = torch.tensor([0.3, -1.0, 1.2, -math.inf])
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = categorical_draw(logits.expand(len(even), 4), even)
    assert drawn.dtype == torch.int64
    share = torch.bincount(drawn, minlength=4) / len(even)
    torch.testing.assert_close(share, logits.softmax(0), atol=2e-5, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    first = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
    assert categorical_draw(first.expand(2, 4), ends).tolist() == [1, 3]


@pytest.mark.parametrize(
    "make", [lambda: CategoricalPolicy(4, 3, (8, 5)), lambda: GaussianPolicy(4, 3, (8, 5), log_std=-0.5)]
)
def test_a_policy_is_a_function_of_state_and_noise(make):
    torch.manual_seed(0)
    policy, state = make().double(), torch.randn(2000, 4).double()
    noise = [policy.noise(torch.Generator().manual_seed(3), 2000) for _ in range(2)]
    assert torch.equal(*noise)
    action = policy.act(state, noise[0])
    assert not action.requires_grad
    assert torch.equal(action, policy.act(state, noise[1]))
    log_prob, entropy = policy.judge(state, action)
    assert log_prob.shape == entropy.shape == (2000,)
    assert log_prob.requires_grad
    best, _ = policy.judge(state, policy.best(state))
    assert (best >= log_prob).all()
    # E[−log π(a)] is the entropy: 2,000 draws, a standard error of about 0.02
    assert (log_prob + entropy).mean().abs() < 0.06
    if isinstance(policy, GaussianPolicy):
        scaled = (action - policy(state)) / policy.log_std.exp()
        torch.testing.assert_close(scaled, noise[0].double(), atol=1e-12, rtol=0)


def test_networks_are_plain_tanh_networks():
    state = torch.randn(6, 4)
    for make, outputs in ((lambda: CategoricalPolicy(4, 2, (8, 5)), 2), (lambda: ValueNetwork(4, (8, 5)), 1)):
        torch.manual_seed(3)
        ours = make()
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, outputs))
        torch.testing.assert_close(ours(state).view(6, outputs), plain(state))
    near_even = CategoricalPolicy(4, 2, (8, 5), head_gain=0.01)
    assert near_even(state).abs().max() < 0.05
    assert all(not layer.bias.any() for layer in near_even.net if isinstance(layer, nn.Linear))
    hidden = near_even.net[2].weight  # (5, 8): orthogonal rows of length √2
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_enumerated_world_is_consistent(gamma):
    # 7.1.2, 7.2: Σ p = 1; J forwards (trajectories), backwards (values) and by occupancy agree to rounding
    world, theta = exact.small_world(), exact.small_policy()
    every = exact.trajectories(world)
    assert len(every.chance) == 64
    probability = exact.probability(theta, every).detach()
    assert probability.sum().item() == pytest.approx(1, abs=1e-14)
    value, q = exact.values(world, theta, gamma)
    j = exact.objective(world, theta, gamma).item()
    assert (world.start @ value[0]).item() == pytest.approx(j, abs=1e-14)
    here = exact.occupancy(world, theta)
    torch.testing.assert_close(here.sum(1), torch.ones(3, dtype=torch.float64))
    policy = theta.detach().softmax(-1)
    discounts = gamma ** torch.arange(3, dtype=torch.float64)
    assert torch.einsum("t,ts,sa,sa->", discounts, here, policy, world.reward).item() == pytest.approx(j, abs=1e-14)
    # the policy gradient theorem, Σ_t γ^t E[∇ log π Q_t], is autograd's gradient
    s, a = torch.arange(2)[:, None].expand(2, 2), torch.arange(2).expand(2, 2)
    weight = discounts[:, None, None] * here[:, :, None] * policy * q
    theorem = torch.einsum("tsa,saij->ij", weight, exact.score(theta, s, a))
    torch.testing.assert_close(theorem, exact.gradient(world, theta, gamma), atol=1e-14, rtol=0)
    # 7.4.2: the advantage is zero on average
    torch.testing.assert_close((policy * q).sum(-1), value[:-1], atol=1e-14, rtol=0)


def test_enumerated_batches_are_all_of_them():
    world, theta = exact.small_world(horizon=1), exact.small_policy()
    every = exact.trajectories(world)
    p = exact.probability(theta, every).detach()
    index, weight = exact.batches(every, p, 3)
    assert index.shape == (64, 3)
    assert weight.sum().item() == pytest.approx(1, abs=1e-14)
    assert (weight * every.reward[index, 0].mean(1)).sum().item() == pytest.approx(exact.objective(world, theta).item())
