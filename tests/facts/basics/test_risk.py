"""Risk and its minimisation on a linear-Gaussian problem: every closed form against sampling or against algebra (E01)."""

import numpy as np
import pytest
import torch

import etude
from etude.basics.risk import (
    Config,
    empirical_risk,
    expected_train_risk,
    expected_true_risk,
    minimise,
    problem,
    true_risk,
)
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.record import read_metrics
from etude.core.run import Run


@pytest.fixture(autouse=True)
def _unseen(monkeypatch):
    """Pictures are not written: they cost nine tenths of a tiny run, and the contract tests look at them."""
    monkeypatch.setattr(Run, "artifact", lambda *_, **__: None)


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


# ---------------------------------------------------------------------------------------------------- the whole run

TINY = {"rounds": 8, "datasets": 50, "fresh": 20_000, "sizes": (14, 25, 80)}


def world(config, seed):
    """w, Σ and `draw` of the run's problem, written out from its streams in numpy."""
    d = config.features
    weight = torch.randn(d, dtype=torch.float64, generator=generator(seed, 0, 0, "problem")).numpy()
    covariance = np.array([[config.correlation ** abs(i - j) for j in range(d)] for i in range(d)])
    root = np.linalg.cholesky(covariance)

    def draw(shape, stream):
        x = torch.randn(*shape, d, dtype=torch.float64, generator=stream).numpy() @ root.T
        return x, x @ weight + config.noise * torch.randn(*shape, dtype=torch.float64, generator=stream).numpy()

    return weight, covariance, draw


def forms(config):
    """E[R̂(θ̂)] and E[R(θ̂)] by the number of samples."""
    n, d, least = np.array(config.sizes), config.features, config.noise**2
    return np.stack([least * (1 - d / n), least * (1 + d / (n - d - 1))])


@pytest.mark.parametrize(
    "changed",
    [{}, {"rounds": 3}, {"datasets": 7}, {"fresh": 100}, {"sizes": (30, 12)}, {"features": 4}, {"noise": 2.0}, {"correlation": 0.0}],
    ids=str,
)  # fmt: skip
def test_loop_equals_least_squares_one_by_one(changed, tmp_path):
    """Each risk of each dataset, and each row of the log."""
    done = etude.run("basics/risk", preset="tiny", out=tmp_path / "run", seed=3, quiet=True, **changed)
    config = Config(**TINY | changed)
    weight, covariance, draw = world(config, 3)

    def risk(theta):
        return config.noise**2 + (weight - theta) @ covariance @ (weight - theta)

    fixed = np.linalg.lstsq(*draw((min(config.sizes),), generator(3, 0, 0, "fixed fit")), rcond=None)[0]
    train, true = (np.zeros((len(config.sizes), config.rounds, config.datasets)) for _ in range(2))
    fresh, rows = [], read_metrics(done.folder)
    assert len(rows) == config.rounds
    for step, row in enumerate(rows):
        stream = generator(3, step, 0, "datasets")
        for place, n in enumerate(config.sizes):
            x, y = draw((config.datasets, n), stream)
            for i in range(config.datasets):
                theta = np.linalg.lstsq(x[i], y[i], rcond=None)[0]
                train[place, step, i] = ((y[i] - x[i] @ theta) ** 2).mean()
                true[place, step, i] = risk(theta)
        x, y = draw((config.fresh,), stream)
        fresh.append(((y - x @ fixed) ** 2).mean())
        means = np.stack([values[:, : step + 1].mean((1, 2)) for values in (train, true)])
        errors = np.abs(means / forms(config) - 1).max(1)
        wanted = [abs(np.mean(fresh) / risk(fixed) - 1), *errors]
        assert [row[f"{name}_error"] for name in ("monte_carlo", "train_risk", "true_risk")] == pytest.approx(
            wanted, abs=1e-9
        )
    found = etude.load(done.folder).state["found"]
    for name, values in (("train", train), ("true", true), ("fresh", fresh)):
        np.testing.assert_allclose(found[name], values, rtol=1e-9)


@pytest.mark.parametrize("changed", [{}, {"correlation": 0.9}, {"correlation": 0.0}], ids=str)
def test_loop_draws_correlated_samples(changed, tmp_path, monkeypatch):
    """Every risk of least squares is the same for x and Ax, so the datasets that are fitted are looked at themselves."""
    fitted = []
    monkeypatch.setattr("etude.basics.risk.minimise", lambda x, y: fitted.append((x, y)) or minimise(x, y))
    etude.run("basics/risk", preset="tiny", out=tmp_path / "run", seed=3, quiet=True, rounds=1, **changed)
    config = Config(**TINY | changed)
    _, _, draw = world(config, 3)
    stream = generator(3, 0, 0, "datasets")
    wanted = [draw((14,), generator(3, 0, 0, "fixed fit"))]
    wanted += [draw((config.datasets, n), stream) for n in config.sizes]
    assert len(fitted) >= len(wanted)  # what comes last is for a picture
    for one, two in zip(fitted, wanted):
        for ours, theirs in zip(one, two):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_reported_numbers_are_those_of_the_saved_risks(tmp_path):
    """The fewest samples stand in the middle, so that no place is taken for them."""
    done = etude.run("basics/risk", preset="tiny", out=tmp_path / "run", seed=4, quiet=True, sizes=(80, 14, 25))
    config = Config(**TINY | {"sizes": (80, 14, 25)})
    weight, covariance, draw = world(config, 4)
    x, y = draw((14,), generator(4, 0, 0, "fixed fit"))
    fixed = np.linalg.lstsq(x, y, rcond=None)[0]
    risk = 0.25 + (weight - fixed) @ covariance @ (weight - fixed)
    found = {name: np.asarray(values) for name, values in etude.load(done.folder).state["found"].items()}
    means = np.stack([found[name].reshape(3, -1).mean(1) for name in ("train", "true")])
    errors = np.abs(means / forms(config) - 1).max(1)
    assert done.metrics == pytest.approx(
        {
            "monte_carlo_error": abs(found["fresh"].mean() / risk - 1),
            "own_samples_error": abs(((y - x @ fixed) ** 2).mean() / risk - 1),
            "train_risk_error": errors[0],
            "true_risk_error": errors[1],
            "overfitted": (found["train"][1] < found["true"][1]).mean(),
            "gap": means[1, 1] - means[0, 1],
        },
        rel=1e-9,
        abs=1e-12,
    )


def test_reported_share_of_overfitted_fits_is_not_always_one(tmp_path):
    done = etude.run("basics/risk", preset="tiny", out=tmp_path / "run", quiet=True, sizes=(400,), rounds=2)
    found = etude.load(done.folder).state["found"]
    assert done.metrics["overfitted"] == float((found["train"] < found["true"]).double().mean()) < 0.9
