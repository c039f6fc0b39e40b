"""AlexNet against the papers' counts, torchvision's names, its chain written out, and the function that two towers are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etude.blocks.classifying import published
from etude.blocks.nn.windows import local_response
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.vision.alexnet import LAST, AlexNet, Config, ResponseNorm, build, gap, joined

COLOUR = Spec((3, 32, 32), tuple("abcd"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def _undrawn(monkeypatch):
    """Weights of 60 million parameters are not drawn where only their shapes are looked at."""
    monkeypatch.setattr("etude.vision.alexnet.initialise", lambda model, *_: model)
    monkeypatch.setattr("etude.vision.alexnet.Standardise", lambda *_: nn.Identity())


@pytest.mark.usefixtures("_undrawn")
def test_parameter_counts_of_two_towers_and_of_one():  # E30
    with torch.device("meta"):
        two, one = AlexNet(1000), AlexNet(1000, size=224, towers=1, width=64, response_norm=False)
        x = two.features(torch.zeros(1, 3, 227, 227))
    assert (count(two), count(one)) == (60_965_224, 61_100_840)
    assert [c.out_channels for c in two.convolutions()] == [96, 256, 384, 384, 256]
    assert [c.groups for c in two.convolutions()] == [1, 2, 1, 2, 2]
    assert [c.out_channels for c in one.convolutions()] == [64, 192, 384, 256, 256]
    assert all(c.groups == 1 for c in one.convolutions())
    assert x.shape == (1, 256, 6, 6)


@pytest.mark.usefixtures("_undrawn")
def test_the_first_convolution_fits_227_pixels_not_224():  # E30
    with torch.device("meta"):
        model = AlexNet(10)
        first = model.features[0]
        assert (227 - 11) % 4 == 0
        assert (224 - 11) % 4 == 1
        assert first(torch.zeros(1, 3, 227, 227)).shape[2:] == (55, 55)
        sides = []
        x = torch.zeros(1, 3, 227, 227)
        for part in model.features:
            x = part(x)
            sides.append(x.shape[2])
    assert sides == [55, 55, 27, 27, 27, 13, 13, 13, 13, 13, 13, 13, 6]


@pytest.mark.usefixtures("_undrawn")
def test_torchvisions_names():
    with torch.device("meta"):
        one = AlexNet(1000, size=224, towers=1, width=64, response_norm=False).state_dict()
        two = AlexNet(1000).state_dict()
    names = [f"features.{n}.{leaf}" for n in (0, 3, 6, 8, 10) for leaf in ("weight", "bias")]
    names += [f"classifier.{n}.{leaf}" for n in (1, 4, 6) for leaf in ("weight", "bias")]
    assert list(one) == list(two) == names
    assert tuple(one["features.3.weight"].shape) == (192, 64, 5, 5)
    assert tuple(two["features.3.weight"].shape) == (256, 48, 5, 5)
    assert tuple(one["classifier.1.weight"].shape) == (4096, 9216)


def test_response_normalisation_is_the_papers_and_torchs_with_five_times_alpha():
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64).mul(30).requires_grad_()
    y = ResponseNorm(9).double()(x)
    wanted = F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.detach(), local_response(x.detach(), 5, 5e-4, 0.75, 2.0), rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(out, x, slope)[0] for out in (y, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for i in (0, 1, 4, 8):  # the equation of section 3.3, of the maps that exist
            total = sum(float(x[0, j, 1, 2]) ** 2 for j in range(max(0, i - 2), min(8, i + 2) + 1))
            assert float(y[0, i, 1, 2]) == pytest.approx(float(x[0, i, 1, 2]) / (2 + 1e-4 * total) ** 0.75)


def written_out(model, x, towers, norm, overlap, squash, first):
    """Evaluation in float64 with torch's functions; nothing of the module but its weights."""
    state = model.double().state_dict()

    def convolution(x, place, stride, padding, groups):
        weight, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), bias.chunk(groups))
        return squash(torch.cat([F.conv2d(a, w, b, stride, padding) for a, w, b in parts], 1))

    def pooled(x):
        return F.max_pool2d(x, 3, 2) if overlap else F.max_pool2d(x, 2)

    def normed(x):
        return F.local_response_norm(x, 5, 5e-4, 0.75, 2.0) if norm else x

    x = pooled(normed(convolution(x, 0, *first, 1)))
    x = pooled(normed(convolution(x, 3, 1, 2, towers)))
    x = convolution(x, 6, 1, 1, 1)
    x = convolution(x, 8, 1, 1, towers)
    x = pooled(convolution(x, 10, 1, 1, towers)).flatten(1)
    for place in (1, 4):
        x = squash(F.linear(x, state[f"classifier.{place}.weight"], state[f"classifier.{place}.bias"]))
    return F.linear(x, state["classifier.6.weight"], state["classifier.6.bias"])


@pytest.mark.parametrize(("size", "towers", "norm", "overlap", "kind", "first"), [
    (32, 2, True, True, "relu", (1, 2)), (32, 1, True, False, "tanh", (1, 2)),
    (96, 2, False, True, "relu", (4, 0)), (96, 1, False, True, "relu", (4, 2)),
])  # fmt: skip
def test_logits_are_those_of_the_chain_written_out(size, towers, norm, overlap, kind, first):
    torch.manual_seed(0)
    model = AlexNet(4, COLOUR.mean, COLOUR.std, size, towers, 6, 8, kind, norm, overlap).eval()
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    seen = (x - torch.tensor(COLOUR.mean).view(3, 1, 1)) / torch.tensor(COLOUR.std).view(3, 1, 1)
    squash = torch.tanh if kind == "tanh" else F.relu
    wanted = written_out(model, seen, towers, norm, overlap, squash, first)
    torch.testing.assert_close(model.double()(x), wanted, rtol=1e-6, atol=1e-8)


def test_pooling_overlaps():
    windows = [m for m in AlexNet(4, size=32, width=6, dense=4).modules() if isinstance(m, nn.MaxPool2d)]
    assert [(m.kernel_size, m.stride) for m in windows] == [((3, 3), (2, 2))] * 3


def test_larger_images_are_pooled_to_six_by_six():
    model = AlexNet(3, size=259, towers=1, width=3, dense=2, response_norm=False).eval()
    x = torch.rand(1, 3, 259, 259)
    features = model.features(model.standardise(x))
    assert features.shape == (1, 12, 7, 7)
    torch.testing.assert_close(model(x), model.classifier(F.adaptive_avg_pool2d(features, 6).flatten(1)))


def test_two_towers_are_one_network_with_zeros_between_them_and_no_other():  # E30
    torch.manual_seed(0)
    model = AlexNet(4, size=32, width=6, dense=8).double().eval()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    same, merged = (joined(model, between).double() for between in (0.0, 1.0))
    torch.testing.assert_close(same(x), model(x), rtol=1e-12, atol=1e-12)
    assert gap(model, same, x) < 1e-12
    assert gap(model, merged, x) == pytest.approx(
        float((merged(x).softmax(1) - model(x).softmax(1)).detach().abs().max())
    )
    assert gap(model, merged, x) > 1e-3
    for whole in (same, merged):
        assert [c.groups for c in whole.convolutions()] == [1] * 5
        assert count(whole) > count(model)
    second = merged.convolutions()[1].weight
    assert torch.equal(second[:, :3], second[:, 3:])  # three of the six maps stand in each tower
    assert torch.equal(second[:, :3], model.convolutions()[1].weight)
    half = joined(model, 0.5).convolutions()[1].weight
    torch.testing.assert_close(half[:8, 3:], 0.5 * half[:8, :3])
    torch.testing.assert_close(half[8:, :3], 0.5 * half[8:, 3:])
    assert model.convolutions()[1].groups == 2  # the network itself stays


def test_frozen_convolutions_and_refusals():
    model = build(Config(width=6, dense=4, freeze=2), COLOUR)["model"]
    stays = {name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert stays == {"features.0", "features.3"}
    for settings, said in (
        ({"freeze": 6}, "more than the 5 convolutions"), ({"width": 8}, "take a multiple of 6, or --towers 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            build(Config(**settings), COLOUR)
    assert build(Config(width=8, dense=4, towers=1), COLOUR)
    with pytest.raises(UserError, match="take --size 32 or more"):
        build(Config(), Spec((3, 31, 31), tuple("ab"), (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize(("towers", "asked", "found"), [(2, None, 2), (1, None, 0), (1, True, 2), (2, False, 0)])
def test_responses_are_normalised_in_two_towers_unless_asked_otherwise(towers, asked, found):
    model = build(Config(towers=towers, response_norm=asked, width=6, dense=4), COLOUR)["model"]
    assert sum(isinstance(part, ResponseNorm) for part in model.modules()) == found


def test_published_weights_fit(tmp_path):
    assert published.REGISTRY["alexnet-imagenet"].file == "alexnet-owt-7be5be79.pth"
    torch.manual_seed(0)
    source = AlexNet(4, size=32, towers=1, width=6, dense=4)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    weights = published.read(str(tmp_path / "w.pth"))
    other = AlexNet(3, size=32, towers=1, width=6, dense=4)
    assert not published.fill(other, weights, LAST)  # another number of classes: the last layer is fresh
    assert torch.equal(other.features[10].weight, source.features[10].weight)
    with pytest.raises(UserError, match=r"of another network: its features\.3\.weight is"):
        published.fill(AlexNet(4, size=32, towers=2, width=6, dense=4), weights, LAST)
