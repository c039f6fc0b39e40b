"""GAN objectives against closed forms, quadrature and the optimal discriminator of 1-D Gaussians."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import integrate, stats
from torch import nn

import etude
from etude.core.randomness import fold
from etude.gans import gan
from etude.gans.gan import OBJECTIVES, anneal, blur, log_not, minus_log, minus_log_not
from etude.gans.parts.ring import ring, ring_scores

sys.path.insert(0, str(Path(__file__).parent))
import gan_oracle as oracle

LOG4 = math.log(4)


def slope(loss, a):
    a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(a), a)[0].item()


def value(p, q, xs, objective=OBJECTIVES["minimax"], best=None):
    """V(D*, G) = −∫ p ρ(a*) + q φ(a*) on a grid, with the score a* of the best D (log p/q unless given)."""
    a = p.log() - q.log() if best is None else best
    assert a.isfinite().all()
    integrand = p * objective.real(a) + q * objective.fake(a)
    return -torch.trapezoid(integrand, xs).item()


def normal(xs, mean, sigma):
    return torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(sigma).double()).log_prob(xs).exp()


def jensen_shannon(p, q, low, high):
    """By adaptive quadrature of scipy densities, sharing nothing with the code under test."""

    def integrand(x):
        a, b = p(x), q(x)
        middle = (a + b) / 2
        terms = ((a, math.log(a / middle)) if a > 0 else (0, 0), (b, math.log(b / middle)) if b > 0 else (0, 0))
        return 0.5 * sum(weight * log for weight, log in terms)

    return integrate.quad(integrand, low, high, limit=400, points=[0.0, 1.5])[0]


def test_value_where_the_discriminator_knows_nothing():
    a = torch.zeros(7, dtype=torch.float64)
    for name in ("minimax", "non_saturating"):
        loss = OBJECTIVES[name]
        assert -(loss.real(a).mean() + loss.fake(a).mean()).item() == pytest.approx(2 * math.log(0.5), abs=1e-15)
    assert OBJECTIVES["minimax"].generator(a).mean().item() == pytest.approx(math.log(0.5))
    assert OBJECTIVES["non_saturating"].generator(a).mean().item() == pytest.approx(-math.log(0.5))


def test_slopes_saturate_or_do_not():
    for a in (-40.0, -8.0, -1.0, 0.0, 2.0):
        D = 1 / (1 + math.exp(-a))
        assert slope(OBJECTIVES["minimax"].generator, a) == pytest.approx(-D, abs=1e-15)
        assert slope(OBJECTIVES["non_saturating"].generator, a) == pytest.approx(-(1 - D), abs=1e-15)
    assert abs(slope(OBJECTIVES["minimax"].generator, -40.0)) < 1e-15
    assert slope(OBJECTIVES["non_saturating"].generator, -40.0) == pytest.approx(-1, abs=1e-15)


def test_losses_on_scores_equal_logarithms_and_survive_where_those_fail():
    a = torch.linspace(-15, 15, 61, dtype=torch.float64)
    D = torch.sigmoid(a)
    torch.testing.assert_close(minus_log(a), -D.log(), rtol=1e-9, atol=0)
    torch.testing.assert_close(minus_log_not(a), -(1 - D).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_not(a), (1 - D).log(), rtol=1e-9, atol=1e-9)
    far = torch.tensor([-200.0, 200.0])
    assert minus_log(far).tolist() == [200.0, 0.0]
    assert minus_log_not(far).tolist() == [0.0, 200.0]
    bce = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(minus_log(a).mean(), bce(a, torch.ones_like(a)))
    torch.testing.assert_close(minus_log_not(a).mean(), bce(a, torch.zeros_like(a)))


@pytest.mark.parametrize("name", ["minimax", "least_squares"])
def test_trained_discriminator_finds_p_over_p_plus_q(name):
    """20,000 draws of two Gaussians of unlike width, a score quadratic in x: within 0.02 of the closed form."""
    torch.manual_seed(0)
    loss = OBJECTIVES[name]
    real, fake = torch.randn(20_000).double(), (1.5 + 0.7 * torch.randn(20_000)).double()

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3 if name == "minimax" else 16, dtype=torch.float64))

        def forward(self, x):  # a sum of bumps reaches p/(p + q) itself, which no parabola does
            if name == "minimax":
                return torch.stack([torch.ones_like(x), x, x * x], -1) @ self.w
            places = torch.linspace(-4, 5, 16, dtype=torch.float64)
            return (-(x[..., None] - places).square() / 0.4).exp() @ self.w

    D = Quadratic()
    optimizer = torch.optim.LBFGS(D.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        total = loss.real(D(real)).mean() + loss.fake(D(fake)).mean()
        total.backward()
        return total

    optimizer.step(closure)
    xs = torch.linspace(-2, 3, 101, dtype=torch.float64)
    p, q = normal(xs, 0.0, 1.0), normal(xs, 1.5, 0.7)
    found = D(xs).detach()
    found = torch.sigmoid(found) if name == "minimax" else found
    assert (found - p / (p + q)).abs().max() < 0.02  # measured 0.007 (minimax) and 0.013 (least squares)


def test_best_value_is_twice_the_jensen_shannon_divergence_less_log_4():  # E113
    xs = torch.linspace(-8, 9, 40_001, dtype=torch.float64)
    p, q = normal(xs, 0.0, 1.0), normal(xs, 1.5, 0.7)
    jsd = jensen_shannon(stats.norm(0, 1).pdf, stats.norm(1.5, 0.7).pdf, -8, 9)
    assert value(p, q, xs) == pytest.approx(2 * jsd - LOG4, abs=1e-7)
    assert abs(value(p, q, xs) - jsd) > 0.5  # the notes' formula
    assert value(p, p, xs) == pytest.approx(-1.386294, abs=1e-6)


def test_disjoint_supports_give_value_0_and_no_slope():  # E118
    xs = torch.linspace(0, 4, 4001, dtype=torch.float64)
    p, q = (((xs > low) & (xs < low + 1)).double() for low in (0.5, 2.5))
    best = torch.where(p > 0, 60.0, -60.0).double()  # p/(p + q) is 1 on one and 0 on the other
    assert value(p, q, xs, best=best) == pytest.approx(0, abs=1e-12)
    jsd = jensen_shannon(stats.uniform(0, 1).pdf, stats.uniform(2, 1).pdf, -1, 4)
    assert jsd == pytest.approx(math.log(2), abs=1e-6)
    assert abs(slope(OBJECTIVES["minimax"].generator, -60.0)) < 1e-20


def test_no_other_discriminator_is_better():  # E112: the condition holds point by point
    xs = torch.linspace(-8, 9, 8001, dtype=torch.float64)
    p, q = normal(xs, 0.0, 1.0), normal(xs, 1.5, 0.7)
    star = p.log() - q.log()
    for bump in (0.3 * torch.sin(xs), -0.2 * torch.ones_like(xs), 0.5 * (-xs.square()).exp()):
        assert value(p, q, xs, best=star + bump) < value(p, q, xs) - 1e-4
    assert (p / torch.sigmoid(star) - q / torch.sigmoid(-star)).abs().max() < 1e-12


def test_least_squares_optimum():
    """min over a of p ½(a − b)² + q ½(a − a')² is (b p + a' q)/(p + q): p/(p + q) for labels 0 and 1."""
    p, q = torch.tensor([0.1, 0.5, 2.0]).double(), torch.tensor([0.3, 0.5, 0.1]).double()
    for name, fake, real in (("least_squares", 0.0, 1.0), ("pearson", -1.0, 1.0)):
        a = ((real * p + fake * q) / (p + q)).requires_grad_()
        loss = OBJECTIVES[name]
        (g,) = torch.autograd.grad((p * loss.real(a) + q * loss.fake(a)).sum(), a)
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-15)


def test_pearson_labels_give_the_chi_square_divergence():
    """b − c = 1 and b − a = 2: for the best D, 2 E_(p+q) γ = χ²(p + q ‖ 2q) = ∫ (2q − (p + q))² / (p + q)."""
    xs = torch.linspace(-8, 9, 20_001, dtype=torch.float64)
    p, q = normal(xs, 0.0, 1.0), normal(xs, 1.5, 0.7)
    loss = OBJECTIVES["pearson"]
    best = (p - q) / (p + q)
    ours = 2 * torch.trapezoid((p + q) * loss.generator(best), xs).item()
    p_, q_ = stats.norm(0, 1).pdf, stats.norm(1.5, 0.7).pdf
    chi = integrate.quad(lambda x: (2 * q_(x) - (p_(x) + q_(x))) ** 2 / (p_(x) + q_(x)), -8, 9, limit=200)[0]
    assert ours == pytest.approx(chi, abs=1e-8)


def test_no_instance_noise_is_no_noise():
    x = torch.randn(5, 2)
    state = torch.get_rng_state()
    assert blur(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing
    torch.manual_seed(0)
    noise = blur(torch.zeros(20_000, 2), 0.3)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)


def test_instance_noise_falls_linearly_to_0():
    assert [anneal(0.4, step, 100.0) for step in (0, 25, 50, 100, 300)] == pytest.approx([0.4, 0.3, 0.2, 0.0, 0.0])
    assert anneal(0.4, 0, 0.0) == 0


def test_instance_noise_makes_the_divergence_of_two_points_smooth():
    """JSD of deltas at distance d is log 2 for every d > 0; blurred, it grows with d from 0, with a slope."""
    xs = torch.linspace(-8, 12, 20_001, dtype=torch.float64)
    found = []
    for d in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0):
        p, q = normal(xs, 0.0, 0.7), normal(xs, d, 0.7)
        found.append((value(p, q, xs) + LOG4) / 2)
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert all(b - a > 0.01 for a, b in pairwise(found))
    assert found[-1] < math.log(2)
    small = (value(normal(xs, 0.0, 0.7), normal(xs, 0.1, 0.7), xs) + LOG4) / 2
    assert small == pytest.approx(0.1**2 / (8 * 0.7**2), rel=0.01)  # d²/8σ² for small d


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0])
def test_instance_noise_gives_samples_far_from_the_data_a_slope(sigma):  # 8.6.5.1b
    """Data at 0, samples at d: against the best D, minimax moves them by E[D*] d/σ²; without noise by nothing.

    Blurred, the best score is log p/q = (d² − 2 d x)/2σ² with p = N(0, σ²), q = N(d, σ²); the expectation by quadrature.
    """
    d, loss = 2.0, OBJECTIVES["minimax"].generator
    place = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    x = blur(place.expand(400_000), sigma)
    (slope_,) = torch.autograd.grad(loss((d**2 - 2 * d * x) / (2 * sigma**2)).mean(), place)

    def integrand(x):
        return stats.norm.pdf(x, d, sigma) / (1 + math.exp(-(d**2 - 2 * d * x) / (2 * sigma**2)))

    expected = integrate.quad(integrand, -6, 8, points=[d / 2])[0] * d / sigma**2
    assert slope_.item() == pytest.approx(expected, rel=0.05)
    assert expected > 1e-2  # descending it moves the samples towards the data
    (none,) = torch.autograd.grad(loss(60 - 60 * blur(place, 0.0)), place)  # best scores: 60 on the data, −60 at d
    assert abs(none.item()) < 1e-20


# ----------------------------------------------------------------------------------------------------- the whole run

TINY = {"steps": 4, "batch": 8, "width": 6}
DIGITS = {"data": "digits", "size": 16, "steps": 3, "batch": 6, "width": 3, "latent": 5, "learning_rate": 1e-3}
RUNS = {
    "ring": TINY | {"evaluate_every": 1},
    "minimax": TINY | {"objective": "minimax", "discriminator_steps": 3, "schedule": "constant", "beta1": 0.0}
    | {"beta2": 0.9, "instance_noise": 0.0},
    "least squares": TINY | {"objective": "least_squares", "noise_until": 1.0, "schedule": "cosine", "latent": 3},
    "digits": DIGITS | {"objective": "pearson", "discriminator_steps": 2, "evaluate_every": 1, "instance_noise": 0.2},
}  # fmt: skip


def bce(a, label):
    return nn.functional.binary_cross_entropy_with_logits(a, torch.full_like(a, label))


def half_mse(a, label):
    return nn.functional.mse_loss(a, torch.full_like(a, label)) / 2


D_LOSS = {
    "non_saturating": lambda real, fake: bce(real, 1.0) + bce(fake, 0.0),
    "minimax": lambda real, fake: bce(real, 1.0) + bce(fake, 0.0),
    "least_squares": lambda real, fake: half_mse(real, 1.0) + half_mse(fake, 0.0),
    "pearson": lambda real, fake: half_mse(real, 1.0) + half_mse(fake, -1.0),
}
G_LOSS = {
    "non_saturating": lambda fake: bce(fake, 1.0),
    "minimax": lambda fake: -bce(fake, 0.0),
    "least_squares": lambda fake: half_mse(fake, 1.0),
    "pearson": lambda fake: half_mse(fake, 0.0),
}


@pytest.mark.parametrize("case", RUNS)
def test_loop_is_the_plain_one(case, tmp_path, monkeypatch):
    config = gan.Config(**RUNS[case])
    with oracle.small(monkeypatch):
        result = oracle.run("gans/gan", tmp_path, RUNS[case])
        images, built = oracle.start(gan, config)
        G = oracle.plain_generator(built["generator"], config)
        D = oracle.plain_critic(built["discriminator"], config, bias=True)
        G_adam, D_adam = (torch.optim.Adam(net.parameters(), betas=(config.beta1, config.beta2)) for net in (G, D))
        seen = []
        for step in range(config.steps):
            torch.manual_seed(fold(oracle.SEED, step, 0, "step"))
            oracle.set_rate((G_adam, D_adam), config, step)
            sigma = config.instance_noise * max(0.0, 1 - step / (config.noise_until * config.steps))
            for x in oracle.batches(images, config, step, config.discriminator_steps):
                samples = G(torch.randn(config.batch, config.latent)).detach()
                if sigma:
                    x, samples = x + sigma * torch.randn_like(x), samples + sigma * torch.randn_like(x)
                D_loss = D_LOSS[config.objective](D(x), D(samples))
                D_adam.zero_grad()
                D_loss.backward()
                D_adam.step()
            samples = G(torch.randn(config.batch, config.latent))
            G_loss = G_LOSS[config.objective](D(samples + sigma * torch.randn_like(x) if sigma else samples))
            G_adam.zero_grad()
            G_loss.backward()
            G_adam.step()
            seen.append((D_loss.item(), G_loss.item()))
        oracle.agree(etude.load(result.folder), generator=G, discriminator=D)
        torch.testing.assert_close(oracle.logged(result.folder, "discriminator", "generator"), torch.tensor(seen).T)


@pytest.mark.parametrize("case", ["ring", "digits"])
def test_reported_numbers_are_those_of_the_saved_state(case, tmp_path, monkeypatch):
    with oracle.small(monkeypatch):
        result = oracle.run("gans/gan", tmp_path, RUNS[case])
        oracle.check_reported(gan, result)


def test_reported_modes_and_share_are_counts():
    """Of points that lie near the ring, as those of a short run do not."""
    x = ring(500) + 0.05 * torch.randn(500, 2)
    x[:50] = x[0]  # so that a mode or two get less than a quarter of their share
    scores = ring_scores(x[:60])
    assert scores == pytest.approx({k: oracle.point_scores(x[:60].numpy(), x.numpy())[k] for k in scores}, rel=1e-6)
    assert 1 <= scores["modes"] < 8
    assert 0.3 < ring_scores(x)["share"] < 0.95
