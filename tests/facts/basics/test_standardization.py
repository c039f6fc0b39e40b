"""Gradient descent on raw and standardised inputs: derivatives, minima, statistics of the training split (E07)."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import etude
from etude.basics.standardization import Config, copies, curvature, loss, minima, slope
from etude.core.errors import UserError
from etude.core.record import read_metrics
from etude.core.run import Run
from etude.data.sets import stratified


@pytest.fixture(autouse=True)
def _unseen(monkeypatch):
    """Pictures are not written: they cost nine tenths of a tiny run, and the contract tests look at them."""
    monkeypatch.setattr(Run, "artifact", lambda *_, **__: None)


def problem(count=40, features=3):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=draw).double() * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([5, 0, 1])
    y = torch.where(x[:, 0] + torch.randn(count, generator=draw) > 5, 1.0, -1.0).double()
    return x, y


def test_the_copies_are_scikit_learns_with_the_statistics_of_the_training_split():
    x, _ = problem()
    theirs = StandardScaler().fit(x[:30].numpy())
    found = copies(x, x[:30])
    assert found.shape == (4, 40, 4)
    assert (found[..., -1] == 1).all()
    torch.testing.assert_close(found[3, :, :3], torch.from_numpy(theirs.transform(x.numpy())), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0, :, :3], x)
    assert found[1, :30, :3].mean(0).abs().max() < 1e-12
    assert found[2, :30, :3].std(0, correction=0).tolist() == pytest.approx([1, 1, 1])


def test_a_constant_feature_becomes_zero():
    x, _ = problem()
    x[:, 1] = 7.3
    assert (copies(x, x)[3, :, 1] == 0).all()


def test_derivatives_equal_autograd():
    x, y = problem()
    data, w = copies(x, x), torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 10
    for i in range(4):
        each = lambda v, i=i: loss(v[None], data[i : i + 1], y, 0.1)[0]  # noqa: E731
        expected = torch.autograd.functional.jacobian(each, w[i]), torch.autograd.functional.hessian(each, w[i])
        torch.testing.assert_close(slope(w, data, y, 0.1)[i], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(curvature(w, data, y, 0.1)[i], expected[1], rtol=1e-9, atol=1e-12)


def test_the_minima_are_scikit_learns():
    """E07: λ makes them finite. The constant is a feature like the others, so there is no intercept of its own."""
    x, y = problem()
    data = copies(x, x)
    found = minima(data, y, 0.05)
    assert slope(found, data, y, 0.05).abs().max() < 1e-10
    for i in (0, 3):
        reference = LogisticRegression(C=1 / (0.05 * 40), fit_intercept=False, tol=1e-10, max_iter=10000)
        reference.fit(data[i].numpy(), y.numpy())
        assert found[i].tolist() == pytest.approx(reference.coef_[0].tolist(), abs=1e-4)


def test_standardising_is_worth_more_than_a_factor_of_ten(tmp_path):
    """All 30 features: measured 175 steps, against more than 5,000 raw; centring or scaling alone is not enough."""
    found = etude.run("basics/standardization", out=tmp_path / "run", quiet=True, seed=0, steps=5000).metrics
    assert found["speedup"] >= 10
    assert found["steps_standardised"] < 300
    assert min(found["steps_centred"], found["steps_scaled"]) > 10 * found["steps_standardised"]
    assert found["condition_standardised"] < 0.1 * found["condition_scaled"] < 0.1 * found["condition_raw"]
    assert found["test_accuracy"] > 0.94


# ---------------------------------------------------------------------------------------------------- the whole run

NAMES = ("raw", "centred", "scaled", "standardised")
TINY = {"steps": 500, "features": 5}


def four_copies(config, seed):
    """Training and test inputs of each copy with the constant, and both labels, by scikit-learn's scaler."""
    data, target = load_breast_cancer(return_X_y=True)
    kept, held = stratified(target, len(target) // 5, seed)
    x = data[:, : config.features]
    scaler = StandardScaler().fit(x[kept])
    made = (x, x - scaler.mean_, x / scaler.scale_, scaler.transform(x))
    made = [torch.from_numpy(np.column_stack([one, np.ones(len(x))])) for one in made]
    y = torch.from_numpy(2.0 * target - 1)
    return [one[kept] for one in made], [one[held] for one in made], y[kept], y[held]


def plain_loss(w, x, y, l2):
    return torch.log1p(torch.exp(-y * (x @ w))).mean() + l2 / 2 * (w @ w)


def lowest(x, y, l2):
    found = LogisticRegression(
        C=1 / (l2 * len(y)), fit_intercept=False, tol=1e-13, solver="newton-cholesky", max_iter=300
    )
    return torch.from_numpy(found.fit(x.numpy(), y.numpy()).coef_[0])


@pytest.mark.parametrize("changed", [{}, {"l2": 0.2}, {"features": 3}, {"steps": 250}], ids=str)
def test_loop_equals_gradient_descent_one_by_one(changed, tmp_path):
    """Each copy by torch.optim.SGD and autograd at its own rate: weights, gaps after every step, rows of the log."""
    done = etude.run("basics/standardization", preset="tiny", out=tmp_path / "run", seed=3, quiet=True, **changed)
    config = Config(**TINY | changed)
    inside, _, y, _ = four_copies(config, 3)
    seen = etude.load(done.folder).state["seen"]
    for i, x in enumerate(inside):
        steepest = np.linalg.eigvalsh((x.T @ x / (4 * len(y))).numpy())[-1] + config.l2
        w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer, least, gaps = (
            torch.optim.SGD([w], 1 / steepest),
            plain_loss(lowest(x, y, config.l2), x, y, config.l2),
            [],
        )
        for _ in range(config.steps):
            optimizer.zero_grad()
            plain_loss(w, x, y, config.l2).backward()
            optimizer.step()
            gaps.append(float(plain_loss(w.detach(), x, y, config.l2) - least))
        torch.testing.assert_close(seen["weights"][i], w.detach(), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(np.asarray(seen["gaps"])[:, i], gaps, atol=1e-9)
        for row in read_metrics(done.folder):
            assert row[f"gap_{NAMES[i]}"] == pytest.approx(max(gaps[int(row["step"]) - 1], 1e-12), abs=1e-9)


@pytest.mark.parametrize("changed", [{}, {"tolerance": 0.05}], ids=str)
def test_reported_numbers_are_those_of_the_saved_weights(changed, tmp_path):
    done = etude.run("basics/standardization", preset="tiny", out=tmp_path / "run", seed=2, quiet=True, **changed)
    config = Config(**TINY | changed)
    inside, outside, y, test_y = four_copies(config, 2)
    seen, wanted = etude.load(done.folder).state["seen"], {}
    for i, (name, x) in enumerate(zip(NAMES, inside)):
        gaps = np.asarray(seen["gaps"])[:, i]
        wanted[f"steps_{name}"] = next(
            (step for step, gap in enumerate(gaps, 1) if gap < config.tolerance), config.steps
        )
        wanted[f"gap_{name}"] = gaps[-1]
        low = lowest(x, y, config.l2)
        bends = torch.autograd.functional.hessian(lambda w, x=x: plain_loss(w, x, y, config.l2), low)
        values = np.linalg.eigvalsh(bends.numpy())
        wanted[f"condition_{name}"] = values[-1] / max(values[0], config.l2)
    assert 1 < wanted["steps_standardised"] < config.steps
    for name, of in (("speedup", "standardised"), ("speedup_centred", "centred"), ("speedup_scaled", "scaled")):
        wanted[name] = wanted["steps_raw"] / wanted[f"steps_{of}"]
    wanted["test_accuracy"] = float(((outside[3] @ seen["weights"][3] > 0) == (test_y > 0)).double().mean())
    assert done.metrics == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_test_labels_are_scored_once_at_the_end(tmp_path, monkeypatch):
    """Turned round, they change the accuracy and no row of the log, no weight."""
    before = etude.run("basics/standardization", preset="tiny", out=tmp_path / "a", quiet=True)
    data, target = load_breast_cancer(return_X_y=True)
    held = stratified(target, len(target) // 5, 0)[1]
    target[held] = 1 - target[held]
    monkeypatch.setattr("etude.basics.standardization.stratified", lambda labels, count, seed: stratified(
        load_breast_cancer().target, count, seed))  # fmt: skip
    monkeypatch.setattr("sklearn.datasets.load_breast_cancer", lambda **_: (data, target))
    after = etude.run("basics/standardization", preset="tiny", out=tmp_path / "b", quiet=True)
    assert (before.folder / "metrics.jsonl").read_bytes() == (after.folder / "metrics.jsonl").read_bytes()
    assert after.metrics["test_accuracy"] == pytest.approx(1 - before.metrics["test_accuracy"])
    assert {**after.metrics, "test_accuracy": 0} == {**before.metrics, "test_accuracy": 0}


def test_settings_out_of_range_are_refused(tmp_path):
    for name, value, most in (
        ("features", 31, "1 and 30"),
        ("steps", 10**12, r"1 and 1e\+07"),
        ("l2", 1e300, "1e-09 and 1000"),
    ):
        with pytest.raises(UserError, match=f"--{name} is .*between {most}"):
            etude.run("basics/standardization", out=tmp_path / "run", quiet=True, **{name: value})
