"""Signal and gradient through depth: autograd parity, closed forms, the recorded table, dead and inactive (E16-E20)."""

import math

import numpy as np
import pytest
import torch

import etude
from etude.basics.initialization import CASES, FUNCTIONS, backward, forward, histogram, rms


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return etude.run("basics/initialization", out=tmp_path_factory.mktemp("init") / "run", quiet=True, seed=3, count=96)


def weights(layers=4, width=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(width, width, dtype=torch.float64, generator=generator) / 2 for _ in range(layers)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_and_backward_equal_autograd(function):
    draw = torch.Generator().manual_seed(1)
    ws, x = weights(), torch.randn(5, 6, dtype=torch.float64, generator=draw).requires_grad_()
    z = forward(ws, x, function)
    a = x
    for w, layer in zip(ws, z):
        torch.testing.assert_close(layer, torch.nn.functional.linear(a, w))
        a = FUNCTIONS[function](layer)
    last = torch.randn(5, 6, dtype=torch.float64, generator=draw)
    expected = torch.autograd.grad(z[-1], z, last)
    ours = backward(ws, [layer.detach() for layer in z], last, function)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_table_of_rms_in_layer_20(done):
    """E16, E17, E18, E20: the closed forms; ReLU networks differ by some 20 % from draw to draw."""
    found = done.metrics
    collapse = (math.sqrt(512) * 0.01) ** 20
    for name, expected, rel in (
        ("linear_small", collapse, 0.1),
        ("tanh_small", collapse, 0.1),
        ("relu_small", collapse / 2**9.5, 0.8),
        ("linear_lecun", 1.0, 0.05),
        ("linear_glorot", 1.0, 0.05),
        ("linear_orthogonal", 1.0, 0.02),
        ("linear_he", 2.0**10, 0.1),
        ("relu_lecun", 2**-9.5, 0.8),
        ("relu_he", math.sqrt(2), 0.6),
        ("relu_orthogonal2", math.sqrt(2), 0.6),
        ("tanh_glorot", 0.166, 0.03),
        ("tanh_he", 0.79, 0.03),
    ):
        assert found[f"rms_{name}"] == pytest.approx(expected, rel=rel), name


def test_gradients_shrink_and_grow_like_the_signal(done):
    """19 matrices lie between layers 20 and 1: s√D each for linear units, s√(D/2) for ReLUs."""
    found = done.metrics
    assert found["gradient_linear_small"] == pytest.approx((math.sqrt(512) * 0.01) ** 19, rel=0.1)
    assert found["gradient_linear_orthogonal"] == pytest.approx(1.0, rel=0.02)
    assert found["gradient_linear_he"] == pytest.approx(2**9.5, rel=0.1)
    assert found["gradient_relu_he"] == pytest.approx(1.0, rel=0.4)
    assert found["gradient_relu_lecun"] == pytest.approx(2**-9.5, rel=0.5)
    assert found["gradient_tanh_small"] < 1e-12 < 0.1 < found["gradient_tanh_glorot"]


def test_half_of_the_units_are_inactive_and_none_of_the_first_layer_dead(done):
    """E19: on real images; a bias of 0.1 activates a few more, and deep layers of ReLUs do have dead units."""
    found = done.metrics
    assert found["inactive_bias_0"] == pytest.approx(0.5, abs=0.03)
    assert found["inactive_bias_01"] < found["inactive_bias_0"] - 0.01
    assert found["dead_bias_0"] == found["dead_bias_01"] == 0
    seen = etude.load(done.folder).state["seen"]
    he = CASES.index(("relu", "he"))
    assert seen["dead"][he, 0] == 0
    assert seen["dead"][he, -1] > 0.05
    assert np.abs(seen["inactive"][he] - 0.5).max() < 0.1


def test_a_signal_that_underflows_is_logged_and_drawn(tmp_path):
    """100 layers of N(0, 0.01²): float32 ends at 1e-45, behind which the rms is 0."""
    flags = {"preset": "tiny", "depth": 100, "width": 24, "count": 8, "images": 10}
    found = etude.run("basics/initialization", out=tmp_path / "run", quiet=True, seed=0, **flags).metrics
    assert found["rms_linear_small"] == found["gradient_linear_small"] == 0
    assert found["rms_linear_he"] > 1e10


def test_histograms_count_every_activation_inside_the_range():
    z = torch.tensor([[-1e3, 0.0, 0.01, 4.9], [-6.0, 2.0, -2.0, 1e3]])
    assert histogram(z, "tanh").sum() == 8
    assert histogram(z, "relu").sum() == 5
    assert histogram(z, "relu")[30] == 2
    assert rms(z[:, 1:2]) == pytest.approx(math.sqrt(2))
