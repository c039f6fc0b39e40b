"""ResNet against the paper's counts, Hugging Face's networks, published weights and the identity it can be."""

import hashlib
import io
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etude import data as room
from etude.blocks.classifying import published
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data import cifar
from etude.data.registry import CIFAR
from etude.vision.parts.augmented import bordered, cut
from etude.vision.resnet import Config, ResNet, build, renamed, slopes, spread, widened


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("depth", "classes", "wanted"), [
    (20, 10, 269_722), (56, 10, 853_018), (18, 1000, 11_689_512), (50, 1000, 25_557_032),
    *(pytest.param(*row, marks=pytest.mark.long) for row in (
        (110, 10, 1_727_962), (34, 1000, 21_797_672), (101, 1000, 44_549_160), (152, 1000, 60_192_808),
    )),
])  # fmt: skip
def test_parameter_counts(depth, classes, wanted):
    assert count(ResNet(depth, classes)) == wanted


def test_layers_with_weights_are_the_name():
    for depth in (20, 18, 50):
        model = ResNet(depth, 10, shortcut="projection")
        layers = [
            n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n
        ]
        assert len(layers) == depth


def test_down_sampling_is_by_strides_in_the_first_wide_convolution():  # E33
    small, large, deep = ResNet(20, 10), ResNet(18, 10), ResNet(50, 10)
    assert [[b.conv1.stride[0], b.conv2.stride[0]] for b in small.blocks()] == [[1, 1]] * 3 + (
        [[2, 1]] + [[1, 1]] * 2
    ) * 2
    assert [b.conv1.stride[0] for b in large.blocks()] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [[b.conv1.kernel_size[0], b.conv2.kernel_size[0], b.conv3.kernel_size[0]] for b in deep.blocks()] == [
        [1, 3, 1]
    ] * 16
    assert [b.conv2.stride[0] for b in deep.blocks()][:4] == [1, 1, 1, 2]
    assert all(b.conv1.stride == (1, 1) for b in deep.blocks())
    x = torch.zeros(1, 3, 224, 224)
    assert large.eval().features(x).shape == (1, 512, 7, 7)
    assert small.eval().features(x[..., :32, :32]).shape == (1, 64, 8, 8)
    assert sum(isinstance(m, nn.MaxPool2d) for m in large.modules()) == 1
    assert [tuple(m.weight.shape) for m in large.modules() if isinstance(m, nn.Linear)] == [(10, 512)]


def test_torchvisions_names():
    names = set(ResNet(18, 10).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer4.1.bn2.bias", "fc.bias"} <= names
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean"} <= names
    assert not any(name.startswith(("standardise", "layer1.0.downsample")) for name in names)
    assert "layer1.0.downsample.1.weight" in ResNet(50, 10).state_dict()


@pytest.mark.long  # importing takes five seconds
@pytest.mark.parametrize(("depth", "kind"), [(18, "basic"), (50, "bottleneck")])
def test_logits_are_hugging_faces(depth, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    wide = [256, 512, 1024, 2048] if depth == 50 else [64, 128, 256, 512]
    config = transformers.ResNetConfig(
        hidden_sizes=wide, depths=[3, 4, 6, 3] if depth == 50 else [2] * 4, layer_type=kind, num_labels=7
    )
    theirs = transformers.ResNetForImageClassification(config).double().eval()
    for name, value in theirs.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    mine = ResNet(depth, 7, (0.0,) * 3, (1.0,) * 3).double().eval()
    assert published.fill(mine, published.Weights(renamed(theirs.state_dict()), None, "theirs"), "fc")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x).logits, rtol=1e-9, atol=1e-9)


def test_a_block_is_the_sum_written_out_in_float64():
    torch.manual_seed(0)
    block = ResNet(20, 10).double().layer2[0]
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    y = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
    y = F.relu(F.batch_norm(y, None, None, block.bn1.weight, block.bn1.bias, True))
    y = F.conv2d(y, block.conv2.weight, padding=1)
    y = F.batch_norm(y, None, None, block.bn2.weight, block.bn2.bias, True)
    old = torch.zeros(2, 32, 3, 3, dtype=torch.float64)
    old[:, 8:24] = x[:, :, ::2, ::2]  # option A: the new maps are zero, half of them on each side
    torch.testing.assert_close(block(x), F.relu(y + old), rtol=1e-12, atol=1e-12)
    assert torch.equal(widened(x, 32, 2), old)


def test_a_bottleneck_is_the_sum_written_out_in_float64():
    torch.manual_seed(0)
    block = ResNet(50, 10).double().layer2[0].eval()
    x = torch.randn(1, 256, 4, 4, dtype=torch.float64)
    scale = 1 / (1 + 1e-5) ** 0.5  # fresh running statistics: mean 0, variance 1
    y = F.relu(F.conv2d(x, block.conv1.weight) * scale)
    y = F.relu(F.conv2d(y, block.conv2.weight, stride=2, padding=1) * scale)
    y = F.conv2d(y, block.conv3.weight) * scale
    across = F.conv2d(x, block.downsample[0].weight, stride=2) * scale
    torch.testing.assert_close(block(x), F.relu(y + across), rtol=1e-12, atol=1e-12)


def test_without_the_shortcut_it_is_the_plain_network():
    torch.manual_seed(0)
    model = ResNet(8, 10, shortcut="none").eval()
    assert count(model) == count(ResNet(8, 10))  # option A has no weights either
    x = torch.rand(2, 3, 8, 8)
    y = F.relu(model.bn1(model.conv1(model.standardise(x))))
    for block in model.blocks():
        y = F.relu(block.bn1(block.conv1(y)))
        y = F.relu(block.bn2(block.conv2(y)))
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))


def test_zero_init_makes_every_block_the_identity():
    torch.manual_seed(0)
    model = ResNet(20, 10, zero_init=True)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(model.layer1(x), x)
    assert all(bool((block.last().weight == 0).all()) for block in model.blocks())
    assert not torch.equal(ResNet(20, 10).layer1(x), x)


def test_gradients_by_depth():
    """Through 32 plain layers with normalisation the gradient grows by a constant factor a layer; shortcuts prevent it."""
    found = {}
    for kind in ("padding", "none"):
        torch.manual_seed(0)
        model = ResNet(32, 10, shortcut=kind)
        F.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8)).backward()
        norms = slopes(model)
        assert len(norms) == 16
        assert norms[3] == pytest.approx(float(model.blocks()[2].conv1.weight.grad.norm()))
        found[kind] = spread(norms)
    assert found["padding"] < 8  # measured 3.5
    assert found["none"] > 12  # measured 33
    assert spread(torch.tensor([0.0, 2.0, 8.0])) == 4


def test_frozen_parts_stay_in_evaluation():
    spec = Spec((3, 8, 8), tuple("ab"), (0.5,) * 3, (0.5,) * 3)
    model = build(Config(depth=8, freeze=2), spec)["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(4, 3, 8, 8)).sum().backward()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"layer2", "layer3", "fc"}
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"layer2", "layer3"}  # running statistics
    with pytest.raises(UserError, match="more than the 4 parts"):
        build(Config(depth=8, freeze=5), spec)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_a_window_is_the_slice_of_the_bordered_image():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    whole = bordered(x, 2, (0.0, 0.5, 1.0))
    assert torch.equal(whole[:, 2:-2, 2:-2].permute(0, 3, 1, 2), x)
    assert whole[0, 0, 0].tolist() == [0, 128, 255]  # E26: the border is the mean pixel
    index, top, left, turned = torch.tensor([[4, 0, 4], [0, 4, 2], [1, 3, 2], [0, 1, 0]])
    found = cut(whole, index, top, left, turned, 6, 4)
    for row in range(3):
        t, at = int(top[row]), int(left[row])
        wanted = whole[index[row], t : t + 6, at : at + 4].permute(2, 0, 1)
        assert torch.equal(found[row], wanted.flip(-1) if turned[row] else wanted)
    assert torch.equal(found[2], x[4])
    assert found.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------ published weights

needs_weights = pytest.mark.skipif(not os.environ.get("ETUDE_DATA"), reason="ETUDE_DATA is not set: published weights")


def hits(name: str, depth: int, x: torch.Tensor, y: torch.Tensor) -> float:
    weights = published.read(name)
    model = ResNet(depth, 10, *weights.moments).eval()
    assert published.fill(model, published.Weights(renamed(weights.state), weights.moments, name), "fc")
    with torch.no_grad():
        return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250))) / len(y)


def lossless() -> tuple[torch.Tensor, torch.Tensor]:
    x, y, _ = cifar.partial(room.home() / "cifar10", "")
    return torch.from_numpy(x[:1000].copy()), torch.from_numpy(y[:1000].astype(np.int64))


def lossy() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 100 JPEG test images of each class."""
    from PIL import Image

    x, y = [], []
    with tarfile.open(room.home() / "cifar10" / cifar.JPEG) as archive:
        for member in archive:
            found = re.fullmatch(r"(?:\./)?test/(\w+)/00(\d\d)\.jpg", member.name)
            if found and (file := archive.extractfile(member)):
                x.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).transpose(2, 0, 1))
                y.append(CIFAR.index(found[1]))
    assert len(y) == 1000
    return torch.from_numpy(np.stack(x)), torch.tensor(y)


@needs_weights
def test_published_resnet20_is_as_good_as_said():
    x, y = lossless()
    assert hits("resnet20-cifar10", 20, x[:300], y[:300]) >= 0.99  # 0.999 of the first 1,000


@needs_weights
@pytest.mark.long
@pytest.mark.parametrize(("name", "depth", "clean", "jpeg"), [
    ("resnet20-cifar10", 20, 0.999, 0.804), ("resnet56-cifar10", 56, 1.0, 0.825)
])  # fmt: skip
def test_published_accuracies(name, depth, clean, jpeg):
    assert hits(name, depth, *lossless()) == clean
    assert hits(name, depth, *lossy()) == jpeg


def test_registry_says_what_its_files_are():
    for name, entry in published.REGISTRY.items():
        assert entry.source.startswith("https://"), name
        assert entry.licence, name
        assert len(entry.sha256) in (8, 64), name
        assert entry.sha256[:8] in entry.file, name


def test_weights_are_read_or_refused_in_a_sentence(tmp_path, monkeypatch):
    state = {f"module.{name}": value for name, value in ResNet(8, 4).state_dict().items()}
    torch.save({"state_dict": state, "best": 1.0}, tmp_path / "w.th")
    read = published.read(str(tmp_path / "w.th"))
    assert "conv1.weight" in read.state
    assert published.fill(ResNet(8, 4), read, "fc")
    torch.manual_seed(1)
    other = ResNet(8, 3)
    drawn = other.fc.weight.clone()
    assert not published.fill(other, read, "fc")  # another number of classes: the last layer is fresh
    assert torch.equal(other.fc.weight, drawn)
    assert torch.equal(other.layer3[0].conv2.weight, read.state["layer3.0.conv2.weight"])
    for depth, said in ((14, "w.th has no layer1.1.conv1.weight"), (18, "is of another network")):
        with pytest.raises(UserError, match=said):
            published.fill(ResNet(depth, 4), read, "fc")
    torch.save([1, print], tmp_path / "bad.pth")
    for source, said in (
        (str(tmp_path / "bad.pth"), "cannot be read"), (str(tmp_path), "neither a run nor a folder"),
        ("resnet21", "no file, run or published name"), ("qqq", r"published name\. Known: "),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            published.read(source)
    with pytest.raises(UserError, match="holds something else than tensors, which is not run"):
        published.read(str(tmp_path / "bad.pth"))
    for content, said in (
        (b"hello" * 100, r"cannot be read as a file of weights \([A-Za-z]"),
        (b"", "cannot be read .*EOFError"),
    ):
        (tmp_path / "junk.pth").write_bytes(content)
        with pytest.raises(UserError, match=said):
            published.read(str(tmp_path / "junk.pth"))
    plain = torch.ones(2, 2)
    for odd in (plain.to_sparse(), plain.to(torch.complex64), plain.to("meta")):
        torch.save({"fc.weight": odd}, tmp_path / "odd.pth")
        with pytest.raises(UserError, match="its fc.weight is no plain tensor of real numbers"):
            published.read(str(tmp_path / "odd.pth"))
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="put resnet20-12fca82f.th there, from https"):
        published.read("resnet20-cifar10")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet20-12fca82f.th").write_bytes((tmp_path / "w.th").read_bytes())
    digest = hashlib.sha256((tmp_path / "w.th").read_bytes()).hexdigest()[:8]
    with pytest.raises(UserError, match=f"not the published file .its SHA-256 begins {digest}"):
        published.read("resnet20-cifar10")


def test_a_file_that_lacks_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    """`models/none` could be a hub's name; where there is a folder `models` it is a file that is not there."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(published, "_from_hub", lambda name: asked.append(name) or tmp_path / "none")
    with pytest.raises(UserError, match="models/none is no file, run or published name"):
        published.read("models/none")
    assert not asked
    with pytest.raises(UserError, match="cannot be read"):
        published.read("somebody/none")
    assert asked == ["somebody/none"]
