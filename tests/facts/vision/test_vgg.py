"""VGG against the paper's and torchvision's counts, names, and the chain written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etude.blocks.classifying import published
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.vision.vgg import LAST, VGG, Config, build, first_dense_share

COLOUR = Spec((3, 32, 32), tuple("abcd"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def _undrawn(monkeypatch):
    """Weights of 140 million parameters are not drawn where only their shapes are looked at."""
    monkeypatch.setattr("etude.vision.vgg.initialise", lambda model, *_: model)
    monkeypatch.setattr("etude.vision.vgg.Standardise", lambda *_: nn.Identity())


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(("depth", "plain", "normalised"), [
    (16, 138_357_544, 138_365_992),
    *(pytest.param(*row, marks=pytest.mark.long) for row in (
        (11, 132_863_336, 132_868_840), (13, 133_047_848, 133_053_736), (19, 143_667_240, 143_678_248),
    )),
])  # fmt: skip
def test_parameter_counts_are_torchvisions(depth, plain, normalised):
    with torch.device("meta"):
        model, other = VGG(depth, 1000), VGG(depth, 1000, normalizer="batch")
    assert (count(model), count(other)) == (plain, normalised)
    if depth == 16:  # E31
        assert count(model.classifier[0]) == 102_764_544
        assert first_dense_share(model) == pytest.approx(0.7427, abs=5e-5)
        assert model.avgpool(torch.zeros(1, 2, 7, 7)).shape == (1, 2, 7, 7)


def test_layers_with_weights_are_the_name_and_stages_have_their_convolutions():  # E31
    stages = {11: "11222", 13: "22222", 16: "22333", 19: "22444", 8: "11111"}
    for depth, wanted in stages.items():
        model = VGG(depth, 10, size=32, width=2, dense=4)
        assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
        counts, widths = [0], []
        for part in model.features:
            if isinstance(part, nn.Conv2d):
                counts[-1] += 1
                widths.append(part.out_channels)
                assert part.kernel_size == (3, 3)
                assert part.padding == part.stride == (1, 1)
            elif isinstance(part, nn.MaxPool2d):
                counts.append(0)
        assert "".join(map(str, counts[:-1])) == wanted
        assert sorted(set(widths)) == [2, 4, 8, 16]


@pytest.mark.usefixtures("_undrawn")
def test_torchvisions_names():
    with torch.device("meta"):
        plain, normalised = VGG(16, 1000).state_dict(), VGG(16, 1000, normalizer="batch").state_dict()
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    wanted = [f"features.{n}.{leaf}" for n in places for leaf in ("weight", "bias")]
    wanted += [f"classifier.{n}.{leaf}" for n in (0, 3, 6) for leaf in ("weight", "bias")]
    assert list(plain) == wanted
    assert {"features.0.weight", "features.1.running_var", "features.3.weight", "features.40.weight"} <= set(normalised)
    assert "features.41.num_batches_tracked" in normalised
    assert "features.44.weight" not in normalised
    assert tuple(plain["features.28.weight"].shape) == (512, 512, 3, 3)
    assert tuple(plain["classifier.0.weight"].shape) == (4096, 25088)


def chain(model, x, depth, normalised):
    """Evaluation written out in float64; nothing of the module but its weights."""
    state, place = model.double().state_dict(), 0
    counts = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}[depth]
    for number in counts:
        for _ in range(number):
            x = F.conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1)
            place += 1
            if normalised:
                leaves = ("running_mean", "running_var", "weight", "bias")
                x = F.batch_norm(x, *(state[f"features.{place}.{leaf}"] for leaf in leaves))
                place += 1
            x, place = x.clamp(min=0), place + 1
        x, place = F.max_pool2d(x, 2), place + 1
    x = x.flatten(1)
    for number in (0, 3, 6):
        x = F.linear(x, state[f"classifier.{number}.weight"], state[f"classifier.{number}.bias"])
        x = x.clamp(min=0) if number < 6 else x
    return x


@pytest.mark.parametrize(("depth", "size", "normalizer"), [(11, 32, "batch"), (16, 64, "none")])
def test_logits_are_those_of_the_chain_written_out(depth, size, normalizer):
    torch.manual_seed(0)
    model = VGG(depth, 4, COLOUR.mean, COLOUR.std, size, 3, 8, normalizer).eval()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    seen = (x - torch.tensor(COLOUR.mean).view(3, 1, 1)) / torch.tensor(COLOUR.std).view(3, 1, 1)
    torch.testing.assert_close(
        model.double()(x), chain(model, seen, depth, normalizer == "batch"), rtol=1e-6, atol=1e-8
    )


def test_larger_images_are_pooled_to_seven_by_seven():
    torch.manual_seed(0)
    model = VGG(8, 3, size=256, width=1, dense=2).eval()
    x = torch.rand(1, 3, 256, 256)
    features = model.features(model.standardise(x))
    assert features.shape == (1, 8, 8, 8)
    pooled = F.adaptive_avg_pool2d(features, 7)
    torch.testing.assert_close(model(x), model.classifier(pooled.flatten(1)))


def test_three_small_kernels_see_as_much_as_one_of_seven_with_fewer_weights():
    width = 6
    three = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3)))
    one = nn.Conv2d(width, width, 7, padding=3, bias=False)
    fields = []
    for network in (three, one):
        x = torch.zeros(1, width, 15, 15, requires_grad=True)
        network(x)[0, 0, 7, 7].backward()
        touched = x.grad[0].abs().sum(0).nonzero()
        fields.append((touched.max(0).values - touched.min(0).values + 1).tolist())
    assert fields == [[7, 7], [7, 7]]
    assert (count(three), count(one)) == (27 * width**2, 49 * width**2)


def test_the_papers_initialiser_is_too_small_for_deep_networks():
    spread = {}
    for kind in ("he", "paper"):
        torch.manual_seed(0)
        model = VGG(16, 4, size=32, width=8, dense=16, initializer=kind).eval()
        assert float(model.features[2].weight.detach().std()) == pytest.approx(
            0.01 if kind == "paper" else (2 / 72) ** 0.5, rel=0.1
        )
        assert float(model.classifier[3].weight.detach().std()) == pytest.approx(
            0.01 if kind == "paper" else (2 / 16) ** 0.5, rel=0.2
        )
        with torch.no_grad():
            spread[kind] = float(model(torch.rand(8, 3, 32, 32)).std(0).mean())
    assert spread["paper"] < 1e-10 < 1e-3 < spread["he"]


def test_frozen_stages_stay_in_evaluation():
    model = build(Config(depth=11, width=2, dense=4, freeze=3), COLOUR)["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    learned = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert not learned & set(convolutions[:4])
    assert set(convolutions[4:]) < learned
    moved = {
        name.rpartition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    norms = [n for n, m in model.named_modules() if n.startswith("features.") and "BatchNorm" in type(m).__name__]
    assert moved == set(norms[4:])  # running statistics
    for freeze, size, said in ((6, 32, "more than the 5 stages"), (0, 31, "take --size 32 or more")):
        with pytest.raises(UserError, match=said):
            build(Config(freeze=freeze), Spec((3, size, size), tuple("ab"), (0.5,) * 3, (0.5,) * 3))


def test_published_names_are_known_and_weights_fit(tmp_path):
    names = [name for name in published.REGISTRY if name.startswith("vgg")]
    assert sorted(names) == sorted(f"vgg{d}{bn}-imagenet" for d in (11, 13, 16, 19) for bn in ("", "-bn"))
    torch.manual_seed(0)
    source = VGG(11, 4, size=32, width=2, dense=4)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    weights = published.read(str(tmp_path / "w.pth"))
    other = VGG(11, 3, size=32, width=2, dense=4)
    assert not published.fill(other, weights, LAST)  # another number of classes: the last layer is fresh
    assert torch.equal(other.features[3].weight, source.features[3].weight)
    with pytest.raises(UserError, match="of another network: its classifier.0.weight is"):
        published.fill(VGG(11, 4, size=64, width=2, dense=4), weights, LAST)
    with pytest.raises(UserError, match="has no features"):
        published.fill(VGG(11, 4, size=32, width=2, dense=4, normalizer="batch"), weights, LAST)
