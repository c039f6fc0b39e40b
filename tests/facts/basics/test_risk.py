"""Risk and its minimisation on a linear-Gaussian problem: every closed form against sampling or against algebra (E01)."""

import numpy as np
import pytest
import torch

import etude
from etude.basics.risk import (
    empirical_risk,
    expected_train_risk,
    expected_true_risk,
    minimise,
    problem,
    true_risk,
)
from etude.core.errors import UserError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def five():
    return problem(5, 0.7, 0.6, seeded(1))


def test_samples_come_from_the_stated_distribution(five):
    x, y = five.draw((200_000,), seeded())
    torch.testing.assert_close(x.T.cov(), five.covariance, atol=0.02, rtol=0)
    assert (x.mean(0).abs() < 4 / 200_000**0.5).all()
    residual = y - x @ five.weight
    assert residual.std().item() == pytest.approx(0.7, rel=0.01)
    assert (x.T @ residual / len(y)).abs().max() < 0.01  # the noise does not depend on x


def test_true_risk_is_the_expected_loss(five):
    """Gauss-Hermite quadrature of E (y − θ·x)² over all six normal variables is exact for a quadratic."""
    theta = torch.randn(5, dtype=torch.float64, generator=seeded(2))
    nodes, weights = np.polynomial.hermite_e.hermegauss(2)
    points = torch.from_numpy(np.stack(np.meshgrid(*[nodes] * 6, indexing="ij"), -1).reshape(-1, 6))
    mass = torch.from_numpy(np.prod(np.stack(np.meshgrid(*[weights] * 6, indexing="ij"), -1).reshape(-1, 6), 1))
    mass = mass / mass.sum()
    x = points[:, :5] @ torch.linalg.cholesky(five.covariance).T
    y = x @ five.weight + 0.7 * points[:, 5]
    exact = (mass * (y - x @ theta).square()).sum()
    assert true_risk(five, theta).item() == pytest.approx(exact.item(), rel=1e-12)
    assert true_risk(five, five.weight).item() == pytest.approx(0.49, rel=1e-14)  # σ², the least there is
    many = torch.stack([theta, five.weight])
    torch.testing.assert_close(true_risk(five, many), torch.stack([true_risk(five, t) for t in many]))


def test_monte_carlo_agrees_within_one_per_cent(five):
    theta = torch.randn(5, dtype=torch.float64, generator=seeded(3))
    estimate = empirical_risk(theta, *five.draw((1_000_000,), seeded()))
    assert estimate.item() == pytest.approx(true_risk(five, theta).item(), rel=0.01)  # 7 standard errors


def test_the_minimiser_is_least_squares(five):
    x, y = five.draw((3, 4, 12), seeded())
    theta = minimise(x, y)
    for i in range(3):
        for j in range(4):
            expected = np.linalg.lstsq(x[i, j].numpy(), y[i, j].numpy(), rcond=None)[0]
            np.testing.assert_allclose(theta[i, j], expected, rtol=1e-9, atol=1e-11)
    slope = torch.func.grad(lambda t: empirical_risk(t, x, y).sum())(theta)
    assert slope.abs().max() < 1e-13
    by_hand = ((y[0, 0] - x[0, 0] @ theta[0, 0]) ** 2).sum() / 12
    assert empirical_risk(theta, x, y)[0, 0].item() == pytest.approx(by_hand.item(), rel=1e-13)


def test_empirical_risk_is_unbiased_for_a_fixed_parameter_only(five):
    """E01: over 10⁴ datasets from p(x, y), R̂(θ) averages to R(θ) within 4 standard errors; R̂(θ̂) does not."""
    theta = five.weight + 0.3
    x, y = five.draw((10_000, 12), seeded())
    values = empirical_risk(theta, x, y)
    error = values.std() / 100
    assert (values.mean() - true_risk(five, theta)).abs() < 4 * error
    assert error < 0.03 * true_risk(five, theta)  # so the line above has power
    fitted = minimise(x, y)
    gap = true_risk(five, fitted) - empirical_risk(fitted, x, y)
    assert gap.mean() > 40 * gap.std() / 100


@pytest.mark.parametrize("n", [9, 15, 40])
def test_expected_risks_of_least_squares(five, n):
    """σ² (1 − d/n) and σ² (1 + d/(n − d − 1)) within 4 standard errors over 20,000 datasets."""
    x, y = five.draw((20_000, n), seeded(n))
    theta = minimise(x, y)
    for values, exact in (
        (empirical_risk(theta, x, y), expected_train_risk(five, n)),
        (true_risk(five, theta), expected_true_risk(five, n)),
    ):
        error = values.std().item() / 20_000**0.5
        assert abs(values.mean().item() - exact) < 4 * error
        assert error < 0.02 * exact


def test_train_risk_against_true_risk_of_single_fits(five):
    """Always R̂(θ̂) ≤ R̂(w) and R(θ̂) ≥ σ²; a fit that interpolates (n = d) has R̂ = 0 < R."""
    x, y = five.draw((5000, 8), seeded(5))
    theta = minimise(x, y)
    assert (empirical_risk(theta, x, y) <= empirical_risk(five.weight, x, y)).all()
    assert (true_risk(five, theta) >= 0.49).all()
    x, y = five.draw((500, 5), seeded(6))
    theta = minimise(x, y)
    assert empirical_risk(theta, x, y).max() < 1e-12
    assert (true_risk(five, theta) > 0.49).all()
    assert expected_train_risk(five, 5) == 0


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 12 samples"):
        etude.run("basics/risk", out=tmp_path / "run", quiet=True, sizes=(11, 20))
