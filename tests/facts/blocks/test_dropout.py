"""Dropout: expectations, the two forms are one, parity with nn.Dropout mask for mask (E24)."""

import itertools
import math

import pytest
import torch
from torch import nn

from etude.blocks.nn.dropout import Dropout, classic, inverted, keep_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def masks(count):
    """All 2^count masks."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
def test_the_mean_training_output_is_the_test_output_exactly(p, monkeypatch):
    """Behind a linear layer, by summing over all 2⁶ masks with their probabilities, for both forms."""
    x = torch.randn(6, dtype=torch.float64, generator=seeded())
    readout = torch.randn(4, 6, dtype=torch.float64, generator=seeded(1))
    every = masks(6)
    chance = (every * (1 - p) + (1 - every) * p).prod(1)
    for form in ("classic", "inverted"):
        layer = Dropout(p, form)
        outputs = []
        for mask in every:
            monkeypatch.setattr("etude.blocks.nn.dropout.keep_mask", lambda *_, m=mask: m.clone())
            outputs.append(readout @ layer.train()(x, seeded()))
        mean = (chance[:, None] * torch.stack(outputs)).sum(0)
        torch.testing.assert_close(mean, readout @ layer.eval()(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_classic_with_weights_w_is_inverted_with_weights_times_keep(p):
    """E24: at test the weights shrink by the probability of keeping; the notes' 1/keep would grow them."""
    x = torch.randn(32, 20, dtype=torch.float64, generator=seeded())
    weights = torch.randn(20, 5, dtype=torch.float64, generator=seeded(1))
    old, new = Dropout(p, "classic"), Dropout(p)
    train = old(x, seeded(2)) @ weights, new(x, seeded(2)) @ ((1 - p) * weights)
    torch.testing.assert_close(*train, rtol=1e-12, atol=1e-12)
    test = old.eval()(x) @ weights, new.eval()(x) @ ((1 - p) * weights)
    torch.testing.assert_close(*test, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_equal_streams_give_torchs_output_and_gradient(p, dtype):
    """`p` is the probability of dropping; bit for bit, with a generator or the global stream."""
    x = torch.randn(7, 33, dtype=dtype, generator=seeded())
    results = []
    for make in (lambda v: nn.Dropout(p)(v), lambda v: Dropout(p)(v), lambda v: Dropout(p)(v, seeded(5))):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        out = make(leaf)
        (out * out).sum().backward()
        results.append((out.detach(), leaf.grad))
    for out, slope in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(slope, results[0][1])


def test_the_share_and_size_of_what_is_kept():
    """10⁶ units at p = 0.2: 80 % stay, as 1.25 each; E[y] = E[x] within 4 standard errors."""
    x = torch.ones(1_000_000)
    y = inverted(x, 0.2, seeded())
    assert y.unique().tolist() == [0.0, 1.25]
    error = math.sqrt(0.2 * 0.8 / 1e6)
    assert abs((y > 0).double().mean().item() - 0.8) < 4 * error
    assert abs(y.double().mean().item() - 1) < 4 * error / 0.8
    assert classic(x, 0.2, seeded()).unique().tolist() == [0.0, 1.0]
    assert torch.equal(classic(x, 0.2, seeded()) > 0, y > 0)


def test_evaluation_is_the_identity_and_edges():
    x = torch.randn(5, 3, generator=seeded())
    assert Dropout(0.7).eval()(x) is x
    torch.testing.assert_close(Dropout(0.7, "classic").eval()(x), 0.3 * x)
    assert torch.equal(Dropout(0.0)(x, seeded()), x)
    assert torch.equal(Dropout(1.0)(x, seeded()), torch.zeros(5, 3))
    assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 3))
    assert Dropout(0.3).state_dict() == {}


def test_a_generator_makes_masks_a_function():
    x = torch.ones(100)
    state = torch.get_rng_state()
    assert torch.equal(keep_mask(x, 0.5, seeded(1)), keep_mask(x, 0.5, seeded(1)))
    assert not torch.equal(keep_mask(x, 0.5, seeded(1)), keep_mask(x, 0.5, seeded(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not keep_mask(x.requires_grad_(), 0.5).requires_grad


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_mistakes_are_named(p):
    with pytest.raises(ValueError, match=r"probability of dropping must be in \[0, 1\]"):
        Dropout(p)
    with pytest.raises(ValueError, match="form must be one of inverted, classic"):
        Dropout(0.5, "alpha")
