"""The bias-variance identity, its noise term, and the closed form of ridge regression (E02, E03)."""

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from sklearn.linear_model import Ridge

import etude
from etude.basics import bias_variance
from etude.basics.bias_variance import Config, closed_form, decompose, even, features, fit, target
from etude.basics.parts.statistics_nulls import unbiased_variance
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.record import read_metrics
from etude.core.run import Run


@pytest.fixture(autouse=True)
def _unseen(monkeypatch):
    """Pictures are not written: they cost nine tenths of a tiny run, and the contract tests look at them."""
    monkeypatch.setattr(Run, "artifact", lambda *_, **__: None)


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


# ---------------------------------------------------------------------------------------------------- the whole run

TINY = {"degrees": (1, 3, 5), "rounds": 4, "datasets": 50}


def basis(x, degree):
    return legendre.legvander(2 * x - 1, degree) * np.sqrt(2 * np.arange(degree + 1) + 1)


def replayed(config, seed):
    """Coefficients (degrees, all datasets, widest), training and validation errors (rounds, degrees), in numpy."""
    grid, widest = (np.arange(config.grid) + 0.5) / config.grid, max(config.degrees) + 1
    theta = np.zeros((len(config.degrees), config.rounds * config.datasets, widest))
    train, validation = (np.zeros((config.rounds, len(config.degrees))) for _ in range(2))
    for step in range(config.rounds):
        stream, shape = generator(seed, step, 0, "datasets"), (config.datasets, config.samples)
        x = np.tile((np.arange(config.samples) + 0.5) / config.samples, (config.datasets, 1))
        if config.inputs == "uniform":
            x = torch.rand(shape, dtype=torch.float64, generator=stream).numpy()
        y = np.sin(2 * np.pi * x) + config.noise * torch.randn(shape, dtype=torch.float64, generator=stream).numpy()
        stream, shape = generator(seed, step, 0, "validation"), (config.datasets, config.grid)
        seen = (
            np.sin(2 * np.pi * grid) + config.noise * torch.randn(shape, dtype=torch.float64, generator=stream).numpy()
        )
        for place, degree in enumerate(config.degrees):
            fitted, missed = [], []
            for i in range(config.datasets):
                phi = basis(x[i], degree)
                ridge = config.l2 * np.eye(degree + 1)
                t = np.linalg.solve(phi.T @ phi + ridge, phi.T @ y[i])
                theta[place, step * config.datasets + i, : degree + 1] = t
                fitted.append(((y[i] - phi @ t) ** 2).mean())
                missed.append(((seen[i] - basis(grid, degree) @ t) ** 2).mean())
            train[step, place], validation[step, place] = np.mean(fitted), np.mean(missed)
    return theta, train, validation


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"inputs": "uniform"},
        {"l2": 0.7},
        {"noise": 1.0},
        {"samples": 9},
        {"degrees": (5, 0, 2)},
        {"rounds": 2, "datasets": 9},
        {"grid": 17},
    ],
    ids=str,
)
def test_loop_equals_fits_one_by_one(changed, tmp_path):
    done = etude.run("basics/bias_variance", preset="tiny", out=tmp_path / "run", seed=3, quiet=True, **changed)
    config = Config(**TINY | changed)
    theta, train, validation = replayed(config, 3)
    found = etude.load(done.folder).state["found"]
    for name, values in (("theta", theta), ("train", train), ("validation", validation)):
        np.testing.assert_allclose(found[name], values, atol=1e-7)
    rows = read_metrics(done.folder)
    assert len(rows) == config.rounds
    for step, row in enumerate(rows):
        errors = validation[: step + 1].mean(0)
        assert row["best_degree"] == config.degrees[errors.argmin()]
        assert row["validation_error"] == pytest.approx(errors.min(), abs=1e-7)


NOISY = {"rounds": 2, "datasets": 3, "noise": 2.0, "grid": 5}  # training chooses degree 5, validation 1, the truth 3


@pytest.mark.parametrize("changed", [{}, {"inputs": "uniform"}, {"l2": 0.7, "degrees": (9, 3, 1)}, NOISY], ids=str)
def test_reported_numbers_are_those_of_the_saved_fits(changed, tmp_path):
    done = etude.run("basics/bias_variance", preset="tiny", out=tmp_path / "run", seed=8, quiet=True, **changed)
    config = Config(**TINY | changed)
    found = {name: np.asarray(values) for name, values in etude.load(done.folder).state["found"].items()}
    grid = (np.arange(config.grid) + 0.5) / config.grid
    truth, at = np.sin(2 * np.pi * grid), basis(grid, max(config.degrees))
    shape = (config.rounds * config.datasets, config.grid)
    noise = config.noise * torch.randn(shape, dtype=torch.float64, generator=generator(8, 0, 0, "observations")).numpy()
    wanted, errors, worst, apart = {}, [], 0.0, 0.0
    for theta, degree in zip(found["theta"], config.degrees):
        fits = theta @ at.T
        wanted[f"bias_squared_{degree}"] = ((fits.mean(0) - truth) ** 2).mean()
        wanted[f"variance_{degree}"] = fits.var(0).mean()
        errors.append(((fits - truth) ** 2).mean())
        worst = max(worst, abs((wanted[f"bias_squared_{degree}"] + wanted[f"variance_{degree}"]) / errors[-1] - 1))
        phi = basis((np.arange(20) + 0.5) / 20, degree)
        smoother = at[:, : degree + 1] @ np.linalg.inv(phi.T @ phi + config.l2 * np.eye(degree + 1)) @ phi.T
        bias = smoother @ np.sin(2 * np.pi * (np.arange(20) + 0.5) / 20) - truth
        apart = max(apart, abs(errors[-1] / (bias**2 + config.noise**2 * (smoother**2).sum(1)).mean() - 1))
    best = found["validation"].mean(0).argmin()
    fits = found["theta"][best] @ at.T
    wanted |= {
        "identity_error": worst,
        "noise_term": ((fits - truth - noise) ** 2).mean() - errors[best],
        "train_noise_term": found["train"][:, best].mean() - errors[best],
        "best_degree": config.degrees[best],
        "train_best_degree": config.degrees[found["train"].mean(0).argmin()],
        "error": errors[best],
    }
    if config.inputs == "even":
        wanted["closed_form_error"] = apart
    assert done.metrics == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert done.metrics["train_best_degree"] == max(config.degrees)
    if changed == NOISY:
        assert (config.degrees[best], config.degrees[int(np.argmin(errors))]) == (1, 3)


def test_reported_identity_is_measured(tmp_path, monkeypatch):
    """A decomposition whose variance divides by D − 1 breaks the identity, and the run says by how much."""
    monkeypatch.setattr(bias_variance, "decompose", unbiased_variance)
    done = etude.run("basics/bias_variance", preset="tiny", out=tmp_path / "run", quiet=True)
    worst = max(
        done.metrics[f"variance_{d}"]
        / 200
        / (done.metrics[f"bias_squared_{d}"] + done.metrics[f"variance_{d}"] * 199 / 200)
        for d in (1, 3, 5)
    )
    assert done.metrics["identity_error"] == pytest.approx(worst, rel=1e-6)
    assert worst > 1e-4
