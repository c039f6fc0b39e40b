"""The layers written out against torch's kernels and SciPy's sums; what moves, what stays, and what a border does."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, signal
from torch import nn
from torch.nn import functional as F

from etude import data as room
from etude.blocks.nn.windows import Window, convolve, convolve_transposed, unfold
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.vision.convolution import Config, Convolution, MaxPool, MeanPool, Scramble, build, examine, stages
from etude.vision.parts.exhibits import border_error, film, looked_at, moved_gap, seen, turned

GREY = Spec((1, 8, 8), tuple("abc"), (0.3,), (0.4,))


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


LAYERS = [
    (Convolution, nn.Conv2d, (4, 6, 3), {}),
    (Convolution, nn.Conv2d, (4, 6, 3), {"padding": 1, "stride": 2}),
    (Convolution, nn.Conv2d, (4, 8, 2), {"padding": 2, "dilation": 3}),
    (Convolution, nn.Conv2d, (4, 8, 3), {"groups": 4, "stride": 3, "padding": 1}),
    (MaxPool, nn.MaxPool2d, (2,), {}), (MaxPool, nn.MaxPool2d, (3,), {}), (MeanPool, nn.AvgPool2d, (3,), {}),
]  # fmt: skip


@pytest.mark.parametrize(("mine", "torchs", "sizes", "more"), LAYERS, ids=str)
def test_a_layer_and_its_gradients_are_torchs(mine, torchs, sizes, more):
    a, b = mine(*sizes, **more).double(), torchs(*sizes, **more).double()
    b.load_state_dict(a.state_dict())
    x = random(2, 4, 9, 8)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = a(first), b(second)
    near(y, wanted)
    slope = torch.randn_like(y)
    y.backward(slope)
    wanted.backward(slope)
    near(first.grad, second.grad)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        near(p.grad, q.grad)


def test_whoever_exports_a_layer_gets_torchs_kernel(monkeypatch):
    x = random(1, 4, 6, 6)
    layers = [Convolution(4, 2, 3).double(), MaxPool(2), MeanPool(2)]
    wanted = [layer(x) for layer in layers]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("etude.vision.convolution.convolve", None)
    for layer, y in zip(layers, wanted):
        near(layer(x), y)


def test_it_is_scipys_correlation_not_its_convolution():  # E25
    x, w, b = random(1, 3, 7, 9), random(2, 3, 3, 3), random(2)
    y = convolve(x, w, b)
    for o in range(2):
        sums = [signal.correlate2d(x[0, c].numpy(), w[o, c].numpy(), "valid") for c in range(3)]
        np.testing.assert_allclose(y[0, o].numpy(), np.sum(sums, 0) + float(b[o]), atol=1e-12)
        turned_sums = [signal.convolve2d(x[0, c].numpy(), w[o, c].flip(0, 1).numpy(), "valid") for c in range(3)]
        np.testing.assert_allclose(np.sum(turned_sums, 0), np.sum(sums, 0), atol=1e-12)
    columns = unfold(x, Window.of(3)).flatten(1, 3).flatten(2)  # im2col
    near(y, (w.flatten(1) @ columns).unflatten(2, (5, 7)) + b[:, None, None])


@pytest.mark.parametrize(("stride", "padding"), list(itertools.product((2, 3), (0, 1))))
def test_a_stride_leaves_places_out(stride, padding):
    x, w = random(2, 3, 10, 9), random(4, 3, 3, 3)
    near(convolve(x, w, stride=stride, padding=padding), convolve(x, w, padding=padding)[..., ::stride, ::stride])


def test_a_layer_moves_with_its_image_and_pooling_by_whole_windows():
    torch.manual_seed(0)
    x, conv = random(3, 1, 8, 8), nn.Conv2d(1, 4, 3, padding=1).double()
    deep = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1).double(), nn.MaxPool2d(2))
    assert moved_gap(conv, x, 1, 1) < 1e-12
    assert moved_gap(deep, x, 4, 4) < 1e-12
    assert moved_gap(deep, x, 1, 4) > 0.1
    assert moved_gap(deep, x, 2, 4) > 0.1
    strided = nn.Conv2d(1, 4, 3, 2, 1).double()
    assert moved_gap(strided, x, 2, 2) < 1e-12
    assert moved_gap(strided, x, 1, 2) > 0.1


def test_moved_gap_is_the_ratio_written_out():
    """f(x) = x · (place across): moved by one pixel, f(S x) − S f(x) is S x itself."""
    ramp = type("Ramp", (nn.Module,), {"forward": lambda _, x: x * torch.arange(x.shape[3], dtype=x.dtype)})()
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 2] = 5
    wide = 4 * -(-8 // 4)  # of the canvas's frame, in which the pixel stands at wide + 2
    assert moved_gap(ramp, x, 1, 1) == pytest.approx(1 / (wide + 2))


def test_zeros_draw_a_dark_frame_unless_the_mean_is_subtracted():  # E26
    blur = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    grey = torch.full((1, 1, 6, 6), 0.6, dtype=torch.float64)
    raw = convolve(grey, blur, padding=1)[0, 0]
    near(raw[1:-1, 1:-1], grey[0, 0, 1:-1, 1:-1])
    near(raw[0, 1:-1], torch.full((4,), 0.6 * 6 / 9, dtype=torch.float64))
    near(raw[0, 0], torch.tensor(0.6 * 4 / 9, dtype=torch.float64))
    assert torch.equal(convolve(grey - 0.6, blur, padding=1), torch.zeros(1, 1, 6, 6, dtype=torch.float64))


def test_a_zero_is_below_all_pixels_of_a_raw_picture_alone():  # E26
    spec = room.images("digits").spec
    x = room.images("digits").test.x[:20]
    for subtract in (True, False):
        model = build(Config(subtract=subtract, maps=4), spec)["model"]
        given, hidden = model.before(x), model.features[0](model.before(x))
        assert (float(given.min()) < 0) == subtract
        assert float(hidden.detach().min()) < 0


@pytest.mark.parametrize("subtract", [True, False])
def test_border_error_is_scipys(subtract):
    pixels, x = looked_at("flower", subtract)
    assert pixels.shape == (1, 3, 104, 160)
    raw = pixels[0].double().numpy()
    less = raw - raw.mean((1, 2), keepdims=True) * subtract
    less = less / raw.std((1, 2), keepdims=True, ddof=1)
    np.testing.assert_allclose(x[0].numpy(), less, atol=1e-5)
    wrong = np.stack(
        [ndimage.uniform_filter(c, 3, mode="constant") - ndimage.uniform_filter(c, 3, mode="mirror") for c in less]
    )
    edge = np.ones(wrong.shape, bool)
    edge[:, 1:-1, 1:-1] = False
    assert border_error(x) == pytest.approx(np.sqrt((wrong[edge] ** 2).mean()) / less.std(ddof=1), rel=1e-4)


def test_the_first_of_equal_maxima_gets_the_gradient():
    x = torch.tensor([[1.0, 3, 0, 0], [3, 3, 0, 0]])[None, None].requires_grad_()
    MaxPool(2)(x).sum().backward()
    assert x.grad[0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_overlaps_of_a_transposed_convolution_are_summed():  # E41
    y = convolve_transposed(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), stride=2)[0, 0]
    assert y.shape == (7, 7)
    assert y[2].tolist() == [2, 2, 4, 2, 4, 2, 2]
    for window in (Window.of(3, 2), Window.of(3, padding=1), Window.of(2, dilation=3)):
        by_hand = torch.zeros(7, 7)
        (k, _), (s, _), (p, _), (d, _) = window
        for i, j in itertools.product(*map(range, window.places(7, 7))):
            for u, v in itertools.product(range(k), repeat=2):
                row, column = s * i + d * u - p, s * j + d * v - p
                if 0 <= row < 7 and 0 <= column < 7:
                    by_hand[row, column] += 1
        assert torch.equal(seen(window, 7, 7), by_hand)


CONFIGS = st.builds(
    Config,
    kernel=st.sampled_from([1, 3]), stride=st.integers(1, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]),
    padding=st.sampled_from([None, 0, 2]), pool=st.sampled_from(["max", "mean", "none"]), window=st.integers(1, 3),
    maps=st.just(4), engine=st.sampled_from(["written", "torch"]),
)  # fmt: skip


@given(CONFIGS)
def test_stages_say_what_the_network_does(config):
    """Shapes, weights, products and what a place sees, of every layer, against the network itself."""
    spec = Spec((2, 20, 18), tuple("ab"), (0.5,) * 2, (0.5,) * 2)
    try:
        rows = stages(config, *spec.shape)
    except UserError:
        return
    model = build(config, spec)["model"].double()
    parts = [part for part in model.features if not isinstance(part, (nn.ReLU, nn.Identity))]
    assert len(parts) == len(rows) - 1
    x, field, step = random(1, 2, 20, 18), 1, 1
    for part, row in zip(parts, rows[1:]):
        x = part(x)
        assert tuple(x.shape[1:]) == (row["maps"], row["height"], row["width"])
        assert sum(p.numel() for p in part.parameters()) == row["weights"]
        assert row["products"] == (part.weight.numel() * x.shape[2] * x.shape[3] if row["weights"] else 0)
        size = part.kernel_size[0] if row["weights"] else part.kernel_size
        field += step * (config.dilation if row["weights"] else 1) * (size - 1)
        step *= part.stride[0] if row["weights"] else size
        assert (row["field"], row["step"]) == (field, step)


def test_a_place_sees_its_field():
    """The gradient of one value of the last maps covers as many pixels across as `field` says; E27: pooling rounds down."""
    spec = Spec((1, 21, 21), tuple("ab"), (0.0,), (1.0,))
    config = Config(pool="mean", maps=2, dilation=2)
    rows = stages(config, *spec.shape)
    assert [(row["height"], row["field"]) for row in rows] == [(21, 1), (21, 5), (10, 6), (10, 14), (5, 16)]
    model = build(config, spec)["model"]
    chain = nn.Sequential(*(part for part in model.features if not isinstance(part, nn.ReLU)))
    x = torch.zeros(1, 1, 21, 21, requires_grad=True)
    chain(x)[0, 0, 2, 2].backward()
    touched = x.grad[0, 0].nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [rows[-1]["field"]] * 2


def test_the_chain_is_that_of_torch():
    """State dicts fit both ways into the same chain of torch's own layers."""
    model = build(Config(maps=4), GREY)["model"]
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )  # fmt: skip
    plain.load_state_dict(model.features.state_dict())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(plain(model.before(x)), model.features(model.before(x)))
    assert list(model.state_dict()) == [
        *(f"features.{n}" for n in plain.state_dict()),
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    torch.testing.assert_close(model.before(x), (x - 0.3) / 0.4)
    torch.testing.assert_close(build(Config(subtract=False), GREY)["model"].before(x), x / 0.4)


def test_scrambled_pixels_are_all_there_and_every_image_has_the_same_order():
    x = torch.arange(2 * 3 * 16).view(2, 3, 4, 4).float()
    y = Scramble(4, 4)(x)
    assert not torch.equal(x, y)
    assert torch.equal(x.flatten(2).sort(-1).values, y.flatten(2).sort(-1).values)
    assert torch.equal(y[1, 2] - y[0, 0], torch.full((4, 4), 80.0))
    assert torch.equal(y, Scramble(4, 4)(x))
    model = build(Config(scramble=True, maps=4), GREY)["model"]
    small = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(model.before(small), (Scramble(8, 8)(small) - 0.3) / 0.4)


@torch.no_grad()
def test_examination_is_computed_again():
    torch.manual_seed(3)
    config = Config(maps=4)
    model = build(config, GREY)["model"].eval()
    x, (_, photograph) = room.images("digits").test.x[:60], looked_at("china", True)
    found = examine(config, GREY, model, x, photograph)
    plain = build(Config(maps=4, engine="torch"), GREY)["model"]
    plain.load_state_dict(model.state_dict())
    straight = plain(x).softmax(1)
    assert found["torch_gap"] == pytest.approx(float((straight - model(x).softmax(1)).abs().max()), abs=1e-6)
    for part in (plain.features[0], plain.features[3]):
        part.weight.data = torch.from_numpy(part.weight.detach().numpy()[:, :, ::-1, ::-1].copy())
    assert found["flipped_gap"] == pytest.approx(float((plain(x).softmax(1) - straight).abs().max()), rel=1e-4)
    assert torch.equal(turned(turned(model)).features[0].weight, model.features[0].weight)
    pixels = model.before(x[:50])
    assert found["conv_gap"] == moved_gap(model.features[0], pixels, 1, 1) < 1e-6
    assert found["pooled_gap"] == moved_gap(model.features, pixels, 1, 4) > 0.1
    assert found["stride_gap"] == moved_gap(model.features, pixels, 4, 4) < 1e-6
    assert found["border_error"] == border_error(photograph)


def test_the_film_shows_every_place_and_ends_with_all_sums():
    x, kernel = torch.rand(5, 4), torch.randn(3, 3)
    frames = film(x, kernel, scale=6)
    assert len(frames) == 20
    y = F.conv2d(x[None, None], kernel[None, None], padding=1)[0, 0]
    left = frames[-1].width - 4 * 6
    top = (frames[-1].height - 5 * 6) // 2
    for i, j in ((0, 0), (2, 3), (4, 1)):
        shade = frames[-1].getpixel((left + 6 * j + 3, top + 6 * i + 3))[0]
        assert abs(shade / 255 - (0.5 + 0.5 * float(y[i, j] / y.abs().max()))) < 0.01


@pytest.mark.parametrize(("settings", "said"), [
    ({"kernel": 4}, "has no middle"), ({"groups": 5}, "--groups 5 does not divide the 12 maps"),
    ({"kernel": 9, "padding": 0}, "convolution 1 does not fit"), ({"window": 9}, "max pooling 1 does not fit"),
    ({"kernel": 5, "padding": 0}, "convolution 2 does not fit"),
])  # fmt: skip
def test_what_does_not_fit_is_named(settings, said):
    with pytest.raises(UserError, match=said):
        build(Config(**settings), GREY)
