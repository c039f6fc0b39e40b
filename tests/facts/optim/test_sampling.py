"""Batch, stochastic and mini-batch gradients: unbiased, right variance, every example once an epoch (E12, E13)."""

import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from etude.core.randomness import fold
from etude.optim import sgd
from etude.optim.chain import update
from etude.optim.sgd import minibatch


def problem(count=12, features=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, dtype=torch.float64, generator=generator)
    y = (torch.rand(count, dtype=torch.float64, generator=generator) > 0.5).double()
    theta = torch.randn(features, dtype=torch.float64, generator=generator)
    return x, y, theta


def nll(theta, x, y):
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ theta, y)


def per_example():
    """(N, features) gradients of −log p of each example alone."""
    x, y, theta = problem()
    return torch.func.vmap(torch.func.grad(nll), in_dims=(None, 0, 0))(theta, x[:, None], y[:, None])


def test_the_batch_gradient_is_the_mean_of_the_per_example_gradients():
    x, y, theta = problem()
    torch.testing.assert_close(per_example().mean(0), torch.func.grad(nll)(theta, x, y), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mini_batches_are_unbiased_with_the_finite_population_variance(size):
    """Over all subsets: mean ∇L and variance S²/B · (N−B)/(N−1), S² the variance over examples (E13)."""
    g = per_example()
    means = torch.stack([g[list(subset)].mean(0) for subset in itertools.combinations(range(len(g)), size)])
    torch.testing.assert_close(means.mean(0), g.mean(0), rtol=1e-12, atol=1e-14)
    expected = g.var(0, correction=0) * (len(g) - size) / (size * (len(g) - 1))
    torch.testing.assert_close(means.var(0, correction=0), expected, rtol=1e-11, atol=1e-14)


def test_minibatch_draws_follow_that_variance():
    """The first batch of 8,000 epochs; the relative standard error of a variance is √(2/8000) = 1.6 %."""
    g = per_example()
    means = torch.stack([g[minibatch(12, 4, 3 * epoch, seed=1)].mean(0) for epoch in range(8000)])
    expected = g.var(0, correction=0) * (12 - 4) / (4 * 11)
    assert ((means.var(0) / expected - 1).abs() < 0.08).all()
    assert ((means.mean(0) - g.mean(0)).abs() < 5 * (expected / 8000).sqrt()).all()


@pytest.mark.parametrize("last", ["keep", "drop"])
@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_every_index_once_an_epoch_and_a_new_order_in_each(count, size, last):
    per_epoch = count // size if last == "drop" else -(-count // size)
    orders = []
    for epoch in range(3):
        batches = [minibatch(count, size, epoch * per_epoch + i, seed=7, last=last) for i in range(per_epoch)]
        order = torch.cat(batches).tolist()
        assert len(set(order)) == len(order) == (count // size * size if last == "drop" else count)
        assert all(len(batch) == size for batch in batches[: count // size])
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def test_minibatch_equals_the_dataloaders_sampler():
    for epoch in range(2):
        generator = torch.Generator().manual_seed(fold(5, epoch, 0, "shuffle"))
        theirs = list(BatchSampler(RandomSampler(range(10), generator=generator), 4, drop_last=False))
        assert [minibatch(10, 4, 3 * epoch + i, seed=5).tolist() for i in range(3)] == theirs


def test_minibatch_is_a_function():
    state = torch.get_rng_state()
    assert torch.equal(minibatch(50, 8, 9, seed=1), minibatch(50, 8, 9, seed=1))
    assert not torch.equal(minibatch(50, 8, 9, seed=1), minibatch(50, 8, 9, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert minibatch(10, 4, 4, seed=0, shuffle=False).tolist() == [4, 5, 6, 7]
    for size, step in ((0, 0), (11, 0), (3, -1)):
        with pytest.raises(ValueError, match="need 1 <= size <= count"):
            minibatch(10, size, step, seed=0)


def test_the_mini_batch_step_uses_the_averaged_gradient():
    """E12: the line is g ← (1/B) Σ ∇ −log p; one step on a batch is the mean of the single-example steps."""
    x, y, theta = problem()
    rows = minibatch(len(x), 4, 0, seed=3)
    step, _ = update(sgd.rule(), theta, torch.func.grad(nll)(theta, x[rows], y[rows]), {}, 1, 0.5)
    singles = [update(sgd.rule(), theta, g, {}, 1, 0.5)[0] for g in per_example()[rows]]
    torch.testing.assert_close(step, torch.stack(singles).mean(0), rtol=1e-12, atol=1e-14)


def test_robbins_monro_noise_floor_is_proportional_to_the_rate():
    """θ ← θ − α(θ + ξ), ξ ~ N(0, 1): the stationary variance is α / (2 − α)."""
    generator = torch.Generator().manual_seed(0)
    for lr in (0.05, 0.1, 0.2):
        theta = torch.zeros(20000, dtype=torch.float64)
        for k in range(1, int(8 / lr)):
            noise = torch.randn(theta.shape, dtype=torch.float64, generator=generator)
            theta, _ = update(sgd.rule(), theta, theta + noise, {}, k, lr)
        assert theta.var().item() == pytest.approx(lr / (2 - lr), rel=0.05)  # standard error 1 %
