"""LeNet against the paper's numbers, torch's own layers, SciPy's correlation and hand-built kernels."""

import pytest
import torch
from scipy.signal import correlate2d
from torch import nn
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.vision.lenet import TABLE_1, Config, LeNet, ScaledTanh, SparseConv, Subsample, build


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_modern_parameter_count():
    assert count(LeNet(10)) == 61_706  # 156 + 2,416 + 48,120 + 10,164 + 850


def test_1998_parameter_counts_are_the_papers():
    model = LeNet(10, style="1998")
    layers = dict(zip(("c1", "_", "s2", "c3", "_", "s4", "c5"), model.features))
    assert count(layers["c1"]) == 156
    assert count(layers["s2"]) == 12
    assert int(layers["c3"].table.sum()) * 25 + 16 == 1_516
    assert count(layers["s4"]) == 32
    assert count(layers["c5"]) == 48_120
    f6 = model.classifier[1]
    assert count(f6) == 10_164
    # the kernels that Table I leaves out never act, so they are not parameters of the model in the paper's sense
    unused = int((layers["c3"].table == 0).sum()) * 25
    assert count(model.features) + count(f6) - unused == 60_000


def test_table_1_connections():  # E29
    assert len(TABLE_1) == 16
    assert sum(map(len, TABLE_1)) == 60
    assert [len(row) for row in TABLE_1] == [3] * 6 + [4] * 9 + [6]
    for column in "012345":
        assert sum(column in row for row in TABLE_1) == 10  # every S2 map feeds ten C3 maps


def test_layer_shapes():
    x = torch.zeros(2, 1, 28, 28)
    shapes = []
    model = LeNet(10)
    for layer in model.features:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(6, 28, 28)] * 2 + [(6, 14, 14)] + [(16, 10, 10)] * 2 + [(16, 5, 5)] + [(120, 1, 1)] * 2


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
@pytest.mark.parametrize("style", ["modern", "1998"])
def test_builds_for_both_sizes(size, channels, style):
    spec = Spec(shape=(channels, size, size), classes=tuple("abc"), mean=(0.5,) * channels, std=(0.2,) * channels)
    model = build(Config(size=size, style=style), spec)["model"]
    assert model(torch.rand(4, channels, size, size)).shape == (4, 3)


def test_parity_with_plain_sequential():
    # 0.125 and 0.25 are exact in float32, in which the statistics are kept
    torch.manual_seed(0)
    model = LeNet(10, mean=(0.125,), std=(0.25,)).double()
    plain = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    ).double()  # fmt: skip
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), plain.parameters()):
            theirs.copy_(mine.reshape(theirs.shape))
    x, y = torch.rand(5, 1, 28, 28, dtype=torch.float64), torch.arange(5)
    a, b = model(x), plain((x - 0.125) / 0.25)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    F.cross_entropy(a, y).backward()
    F.cross_entropy(b, y).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad.reshape(mine.shape), rtol=1e-10, atol=1e-12)


def test_convolution_is_cross_correlation():  # E25
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 5).double()
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    for o in range(3):
        expected = sum(
            correlate2d(x[0, c].numpy(), layer.weight[o, c].detach().numpy(), mode="valid") for c in range(2)
        )
        torch.testing.assert_close(layer(x)[0, o].detach(), torch.from_numpy(expected) + layer.bias[o].detach())


def test_sparse_conv_ignores_unconnected_maps():
    torch.manual_seed(0)
    layer = SparseConv().double()
    x = torch.randn(1, 6, 14, 14, dtype=torch.float64, requires_grad=True)
    for o, inputs in enumerate(TABLE_1):
        (grad,) = torch.autograd.grad(layer(x)[0, o].sum(), x)
        touched = {str(c) for c in range(6) if grad[0, c].abs().sum() > 0}
        assert touched == set(inputs)


def test_subsample_is_scaled_mean():
    layer = Subsample(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert layer(x).flatten().tolist() == [2 * 1.5 + 0.5, -5.5]


def test_scaled_tanh_maps_one_to_one():
    value = ScaledTanh()(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(value, torch.tensor([1.0, -1.0]), rtol=0, atol=1e-4)


def test_takes_bytes_and_unit_floats_alike():
    torch.manual_seed(0)
    model = LeNet(10)
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(model(x), model(x.float() / 255))


def test_a_normaliser_stands_between_each_layer_and_its_squashing():
    for style in ("modern", "1998"):
        batch, layer = (LeNet(10, style=style, normalizer=name) for name in ("batch", "layer"))
        order = [type(part).__name__ for part in batch.features]
        squash = "ReLU" if style == "modern" else "ScaledTanh"
        convolution = "Conv2d" if style == "modern" else "SparseConv"
        assert [order[i : i + 3] for i in (0, 4, 8)] == [
            ["Conv2d", "BatchNorm", squash], [convolution, "BatchNorm", squash], ["Conv2d", "BatchNorm", squash]
        ]  # fmt: skip
        # γ and β a map and a unit in place of the biases; for layer normalisation they are per position, biases stay
        assert count(batch) == count(LeNet(10, style=style)) + 6 + 16 + 120 + 84
        assert count(layer) == count(LeNet(10, style=style)) + 2 * (6 * 28**2 + 16 * 10**2 + 120 + 84)


def test_batch_normalisation_is_torchs_per_map_and_layer_normalisation_per_image():
    torch.manual_seed(0)
    x = torch.rand(5, 1, 28, 28)
    batch, layer = (LeNet(10, normalizer=name).train() for name in ("batch", "layer"))
    maps = batch.features[0](batch.standardise(x))
    norm = nn.BatchNorm2d(6)
    torch.testing.assert_close(batch.features[1](maps), norm(maps), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.features[1].running_var, norm.running_var)
    normal = layer.features[1](layer.features[0](layer.standardise(x)))
    torch.testing.assert_close(normal.mean((1, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.var((1, 2, 3), correction=0), torch.ones(5), rtol=1e-3, atol=1e-3)
    assert torch.equal(layer(x)[:2], layer(x[:5])[:2])
    assert not torch.allclose(batch(x)[:2], batch(x[:3])[:2], rtol=1e-3)  # a batch is normalised together


def test_dropout_switches_off_units_of_the_dense_layers_in_training():
    torch.manual_seed(0)
    model, x = LeNet(10, dropout=0.5), torch.rand(64, 1, 28, 28)
    c5 = model.features(model.standardise(x)).flatten(1)
    plain = model.eval().features(model.standardise(x)).flatten(1)
    dropped = (c5 == 0) & (plain != 0)
    assert float(dropped.sum() / (plain != 0).sum()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(c5[~dropped], 2 * plain[~dropped])
    assert [type(part).__name__ for part in model.classifier] == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize(("style", "scale"), [("modern", 2.0), ("1998", 1.0)])
def test_the_initialiser_follows_the_style_unless_one_is_named(style, scale):
    spec = Spec(shape=(1, 28, 28), classes=tuple("0123456789"), mean=(0.1,), std=(0.3,))
    for init, variance in ((None, scale / 120), ("small", 1e-4), ("glorot", 2 / 204)):
        torch.manual_seed(0)
        model = build(Config(style=style, initializer=init, initial_bias=0.2), spec)["model"]
        assert model.classifier[1].weight.var().item() == pytest.approx(variance, rel=0.05)
        assert bool((model.classifier[1].bias == 0.2).all())


@pytest.mark.parametrize(("flags", "said"), [
    ({"clip_norm": 1.0, "clip_value": 1.0}, "two ways to do one thing"),
    ({"normalizer": "batch", "batch": 1}, "a batch of one"),
    ({"ensemble": "snapshots"}, "snapshots of a one_cycle schedule would all be alike; take --schedule cyclic"),
    ({"ensemble": "seeds", "combine": "weights"}, "begin with different weights"),
    ({"members": 2}, "needs an ensemble"),
])  # fmt: skip
def test_combinations_that_make_no_sense(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("vision/lenet", preset="tiny", quiet=True, **flags, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
