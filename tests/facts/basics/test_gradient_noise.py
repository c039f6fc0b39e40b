"""Gradient noise against exhaustive enumeration and closed forms; Robbins-Monro's stationary variance (E12, E13)."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import etude
from etude import data as room
from etude.basics.gradient_noise import Config, closed_form, descend, deviation, draw, gram, per_example, stationary
from etude.core.errors import UserError
from etude.core.randomness import generator


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
    found = [stationary(rate, 40_000, torch.Generator().manual_seed(1)) for rate in (0.05, 0.1, 0.5, 1.9)]
    assert found == pytest.approx([0.05 / 1.95, 0.1 / 1.9, 0.5 / 1.5, 1.9 / 0.1], rel=0.03)
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


def test_batches_are_drawn_as_asked():
    stream = torch.Generator().manual_seed(0)
    with_, without = (draw(6, 4, 300, way, stream) for way in (True, False))
    assert with_.shape == without.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in without.tolist())
    assert any(len(set(row)) < 4 for row in with_.tolist())
    for batches in (with_, without):
        assert torch.bincount(batches.flatten(), minlength=6).tolist() == pytest.approx([200] * 6, abs=50)


TINY = {"examples": 24, "draws": 510, "warmup_steps": 3, "walkers": 50, "learning_rates": (0.3, 0.8), "steps": 9}


def flat_gradients(examples, warmup_steps):
    """Every example's gradient after full-batch descent on softmax regression, one backward pass each."""
    train = room.images("digits").train
    x, y = train.x[:examples].flatten(1).float() / 255, train.y[:examples]
    std = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(std > 0, std, torch.inf)
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(warmup_steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()
    rows = []
    for image, truth in zip(x, y):
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(layer(image), truth), list(layer.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


@pytest.mark.parametrize("extra", [{}, {"examples": 17, "warmup_steps": 0}])
def test_loop_equals_a_plain_one(extra, tmp_path):
    """The gradients of mini-batches themselves, averaged example by example; the walk written out."""
    flags = TINY | extra
    done = etude.run("basics/gradient_noise", out=tmp_path / "run", quiet=True, seed=2, **flags)
    seen = etude.load(done.folder).state["seen"]
    rows = flat_gradients(flags["examples"], flags["warmup_steps"])
    total, mean = len(rows), rows.mean(0)
    spread = ((rows - mean) ** 2).sum(1).mean()
    sizes = [1, 2, 4, 8, 18, 24] if total == 24 else [1, 2, 4, 8, 12, 17]
    for step, size in enumerate(sizes):
        stream = generator(2, step, 0, "batches")
        found = {"with": [], "without": []}
        for count in (500, 10):
            found["with"] += list(torch.randint(total, (count, size), generator=stream))
            found["without"] += [torch.randperm(total, generator=stream)[:size] for _ in range(count)]
        for column, batches in enumerate(found.values()):
            off = torch.stack([((rows[batch].mean(0) - mean) ** 2).sum() for batch in batches]).mean() / spread
            assert seen["ratio"][step, column] == pytest.approx(off.item(), rel=1e-5, abs=1e-12)
    assert len(seen["ratio"]) == len(sizes)
    for step, rate in enumerate(flags["learning_rates"]):
        stream, theta = generator(2, len(sizes) + step, 0, "walk"), torch.zeros(50, dtype=torch.float64)
        for _ in range({0.3: 27, 0.8: 10}[rate]):
            theta = (1 - rate) * theta - rate * torch.randn(50, dtype=torch.float64, generator=stream)
        assert seen["variance"][step] == pytest.approx(theta.var().item())


def test_reported_numbers_are_the_largest_relative_errors(tmp_path):
    done = etude.run("basics/gradient_noise", out=tmp_path / "run", quiet=True, seed=2, **TINY)
    seen = etude.load(done.folder).state["seen"]
    sizes = np.array([1, 2, 4, 8, 18, 24])
    error_with = np.abs(seen["ratio"][:, 0] * sizes - 1)
    error_without = np.abs(seen["ratio"][:5, 1] * sizes[:5] * 23 / (24 - sizes[:5]) - 1)
    error_stationary = np.abs(seen["variance"] / [0.3 / 1.7, 0.8 / 1.2] - 1)
    assert done.metrics["error_with"] == pytest.approx(error_with.max())
    assert done.metrics["error_without"] == pytest.approx(error_without.max())
    assert done.metrics["error_stationary"] == pytest.approx(error_stationary.max())
    assert done.metrics["whole_set_variance"] == seen["ratio"][5, 1] < 1e-12
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["error_with"] for row in rows[:6]] == pytest.approx(error_with)
    assert [row["error_without"] for row in rows[:5]] == pytest.approx(error_without)
    assert [row["error_stationary"] for row in rows[6:]] == pytest.approx(error_stationary)


def test_the_run_on_real_digits_meets_the_closed_forms(tmp_path):
    flags = {"examples": 256, "draws": 1000, "walkers": 5000}
    done = etude.run("basics/gradient_noise", out=tmp_path / "run", quiet=True, seed=5, **flags)
    assert done.metrics["error_with"] < 0.1  # measured 0.066, 0.041 and 0.029 (stationary)
    assert done.metrics["error_without"] < 0.1
    assert done.metrics["whole_set_variance"] < 1e-12
    assert done.metrics["error_stationary"] < 0.06


def test_too_few_images_are_refused(tmp_path):
    for split in ("train", "test"):
        for kind in "ab":
            (tmp_path / "own" / split / kind).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (4, 4), 40 * i).save(tmp_path / "own" / split / kind / f"{i}.png")
    with pytest.raises(UserError, match=r"training images; batches are drawn from 16 or more"):
        etude.run("basics/gradient_noise", out=tmp_path / "run", quiet=True, data=str(tmp_path / "own"))
