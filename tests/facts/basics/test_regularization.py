"""The L2 penalty and its MAP reading: scikit-learn, weight decay, priors and posteriors (E04, E05, E06)."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch.distributions import Bernoulli, Normal

import etude
from etude.basics.regularization import (
    bernoulli,
    descend,
    gaussian,
    load,
    mean_error,
    minimise,
    posterior,
    prior_scale,
    standardised,
)
from etude.core.errors import UserError
from etude.optim import Adam, AdamW
from etude.optim.newton import newton_step


def whole(name):
    raw = load(name)
    return standardised(raw, torch.arange(len(raw.y)))


def zeros(data):
    return torch.zeros(data.x.shape[1], dtype=torch.float64)


@pytest.fixture(scope="module")
def diabetes():
    return whole("diabetes")


@pytest.fixture(scope="module")
def cancer():
    return whole("breast_cancer")


@pytest.fixture(scope="module")
def small():
    """40 examples of 3 features with a real target and a class each."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=stream)
    noise = torch.randn(40, dtype=torch.float64, generator=stream)
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + noise
    return x, y, y.sign()


def test_likelihoods_and_prior_are_negative_log_probabilities(small):
    """E04, E05: J = −log p(D | θ) − log p(θ) + const, with + λ‖θ‖², λ = 1/(2σ²) and a likelihood of unit variance."""
    x, y, classes = small
    scale = 0.7
    penalty = 1 / (2 * scale**2)
    assert prior_scale(penalty) == pytest.approx(scale, rel=1e-14)
    prior = Normal(torch.tensor(0.0).double(), scale)
    for likelihood, seen, log_p in (
        (gaussian, y, lambda t: Normal(x @ t, 1.0).log_prob(y).sum()),
        (bernoulli, classes, lambda t: Bernoulli(logits=x @ t).log_prob((classes + 1) / 2).sum()),
    ):
        loss = posterior(likelihood, x, seen, penalty)
        thetas = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        constant = [loss(t) + log_p(t) + prior.log_prob(t).sum() for t in thetas]
        np.testing.assert_allclose(constant, constant[0], rtol=1e-12)
        slope = torch.func.grad(loss)(thetas[0])
        bare = torch.func.grad(lambda t, f=likelihood, s=seen: f(t, x, s))(thetas[0])
        torch.testing.assert_close(slope, bare + 2 * penalty * thetas[0], rtol=1e-12, atol=1e-12)


def test_the_printed_sign_has_no_minimum(small):
    """E04: with − λ‖θ‖² a classifier's objective falls for ever, so no Newton iteration ends."""
    x, _, classes = small
    loss = posterior(bernoulli, x, classes, -0.5)
    far = torch.ones(3, dtype=torch.float64)
    values = [loss(k * far).item() for k in (1, 100, 1000, 10_000)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < -1e7
    assert loss(minimise(posterior(bernoulli, x, classes, 0.5), 0 * far)[0]) < 40 * math.log(2)


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 10.0])
def test_linear_map_is_ridge_regression(diabetes, scale):
    """Ridge(alpha) penalises the whole sum of squares, so with unit noise alpha = 2λ = 1/σ²; one step is enough."""
    penalty = 1 / (2 * scale**2)
    theta, taken = minimise(posterior(gaussian, diabetes.x, diabetes.y, penalty), zeros(diabetes))
    theirs = Ridge(alpha=1 / scale**2, fit_intercept=False, tol=1e-12).fit(diabetes.x.numpy(), diabetes.y.numpy())
    np.testing.assert_allclose(theta, theirs.coef_, rtol=0, atol=1e-8)
    assert taken == 1
    summed = lambda t: (diabetes.y - diabetes.x @ t).square().sum() + penalty * t.square().sum()  # noqa: E731
    twice = Ridge(alpha=penalty, fit_intercept=False, tol=1e-12).fit(diabetes.x.numpy(), diabetes.y.numpy())
    np.testing.assert_allclose(minimise(summed, zeros(diabetes))[0], twice.coef_, rtol=0, atol=1e-8)


def test_logistic_map_on_breast_cancer(cancer):
    """λ = ½, no intercept: the recorded objective in at most 10 Newton steps; scikit-learn's C is 1/(2λ) = σ²."""
    loss = posterior(bernoulli, cancer.x, cancer.y, 0.5)
    theta, taken = minimise(loss, zeros(cancer))
    assert loss(theta).item() == pytest.approx(37.877766, abs=5e-7)
    assert torch.func.grad(loss)(theta).norm() < 1e-9
    assert taken <= 10
    for penalty in (0.5, 5.0):
        theta, _ = minimise(posterior(bernoulli, cancer.x, cancer.y, penalty), zeros(cancer))
        theirs = LogisticRegression(C=prior_scale(penalty) ** 2, fit_intercept=False, tol=1e-10, max_iter=10_000)
        theirs.fit(cancer.x.numpy(), cancer.y.numpy())
        np.testing.assert_allclose(theta, theirs.coef_[0], rtol=0, atol=1e-5)


def test_newton_is_damped_where_the_full_step_overshoots(small):
    """From far out on a nearly separable problem a full Newton step raises J; halving it still converges."""
    x, _, classes = small
    loss = posterior(bernoulli, x, classes, 1e-3)
    near, _ = minimise(loss, torch.zeros(3, dtype=torch.float64))
    start = torch.tensor([-30.0, 40.0, 30.0]).double()
    assert loss(newton_step(loss, start)) > loss(start)
    far, taken = minimise(loss, start)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-7)
    assert taken > 3


@pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])
def test_norm_falls_strictly_and_training_error_rises(name, request):
    data = request.getfixturevalue("diabetes" if name == "diabetes" else "cancer")
    theta, norms, errors = zeros(data), [], []
    for penalty in torch.logspace(4, -1, 21).tolist():
        theta, _ = minimise(posterior(data.likelihood, data.x, data.y, penalty), theta)
        norms.append(theta.norm().item())
        errors.append(mean_error(data.likelihood, theta, data.x, data.y).item())
    assert all(a < b for a, b in pairwise(norms))
    assert all(a > b for a, b in pairwise(errors))


@pytest.mark.parametrize("likelihood", [gaussian, bernoulli])
def test_sgd_with_penalty_is_sgd_with_weight_decay_twice_as_large(small, likelihood):
    x, y, classes = small
    seen = y if likelihood is gaussian else classes
    loss = lambda t: likelihood(t, x, seen)  # noqa: E731
    start = torch.tensor([2.0, 1.0, -1.0]).double()
    penalty = 0.8
    added = descend(loss, start, 0.01, 400, penalty=penalty)
    decayed = descend(loss, start, 0.01, 400, decay=2 * penalty)
    torch.testing.assert_close(added, decayed, rtol=1e-13, atol=1e-13)
    solution, _ = minimise(posterior(likelihood, x, seen, penalty), start)
    torch.testing.assert_close(decayed[-1], solution, rtol=0, atol=1e-6)
    once = descend(loss, start, 0.01, 400, decay=penalty)
    assert (added[-1] - once[-1]).norm() > 0.01  # weight_decay = λ is another problem


def test_the_penalty_beside_a_mean_is_divided_by_the_number_of_examples(small):
    """E05: λ multiplies the penalty beside the sum of −log p; beside the mean it is λ/N."""
    x, y, _ = small
    summed, _ = minimise(posterior(gaussian, x, y, 2.0), torch.zeros(3, dtype=torch.float64))
    mean = lambda penalty: lambda t: gaussian(t, x, y) / 40 + penalty * t.square().sum()  # noqa: E731
    torch.testing.assert_close(minimise(mean(2.0 / 40), 0 * summed)[0], summed, rtol=1e-9, atol=1e-9)
    assert (minimise(mean(2.0), 0 * summed)[0] - summed).norm() > 1


def test_in_adam_the_penalty_is_its_coupled_decay_and_not_adamws(small):
    x, y, _ = small

    def path(maker, penalty=0.0, **settings):
        theta = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = maker([theta], 0.05, **settings)
        for _ in range(50):
            optimizer.zero_grad()
            (gaussian(theta, x, y) + penalty * theta.square().sum()).backward()
            optimizer.step()
        return theta.detach()

    penalised = path(Adam, penalty=3.0)
    torch.testing.assert_close(penalised, path(Adam, weight_decay=6.0), rtol=1e-9, atol=1e-9)
    assert (penalised - path(AdamW, weight_decay=6.0)).norm() > 0.05


def test_map_is_the_mode_and_not_the_mean_of_the_posterior(small):
    """E06: they agree for the symmetric Gaussian posterior, and not for the logistic one (by quadrature in 1-D)."""
    x, y, classes = small
    line = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    for likelihood, seen in ((gaussian, y), (bernoulli, classes)):
        loss = posterior(likelihood, x[:6, 1:2], seen[:6], 0.05)
        energy = torch.func.vmap(loss)(line)
        mode, _ = minimise(loss, torch.zeros(1, dtype=torch.float64))
        assert abs(line[energy.argmin()] - mode) <= 24 / 20_000
        mean = (-energy).softmax(0) @ line[:, 0]
        gap = abs(mean.item() - mode.item())
        assert gap < 1e-6 if likelihood is gaussian else gap > 0.2


def test_only_training_examples_set_the_scale():
    raw = load("diabetes")
    inside = torch.arange(50)
    data = standardised(raw, inside)
    torch.testing.assert_close(data.x[inside].mean(0), zeros(raw), atol=1e-12, rtol=0)
    torch.testing.assert_close(data.x[inside].std(0, correction=0), zeros(raw) + 1)
    changed = raw.x.clone()
    changed[50:] += 100
    torch.testing.assert_close(standardised(raw._replace(x=changed), inside).x[inside], data.x[inside])
    assert data.y[inside].mean().abs() < 1e-12
    changed[:50, 1] = 0.3  # one value only among the training examples
    assert (standardised(raw._replace(x=changed), inside).x[:, 1] == 0).all()
    classes = standardised(load("breast_cancer"), inside).y
    assert set(classes.tolist()) == {-1.0, 1.0}


def test_unusable_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="between 2 and 441"):
        etude.run("basics/regularization", out=tmp_path / "a", quiet=True, examples=442)
    with pytest.raises(UserError, match="below --largest"):
        etude.run("basics/regularization", out=tmp_path / "b", quiet=True, smallest=2.0, largest=1.0)
