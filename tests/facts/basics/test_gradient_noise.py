"""Gradient noise against exhaustive enumeration and closed forms; Robbins-Monro's stationary variance (E12, E13)."""

import itertools

import pytest
import torch

import etude
from etude.basics.gradient_noise import Config, closed_form, descend, deviation, gram, per_example, stationary


def gradients(count=6, features=3, classes=2):
    draw = torch.Generator().manual_seed(0)
    weights = (torch.randn(classes, features, generator=draw).double(), torch.randn(classes, generator=draw).double())
    x = torch.randn(count, features, generator=draw).double()
    y = torch.randint(classes, (count,), generator=draw)
    return weights, x, y, per_example(weights, x, y)


def test_per_example_gradients_average_to_the_batch_gradient():
    """E12: g ← (1/B) Σ ∇ −log p; and each row is what autograd gives for that example alone."""
    weights, x, y, rows = gradients()
    leaves = [w.clone().requires_grad_() for w in weights]

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    logits = x @ leaves[0].T + leaves[1]
    batch = flat(torch.nn.functional.cross_entropy(logits, y))
    torch.testing.assert_close(rows.mean(0), batch, rtol=1e-12, atol=1e-14)
    single = flat(torch.nn.functional.cross_entropy(x[2:3] @ leaves[0].T + leaves[1], y[2:3]))
    torch.testing.assert_close(rows[2], single, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_every_batch_enumerated(size):
    """E13: over all batches with replacement 1/B, over all subsets 1/B (N − B)/(N − 1), both exactly."""
    *_, rows = gradients()
    inner = gram(rows)
    for replacement, all_of_them in (
        (True, itertools.product(range(6), repeat=min(size, 4))),
        (False, itertools.combinations(range(6), size)),
    ):
        batches = torch.tensor(list(all_of_them))
        found = deviation(inner, batches).mean() / inner.diagonal().mean()
        assert found.item() == pytest.approx(closed_form(batches.shape[1], 6, replacement), rel=1e-10, abs=1e-14)
    chosen = torch.tensor([[1, 4, 1]])
    direct = (rows[chosen[0]].mean(0) - rows.mean(0)).square().sum()
    assert deviation(inner, chosen).item() == pytest.approx(direct.item(), rel=1e-10)


def test_the_stationary_variance_is_proportional_to_the_rate():
    """α/(2 − α): halving α halves it, nearly; standard error √(2/40000) = 0.7 %."""
    found = [stationary(rate, 40_000, torch.Generator().manual_seed(1)) for rate in (0.05, 0.1, 0.5)]
    assert found == pytest.approx([0.05 / 1.95, 0.1 / 1.9, 0.5 / 1.5], rel=0.03)
    assert found[1] / found[0] == pytest.approx(2.05, rel=0.04)


def test_descent_by_all_examples_stays_at_the_minimum_and_by_one_does_not():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=draw).double()
    y = x.sum(1) + torch.randn(64, generator=draw).double()
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    ends = {size: descend(x, y, size, Config(), 0)[150:] - best for size in (64, 8, 1)}
    cloud = {size: end.square().sum(1).mean().item() for size, end in ends.items()}
    assert cloud[64] < 1e-12
    assert 1e-4 < cloud[8] < cloud[1] / 4  # a single example's noise is S² / 1, of 8 less than S² / 8


def test_the_run_on_real_digits_meets_the_closed_forms(tmp_path):
    done = etude.run("basics/gradient_noise", out=tmp_path / "run", quiet=True, seed=5, draws=2000, walkers=10_000)
    assert done.metrics["error_with"] < 0.08  # three standard errors of the largest of 24, at 2,000 draws
    assert done.metrics["error_without"] < 0.08
    assert done.metrics["whole_set_variance"] < 1e-12
    assert done.metrics["error_stationary"] < 0.05
