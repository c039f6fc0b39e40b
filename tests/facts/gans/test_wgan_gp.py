"""The gradient penalty against critics whose slope is known, finite differences, and the distance of two Gaussians."""

import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import etude
from etude.blocks.nn.norm import BatchNorm
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.gans import wgan_gp
from etude.gans.parts.networks import PointCritic
from etude.gans.wgan_gp import Config, build, gradient_penalty, interpolates
from etude.optim import Adam, flatten

sys.path.insert(0, str(Path(__file__).parent))
import gan_oracle as oracle


def linear(w):
    return lambda x: x.flatten(1) @ w


def test_linear_critic_has_the_exact_penalty():  # E117
    torch.manual_seed(0)
    for shape in ((2,), (1, 4, 4), (3, 5, 2)):
        w = torch.randn(torch.Size(shape).numel(), dtype=torch.float64, requires_grad=True)
        x, y = (torch.randn(7, *shape, dtype=torch.float64) for _ in range(2))
        penalty = gradient_penalty(linear(w), interpolates(x, y))
        torch.testing.assert_close(penalty, (w.norm() - 1).square(), rtol=1e-12, atol=1e-14)
        (slope,) = torch.autograd.grad(penalty, w)
        torch.testing.assert_close(slope, (2 * (w.norm() - 1) * w / w.norm()).detach(), rtol=1e-10, atol=1e-12)
        step = 1e-6
        for i in (0, len(w) - 1):
            e = torch.zeros_like(w)
            e[i] = step
            high, low = (gradient_penalty(linear(w.detach() + s * e), x) for s in (1, -1))
            assert ((high - low) / (2 * step)).item() == pytest.approx(slope[i].item(), rel=1e-6, abs=1e-8)


def test_double_backward_passes_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)

    def penalty(a, b, c):
        return gradient_penalty(lambda v: torch.tanh(v @ a + b) @ c, x)

    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,), (4,))]
    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights, atol=1e-4)


def test_penalty_of_a_smooth_convolution_passes_finite_differences():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 4, 2, 1), nn.Softplus(), nn.Conv2d(3, 1, 4, 1, 0), nn.Flatten(0))
    critic = nn.Sequential(*layers).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    gradient_penalty(critic, x).backward()
    weight, step = critic[0].weight, 1e-5
    for place in ((0, 0, 1, 2), (2, 0, 3, 0)):
        with torch.no_grad():
            before = weight[place].item()
            values = []
            for s in (step, -step):
                weight[place] = before + s
                with torch.enable_grad():
                    values.append(gradient_penalty(critic, x).item())
            weight[place] = before
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(weight.grad[place].item(), rel=1e-6, abs=1e-9)


def test_one_epsilon_for_each_pair():
    torch.manual_seed(0)
    x, y = torch.zeros(64, 3, 4, 4), torch.ones(64, 3, 4, 4)
    epsilon = 1 - interpolates(x, y)  # x̂ = 1 − ε
    assert torch.equal(epsilon, epsilon[:, :1, :1, :1].expand_as(epsilon))
    drawn = epsilon[:, 0, 0, 0]
    assert len(drawn.unique()) == 64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.1)


def test_interpolates_lie_between_the_pair():
    torch.manual_seed(0)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    assert torch.equal(interpolates(x, y, torch.ones(6)), x)
    assert torch.equal(interpolates(x, y, torch.zeros(6)), y)
    torch.testing.assert_close(interpolates(x, y, torch.full((6,), 0.25)), 0.25 * x + 0.75 * y)


def test_norm_of_each_sample_at_the_interpolate():  # E120
    """f = ½‖x‖² has slope x̂: mean over samples of (‖x̂‖ − 1)², not the norm over the batch or a channel."""
    torch.manual_seed(0)
    x, y = (torch.randn(5, 2, 3, 3, dtype=torch.float64) for _ in range(2))
    epsilon = torch.rand(5, dtype=torch.float64)
    between = interpolates(x, y, epsilon)
    expected = sum((float((e * a + (1 - e) * b).norm()) - 1) ** 2 for e, a, b in zip(epsilon, x, y)) / 5

    def half_square(v):
        return v.square().flatten(1).sum(1) / 2

    assert gradient_penalty(half_square, between).item() == pytest.approx(expected, rel=1e-12)
    at_data = (x.flatten(1).norm(dim=1) - 1).square().mean().item()
    over_channels = (between.norm(dim=1) - 1).square().mean().item()
    over_batch = (between.norm() - 1).square().item()
    assert all(abs(expected - wrong) > 0.05 for wrong in (at_data, over_channels, over_batch))


def test_a_flat_critic_gives_penalty_1_and_finite_gradients():
    critic = nn.Linear(3, 1)
    nn.init.zeros_(critic.weight)
    penalty = gradient_penalty(lambda x: critic(x).flatten(), torch.randn(4, 3))
    penalty.backward()
    assert penalty.item() == 1
    assert critic.weight.grad.isfinite().all()


@pytest.mark.parametrize("normalizer", ["none", "layer"])
def test_the_critic_has_no_batch_norm(normalizer):
    spec = Spec((1, 16, 16), ("a", "b"), (0.5,), (0.2,))
    modules = build(Config(normalizer=normalizer, size=16, width=8, latent=8), spec)
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    assert not any(isinstance(layer, kinds) for layer in modules["critic"].modules())
    assert any(isinstance(layer, kinds) for layer in modules["generator"].modules())
    x = torch.randn(3, 1, 16, 16)
    gradient_penalty(modules["critic"], x).backward()
    assert all(p.grad is not None for name, p in modules["critic"].named_parameters() if name.endswith("weight"))


def test_estimate_of_the_distance_of_shifted_gaussians_within_5_percent():
    """A critic trained by lines 3-6 on N(0, I) and N(s, I) in the plane; W = ‖s‖."""
    torch.manual_seed(0)
    shift = torch.tensor([1.2, -0.9])  # ‖s‖ = 1.5
    f = PointCritic(32)
    optimizer = Adam([flatten(f)], lr=2e-3, betas=(0.0, 0.9))
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 500)
        x, y = torch.randn(256, 2), shift + torch.randn(256, 2)
        real, fake = f(torch.cat([x, y])).chunk(2)
        loss = fake.mean() - real.mean() + 10 * gradient_penalty(f, interpolates(x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(20_000, 2)
    y = shift + x
    estimate = (f(x).mean() - f(y).mean()).item()
    along = shift / shift.norm()
    W = wasserstein_distance((x @ along).numpy(), (y @ along).numpy())  # a shift is moved along itself
    assert pytest.approx(1.5, rel=1e-3) == W
    assert estimate == pytest.approx(W, rel=0.05)  # measured +2.6 %


# ----------------------------------------------------------------------------------------------------- the whole run

TINY = {"steps": 4, "batch": 8, "width": 6}
DIGITS = {"data": "digits", "size": 16, "steps": 3, "batch": 6, "width": 3, "latent": 5, "learning_rate": 1e-3}
RUNS = {
    "ring": TINY | {"evaluate_every": 1},
    "one critic step": TINY | {"critic_steps": 1, "gradient_penalty": 4.0, "beta1": 0.5, "beta2": 0.99, "latent": 3}
    | {"schedule": "cosine"},
    "digits": DIGITS | {"critic_steps": 2, "gradient_penalty": 10.0, "schedule": "constant", "evaluate_every": 1},
    "digits, layer norm": DIGITS | {"critic_steps": 2, "normalizer": "layer"},
}  # fmt: skip


def plain_penalty(f, x, y):
    """The mean over pairs of (‖∇f‖ − 1)² at a random place between the two, one pair at a time."""
    epsilon, terms = torch.rand(len(x)), []
    for e, a, b in zip(epsilon, x, y, strict=True):
        place = (e * a + (1 - e) * b)[None].requires_grad_()
        (slope,) = torch.autograd.grad(f(place)[0], place, create_graph=True)
        terms.append((torch.linalg.vector_norm(slope) - 1) ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("case", RUNS)
def test_loop_is_the_plain_one(case, tmp_path, monkeypatch):
    config = wgan_gp.Config(**RUNS[case])
    with oracle.small(monkeypatch):
        result = oracle.run("gans/wgan_gp", tmp_path, RUNS[case])
        images, built = oracle.start(wgan_gp, config)
        G = oracle.plain_generator(built["generator"], config)
        f = oracle.plain_critic(built["critic"], config, bias=False, normalizer=config.normalizer)
        G_adam, f_adam = (torch.optim.Adam(net.parameters(), betas=(config.beta1, config.beta2)) for net in (G, f))
        seen = []
        for step in range(config.steps):
            torch.manual_seed(fold(oracle.SEED, step, 0, "step"))
            oracle.set_rate((G_adam, f_adam), config, step)
            samples = G(torch.randn(config.critic_steps * config.batch, config.latent)).detach()
            real = oracle.batches(images, config, step, config.critic_steps)
            for x, y in zip(real, samples.split(config.batch), strict=True):
                distance, penalty = f(x).mean() - f(y).mean(), plain_penalty(f, x, y)
                loss = -distance + config.gradient_penalty * penalty
                f_adam.zero_grad()
                loss.backward()
                f_adam.step()
            G_loss = -f(G(torch.randn(config.batch, config.latent))).mean()
            G_adam.zero_grad()
            G_loss.backward()
            G_adam.step()
            seen.append((loss.item(), distance.item(), penalty.item(), G_loss.item()))
        oracle.agree(etude.load(result.folder), generator=G, critic=f)
        names = ("critic", "distance", "gradient_penalty", "generator")
        torch.testing.assert_close(oracle.logged(result.folder, *names), torch.tensor(seen).T)


@pytest.mark.parametrize("case", ["ring", "digits"])
def test_reported_numbers_are_those_of_the_saved_state(case, tmp_path, monkeypatch):
    with oracle.small(monkeypatch):
        result = oracle.run("gans/wgan_gp", tmp_path, RUNS[case])
        oracle.check_reported(wgan_gp, result, critic="critic")
