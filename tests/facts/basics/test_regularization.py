"""The L2 penalty and its MAP reading: scikit-learn, weight decay, priors and posteriors (E04, E05, E06); the whole run."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch.distributions import Bernoulli, Normal

import etude
from etude.basics import regularization
from etude.basics.regularization import (
    Config,
    bernoulli,
    choose,
    descend,
    gaussian,
    load,
    mean_error,
    minimise,
    posterior,
    prior_scale,
    standardised,
)
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.core.record import read_metrics
from etude.core.run import Run
from etude.optim import Adam, AdamW
from etude.optim.newton import newton_step


@pytest.fixture(autouse=True)
def _unseen(monkeypatch):
    """Pictures are not written: they cost nine tenths of a tiny run, and the contract tests look at them."""
    monkeypatch.setattr(Run, "artifact", lambda *_, **__: None)


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
    added = descend(loss, start, 0.01, 400, l2=penalty)
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
    with pytest.raises(UserError, match="a fifth of them for testing .* so give between 2 and 353"):
        etude.run("basics/regularization", out=tmp_path / "a", quiet=True, examples=354)
    with pytest.raises(UserError, match="below --largest"):
        etude.run("basics/regularization", out=tmp_path / "b", quiet=True, smallest=2.0, largest=1.0)
    for field in ("l2", "smallest", "largest"):
        with pytest.raises(UserError, match=f"--{field} is 1e-300; it must be a number between 1e-06 and 1e"):
            etude.run("basics/regularization", out=tmp_path / "c", quiet=True, **{field: 1e-300})


def test_newtons_failures_are_one_sentence(small):
    x, _, classes = small
    with pytest.raises(RunError, match="has not converged after 3 steps"):
        minimise(posterior(bernoulli, x, classes, 1e-3), torch.zeros(3, dtype=torch.float64), most=3)
    with pytest.raises(RunError, match="stops after 0 steps: the Hessian is singular"):
        minimise(lambda theta: theta.sum(), torch.zeros(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- the whole run

TINY = {"preset": "tiny", "quiet": True}
CANCER = {"data": "breast_cancer", "examples": 60, "values": 4, "smallest": 0.1}


def parts_of(config, seed):
    """x, y, the test examples and (training, validation) of each split, drawn from the documented streams."""
    bunch = load_diabetes() if config.data == "diabetes" else load_breast_cancer()
    x, y = bunch.data, bunch.target if config.data == "diabetes" else 2.0 * bunch.target - 1
    order = torch.randperm(len(y), generator=generator(seed, 0, 0, "test")).numpy()
    test, others = np.split(order, [len(y) // 5])
    splits = []
    for i in range(config.splits):
        mixed = others[torch.randperm(len(others), generator=generator(seed, i, 0, "split")).numpy()]
        splits.append((mixed[: config.examples], mixed[config.examples :]))
    return x, y, test, splits


def scaled_by(rows, x, y, regression):
    x = StandardScaler().fit(x[rows]).transform(x)
    return x, (y - y[rows].mean()) / y[rows].std() if regression else y


def solved(x, y, penalty, regression):
    """θ by normal equations, or by scikit-learn's Newton method."""
    if regression:
        return np.linalg.solve(x.T @ x + 2 * penalty * np.eye(x.shape[1]), x.T @ y)
    found = LogisticRegression(C=1 / (2 * penalty), fit_intercept=False, tol=1e-12, solver="newton-cholesky").fit(x, y)
    return found.coef_[0]


def error_of(theta, x, y, regression):
    return ((y - x @ theta) ** 2).mean() if regression else np.logaddexp(0, -y * (x @ theta)).mean()


@pytest.mark.parametrize(
    "changed",
    [{}, {"splits": 3}, {"examples": 50}, {"values": 5}, {"smallest": 0.1}, {"largest": 100.0}, CANCER],
    ids=str,
)
def test_loop_equals_closed_forms_and_scikit_learn(changed, tmp_path):
    """Every θ of the path, its training and validation error, and each row of the log."""
    done = etude.run("basics/regularization", out=tmp_path / "run", seed=3, **TINY, **changed)
    config = Config(**{"values": 8, "splits": 2, "sgd_steps": 30} | changed)
    x, y, test, splits = parts_of(config, 3)
    regression, found = config.data == "diabetes", etude.load(done.folder).state["found"]
    path = np.geomspace(config.largest, config.smallest, config.values)
    rows = read_metrics(done.folder)
    assert [row["step"] for row in rows] == list(range(1, config.values + 1))
    for step, penalty in enumerate(path):
        errors, norms = [], []
        for i, (inside, outside) in enumerate(splits):
            assert not set(test) & {*inside, *outside}
            data, target = scaled_by(inside, x, y, regression)
            theta = solved(data[inside], target[inside], penalty, regression)
            np.testing.assert_allclose(found["theta"][step, i], theta, atol=1e-7)
            errors.append([error_of(theta, data[part], target[part], regression) for part in (inside, outside)])
            norms.append(np.linalg.norm(theta))
        np.testing.assert_allclose(found["error"][step], errors, rtol=1e-6)
        train_error, validation_error = np.mean(errors, 0)
        wanted = {
            "l2": penalty,
            "norm": np.mean(norms),
            "train_error": train_error,
            "validation_error": validation_error,
        }
        assert {name: rows[step][name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
        assert 1 <= rows[step]["newton_steps"] <= 12


@pytest.mark.parametrize("changed", [{}, {"l2": 3.0}, {"sgd_steps": 9}, CANCER], ids=str)
def test_reported_numbers_are_those_of_the_saved_path(changed, tmp_path):
    done = etude.run("basics/regularization", out=tmp_path / "run", seed=5, **TINY, **changed)
    config = Config(**{"values": 8, "splits": 2, "sgd_steps": 30} | changed)
    x, y, test, splits = parts_of(config, 5)
    regression = config.data == "diabetes"
    found = {name: np.asarray(value) for name, value in etude.load(done.folder).state["found"].items()}
    best = found["error"][:, :, 1].mean(1).argmin()  # by validation
    path = np.geomspace(config.largest, config.smallest, config.values)

    def scored(place):
        errors = []
        for theta, (inside, _) in zip(found["theta"][place], splits):
            data, target = scaled_by(inside, x, y, regression)
            errors.append(error_of(theta, data[test], target[test], regression))
        return np.mean(errors)

    norms = np.linalg.norm(found["theta"], axis=2)
    whole, target = scaled_by(np.arange(len(y)), x, y, regression)
    theta = solved(whole, target, config.l2, regression)
    steepest = np.linalg.eigvalsh(whole.T @ whole)[-1] / (1 if regression else 4)
    start = torch.zeros(len(theta), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([start], 1 / (steepest + 2 * config.l2), weight_decay=2 * config.l2)
    for _ in range(config.sgd_steps):
        optimizer.zero_grad()
        fit = torch.from_numpy(whole) @ start
        losses = (
            (torch.from_numpy(target) - fit).square() / 2
            if regression
            else torch.log1p(torch.exp(-torch.from_numpy(target) * fit))
        )
        losses.sum().backward()
        optimizer.step()
    summed = error_of(theta, whole, target, regression) * len(y) / (2 if regression else 1)
    assert done.metrics == pytest.approx(
        {
            "test_error": scored(best),
            "test_gain": 1 - scored(best) / min(scored(0), scored(-1)),
            "validation_error": found["error"][best, :, 1].mean(),
            "best_l2": path[best],
            "norm_ratio": (norms[:-1] / norms[1:]).max(),
            "objective": summed + config.l2 * theta @ theta,
            "newton_steps": 1 if regression else 9,
            "decay_gap": 0.0,
            "sgd_distance": np.linalg.norm(start.detach().numpy() - theta),
        },
        rel=1e-7,
        abs=1e-12,
    )


def test_reported_gap_is_that_of_two_runs_of_gradient_descent(tmp_path, monkeypatch):
    """With another weight decay than 2λ the gap is what torch.optim.SGD gives, not 0; and it grows with the steps."""
    monkeypatch.setattr(regularization, "weight_decay", lambda l2: 0.5 * l2)
    x, y = (torch.from_numpy(part) for part in scaled_by(np.arange(442), *load_diabetes(return_X_y=True), True))
    rate = 1 / (float(torch.linalg.eigvalsh(x.T @ x)[-1]) + 2 * 0.5)
    gaps = []
    for steps in (7, 30):
        done = etude.run("basics/regularization", out=tmp_path / str(steps), **TINY, sgd_steps=steps)
        apart, thetas = [], [torch.zeros(10, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        optimizers = [torch.optim.SGD([t], rate, weight_decay=decay) for t, decay in zip(thetas, (0, 0.25))]
        for _ in range(steps):
            for theta, optimizer, penalty in zip(thetas, optimizers, (0.5, 0)):
                optimizer.zero_grad()
                ((y - x @ theta).square().sum() / 2 + penalty * theta.square().sum()).backward()
                optimizer.step()
            apart.append((thetas[0] - thetas[1]).abs().max().item())
        assert done.metrics["decay_gap"] == pytest.approx(max(apart), rel=1e-9)
        gaps.append(max(apart))
    assert gaps[1] > gaps[0] > 1e-6


def test_no_choice_looks_at_the_test_examples(tmp_path, monkeypatch):
    """Their targets exchanged: the log, every θ, the chosen λ and the validation error stay; only the test score moves."""
    before = etude.run("basics/regularization", out=tmp_path / "a", seed=1, **TINY)
    test = parts_of(Config(splits=1), 1)[2]

    def exchanged(name):
        data = load(name)
        data.y[test] = data.y[test].flip(0)
        return data

    monkeypatch.setattr(regularization, "load", exchanged)
    after = etude.run("basics/regularization", out=tmp_path / "b", seed=1, **TINY)
    assert (before.folder / "metrics.jsonl").read_bytes() == (after.folder / "metrics.jsonl").read_bytes()
    states = [etude.load(done.folder).state["found"] for done in (before, after)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("theta", "error"))
    for name in ("best_l2", "validation_error", "norm_ratio"):
        assert before.metrics[name] == after.metrics[name]
    assert before.metrics["test_error"] != after.metrics["test_error"]


def test_the_choice_is_by_validation_error():
    errors = torch.tensor([[[0.1, 0.9], [0.1, 0.9]], [[0.2, 0.3], [0.2, 0.7]], [[0.3, 0.1], [0.3, 1.0]]])
    assert choose(errors) == 1  # the training error is least at 0; validation at 2, but in one split only
