"""Signal and gradient through depth: autograd parity, whole runs, closed forms, dead and inactive (E16-E20)."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch

import etude
from etude import data as room
from etude.basics import initialization
from etude.basics.initialization import CASES, FUNCTIONS, backward, deviation, forward, histogram, passes, rms
from etude.basics.parts.training_nulls import Raw
from etude.core.randomness import generator


@contextlib.contextmanager
def without_pictures():
    """They cost more than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("depth_figure", "histogram_figure", "dead_figure"):
            patch.setattr(initialization, name, lambda *_: "")
        yield


@pytest.fixture
def undrawn():
    with without_pictures():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Metrics and tables (18, 20) of the default run; the last layer by name."""
    flags = {"batch": 96, "quiet": True, "seed": 3}
    with without_pictures():
        run = etude.run("basics/initialization", out=tmp_path_factory.mktemp("init") / "run", **flags)
    seen = etude.load(run.folder).state["seen"]
    found = {f"rms_{f}_{name}": seen["rms"][i, -1] for i, (f, name) in enumerate(CASES)}
    found |= {f"gradient_{f}_{name}": seen["gradient"][i, 0] for i, (f, name) in enumerate(CASES)}
    return run.metrics, seen, found


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
    found = done[2]
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
    found = done[2]
    assert found["gradient_linear_small"] == pytest.approx((math.sqrt(512) * 0.01) ** 19, rel=0.1)
    assert found["gradient_linear_orthogonal"] == pytest.approx(1.0, rel=0.02)
    assert found["gradient_linear_he"] == pytest.approx(2**9.5, rel=0.1)
    assert found["gradient_relu_he"] == pytest.approx(1.0, rel=0.4)
    assert found["gradient_relu_lecun"] == pytest.approx(2**-9.5, rel=0.5)
    assert found["gradient_tanh_small"] < 1e-12 < 0.1 < found["gradient_tanh_glorot"]


def test_half_of_the_units_are_inactive_and_none_of_the_first_layer_dead(done):
    """E19: on real images; a bias of 0.1 activates a few more, and deep layers of ReLUs do have dead units."""
    found, seen, _ = done
    assert found["inactive_images"] == pytest.approx(0.5, abs=0.03)
    assert found["inactive_images_with_bias"] < found["inactive_images"] - 0.01
    assert found["dead_images"] == found["dead_images_with_bias"] == 0
    he = CASES.index(("relu", "he"))
    assert seen["dead"][he, 0] == 0
    assert seen["dead"][he, -1] > 0.05
    assert np.abs(seen["inactive"][he] - 0.5).max() < 0.1


def test_a_signal_that_underflows_is_logged_and_drawn(tmp_path):
    """100 layers of N(0, 0.01²): float32 ends at 1e-45, behind which the rms is 0; the closed forms end there too."""
    flags = {"preset": "tiny", "layers": 100, "width": 24, "batch": 8, "images": 10}
    run = etude.run("basics/initialization", out=tmp_path / "run", quiet=True, seed=0, **flags)
    seen = etude.load(run.folder).state["seen"]
    at = {name: CASES.index(("linear", name)) for name in ("small", "he")}
    assert seen["rms"][at["small"], -1] == seen["gradient"][at["small"], 0] == 0
    assert seen["rms"][at["he"], -1] > 1e10
    assert run.metrics["linear_error"] < 15


def test_histograms_count_every_activation_inside_the_range():
    z = torch.tensor([[-1e3, 0.0, 0.01, 4.9], [-6.0, 2.0, -2.0, 1e3]])
    assert histogram(z, "tanh").sum() == 8
    assert histogram(z, "relu").sum() == 5
    assert histogram(z, "relu")[30] == 2
    assert rms(z[:, 1:2]) == pytest.approx(math.sqrt(2))


SMALL = {"width": 12, "layers": 5, "batch": 9, "images": 40}


def plain(name, width, stream):
    """A weight by the formula of its draw: a normal one times s, or QR's Q with R's diagonal made positive."""
    normal = torch.empty(width, width).normal_(generator=stream)
    if name.startswith("orthogonal"):
        q, r = torch.linalg.qr(normal)
        return q * r.diagonal().sign() * (2**0.5 if name == "orthogonal2" else 1)
    return normal * {"small": 0.01, "he": math.sqrt(2 / width)}.get(name, math.sqrt(1 / width))


@pytest.mark.parametrize("extra", [{}, {"layers": 1}, {"width": 7, "batch": 3}])
def test_loop_equals_a_plain_one(extra, tmp_path, undrawn):
    """Each network drawn by its formula, sent through torch's functions, its gradient by autograd."""
    flags = SMALL | extra
    run = etude.run("basics/initialization", out=tmp_path / "run", quiet=True, seed=5, **flags)
    seen, width, layers = etude.load(run.folder).state["seen"], flags["width"], flags["layers"]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(CASES) == 18
    for step, (function, name) in enumerate(CASES):
        stream = generator(5, step, 0, "draw")
        weights = [plain(name, width, stream) for _ in range(layers)]
        a, last = (torch.randn(flags["batch"], width, generator=stream) for _ in range(2))
        z, squash = [], {"tanh": torch.tanh, "relu": torch.relu, "linear": torch.clone}[function]
        for weight in weights:
            z.append((a @ weight.T).requires_grad_())
            a = squash(z[-1])
        slopes = torch.autograd.grad(z[-1], z, last)
        for layer in range(layers):
            values = z[layer].detach()
            assert seen["rms"][step, layer] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-4)
            assert seen["gradient"][step, layer] == pytest.approx(slopes[layer].square().mean().sqrt().item(), rel=1e-4)
            assert seen["inactive"][step, layer] == pytest.approx((values <= 0).float().mean().item())
            assert seen["dead"][step, layer] == pytest.approx((values <= 0).all(0).float().mean().item())
            shown = values.tanh() if function == "tanh" else values / 5
            counts = np.histogram(shown.numpy(), 61, (-1, 1))[0]
            assert np.abs(seen["histogram"][step, layer] - counts).sum() <= 2  # one on the edge of its bin
        assert rows[step][f"rms_{function}_{name}"] == seen["rms"][step, -1]
        assert rows[step][f"gradient_{function}_{name}"] == seen["gradient"][step, 0]


@pytest.mark.parametrize("extra", [{}, {"layers": 1, "images": 3}])
def test_reported_numbers_follow_from_the_tables_and_the_images(extra, tmp_path, undrawn):
    flags = SMALL | extra
    run = etude.run("basics/initialization", out=tmp_path / "run", quiet=True, seed=5, **flags)
    seen, width, layers = etude.load(run.folder).state["seen"], flags["width"], flags["layers"]
    table = {case: (seen["rms"][i], seen["gradient"][i], seen["dead"][i]) for i, case in enumerate(CASES)}
    expected = {
        f"rms_{f}_{name}": table[f, name][0][-1]
        for f, name in (("relu", "he"), ("relu", "lecun"), ("tanh", "glorot"), ("tanh", "small"))
    }
    for function, share in (("relu", 0.5), ("linear", 1.0)):
        off = []
        for name in ("small", "lecun", "glorot", "he", "orthogonal", "orthogonal2"):
            s2 = {"small": 1e-4, "he": 2 / width, "orthogonal2": 2 / width}.get(name, 1 / width)
            down = (width * s2 * share) ** ((layers - 1) / 2)
            z, slope, _ = table[function, name]
            off += [math.log2(z[-1] / math.sqrt(width * s2) / down), math.log2(slope[0] / slope[-1] / down)]
        expected[f"{function}_error"] = max(map(abs, off))
    expected["dead_last_layer"] = table["relu", "he"][2][-1]
    x = room.images("digits").train.x.flatten(1).float() / 255
    std = x.std(0, correction=0)
    x = torch.where(std > 0, (x - x.mean(0)) / std, 0.0)[: flags["images"]]
    weight = torch.empty(width, 64).normal_(0, math.sqrt(2 / 64), generator=generator(5, 0, 0, "census"))
    for name, bias in (("", 0.0), ("_with_bias", 0.1)):
        off = x @ weight.T + bias <= 0
        expected[f"inactive_images{name}"] = off.float().mean().item()
        expected[f"dead_images{name}"] = off.all(0).float().mean().item()
    assert run.metrics == pytest.approx(expected, rel=1e-5)


def test_what_the_closed_forms_are_made_of():
    """E16, E17, E18, E20: the deviation of each draw, and what a ReLU leaves of the second moment of a normal z."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for function in ("relu", "linear"):
        assert FUNCTIONS[function](z).square().mean().item() == pytest.approx(passes(function), abs=0.01)
    for name in ("small", "lecun", "glorot", "he", "orthogonal", "orthogonal2"):
        weight = plain(name, 100, torch.Generator().manual_seed(0))
        assert weight.std().item() == pytest.approx(deviation(name, 100), rel=0.03)


def test_standardised_pixels_leave_no_unit_dead_and_raw_ones_do(tmp_path, undrawn, monkeypatch):
    """E19: z has mean 0 over the images it was standardised by; positive pixels push some units down for all of them."""
    flags = {"width": 512, "layers": 1, "batch": 2, "images": 2000, "quiet": True, "seed": 0}
    run = etude.run("basics/initialization", out=tmp_path / "one", **flags)
    assert run.metrics["dead_images"] == 0
    monkeypatch.setattr(initialization, "Standardise", Raw)
    raw = etude.run("basics/initialization", out=tmp_path / "two", **flags)
    assert 0.01 < raw.metrics["dead_images"] < 0.05  # measured 0.025
