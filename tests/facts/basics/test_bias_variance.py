"""The bias-variance identity, its noise term, and the closed form of ridge regression (E02, E03)."""

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from sklearn.linear_model import Ridge

import etude
from etude.basics.bias_variance import closed_form, decompose, even, features, fit, target
from etude.core.errors import UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("degree", [0, 1, 2, 9, 20])
def test_features_are_orthonormal_legendre_polynomials(degree):
    x = torch.linspace(0, 1, 31, dtype=torch.float64)
    scale = np.sqrt(2 * np.arange(degree + 1) + 1)
    np.testing.assert_allclose(features(x, degree), legendre.legvander(2 * x.numpy() - 1, degree) * scale, atol=1e-12)
    nodes, weights = legendre.leggauss(degree + 1)
    phi = features(torch.from_numpy((nodes + 1) / 2), degree)
    gram = phi.T @ (torch.from_numpy(weights / 2)[:, None] * phi)
    torch.testing.assert_close(gram, torch.eye(degree + 1, dtype=torch.float64), atol=1e-12, rtol=0)


def test_fits_are_least_squares_and_ridge():
    x = torch.rand(2, 3, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi, y = features(x, 4), normal(2, 3, 15)
    plain, ridge = fit(phi, y), fit(phi, y, 0.3)
    assert plain.shape == ridge.shape == (2, 3, 5)
    for i, j in ((0, 0), (1, 2)):
        at = 2 * x[i, j].numpy() - 1
        expected = legendre.legfit(at, y[i, j].numpy(), 4) / np.sqrt(2 * np.arange(5) + 1)
        np.testing.assert_allclose(plain[i, j], expected, atol=1e-10)
        theirs = Ridge(alpha=0.3, fit_intercept=False, tol=1e-12).fit(phi[i, j].numpy(), y[i, j].numpy())
        np.testing.assert_allclose(ridge[i, j], theirs.coef_, atol=1e-10)


def test_more_parameters_than_points_need_the_penalty():
    phi, y = features(even(4), 9), normal(4)
    theta = fit(phi, y, 1e-3)
    normal_equations = phi.T @ phi + 1e-3 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(theta, torch.linalg.solve(normal_equations, phi.T @ y), atol=1e-8, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_identity_is_exact_on_any_finite_set_of_fits(count):
    fits, truth = 3 * normal(count, 11, seed=count) + 1, normal(11, seed=1000)
    error, bias_squared, variance = decompose(fits, truth)
    torch.testing.assert_close(error, bias_squared + variance, rtol=1e-10, atol=0)
    np.testing.assert_allclose(variance, fits.numpy().var(0), rtol=1e-12, atol=1e-14)  # ddof = 0
    np.testing.assert_allclose(bias_squared, (fits.numpy().mean(0) - truth.numpy()) ** 2, rtol=1e-12)
    np.testing.assert_allclose(error, ((fits - truth).numpy() ** 2).mean(0), rtol=1e-12)
    cross = 2 * ((fits - fits.mean(0)) * (fits.mean(0) - truth)).mean(0)  # E02: the term that the proof drops
    assert cross.abs().max() < 1e-12


@pytest.mark.parametrize("penalty", [0.0, 0.5, 20.0])
def test_closed_form_of_ridge(penalty):
    """40,000 datasets at fixed inputs, at every point of the grid; the measured bias² is too large by variance/D."""
    count, n, degree, noise = 40_000, 12, 4, 0.3
    x, grid = even(n), even(25)
    y = target(x) + noise * normal(count, n)
    fits = fit(features(x, degree).expand(count, n, degree + 1), y, penalty) @ features(grid, degree).T
    measured, exact = decompose(fits, target(grid)), closed_form(x, grid, degree, noise, penalty)
    torch.testing.assert_close(measured.variance, exact.variance, rtol=4 * (2 / count) ** 0.5, atol=0)
    deviation = (exact.variance / count).sqrt()
    mean = fits.mean(0) - target(grid)
    assert ((mean.abs() - exact.bias_squared.sqrt()).abs() < 4 * deviation).all()
    assert measured.bias_squared.mean().item() == pytest.approx(exact.bias_squared.mean().item(), rel=0.02)
    torch.testing.assert_close(exact.error, exact.bias_squared + exact.variance)


def test_a_penalty_trades_variance_for_bias():
    forms = [closed_form(even(20), even(50), 9, 0.3, penalty) for penalty in (0.0, 0.1, 1.0, 10.0, 100.0)]
    variance = [form.variance.mean().item() for form in forms]
    bias = [form.bias_squared.mean().item() for form in forms]
    assert variance == sorted(variance, reverse=True)
    assert bias == sorted(bias)
    assert min(form.error.mean() for form in forms) < 0.9 * forms[0].error.mean()


def test_measured_bias_is_too_large_by_variance_over_datasets():
    """E[bias² measured with D fits] = bias² + variance/D, over 4,000 groups of D = 5."""
    x, grid = even(10), even(20)
    y = target(x) + 0.3 * normal(4000, 5, 10)
    fits = fit(features(x, 3).expand(4000, 5, 10, 4), y) @ features(grid, 3).T
    measured = (fits.mean(1) - target(grid)).square().mean(1)
    exact = closed_form(x, grid, 3, 0.3)
    expected = (exact.bias_squared + exact.variance / 5).mean()
    error = measured.std() / 4000**0.5
    assert (measured.mean() - expected).abs() < 4 * error
    assert expected - exact.bias_squared.mean() > 20 * error  # so variance/D is needed


def test_noise_term_against_observed_y():
    """E03: measured against y = f + ε the error is larger by σ², if ε is new. Against the fitted y it is smaller."""
    x = even(15)
    truth, noise = target(x), 0.5 * normal(20_000, 15)
    phi = features(x, 3)
    fits = fit(phi.expand(20_000, 15, 4), truth + noise) @ phi.T
    error = decompose(fits, truth).error.mean()
    fresh = 0.5 * normal(20_000, 15, seed=1)
    assert (fits - truth - fresh).square().mean().item() - error.item() == pytest.approx(0.25, rel=0.02)
    assert (fits - truth - noise).square().mean() - error < 0.25 * 0.6  # the noise that was fitted is no test


def test_identity_is_not_one_of_the_0_1_loss():
    """E03: three classifiers say 1, 1, 0 where 0 is right. Loss ⅔, but bias 1 (of the majority) + variance ⅓ = 4/3."""
    votes, truth = np.array([1, 1, 0]), 0
    majority = int(votes.mean() > 0.5)
    loss, bias, variance = (votes != truth).mean(), float(majority != truth), (votes != majority).mean()
    assert loss == pytest.approx(2 / 3)
    assert bias + variance == pytest.approx(4 / 3)
    error, bias_squared, spread = decompose(torch.tensor([[1.0], [1.0], [0.0]]), torch.zeros(1))
    assert error.item() == pytest.approx((bias_squared + spread).item())  # the squared error of the same votes splits


def test_more_parameters_than_points_are_refused_without_a_penalty(tmp_path):
    with pytest.raises(UserError, match="which 8 samples do not determine"):
        etude.run("basics/bias_variance", out=tmp_path / "run", quiet=True, samples=8, degrees=(1, 8))
