"""Receptive fields by arithmetic: the boxes in which the gradient lives, for networks of every form; crops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.insight.parts.fields import field
from etude.vision.lenet import LeNet
from etude.vision.resnet import ResNet


class Branches(nn.Module):
    """Padding of its own, a slice as a shortcut, dilation, and two branches that see differently."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3, 2, 0), nn.Conv2d(2, 3, (1, 5), 2, (0, 2))
        self.three = nn.Conv2d(3, 3, 3, dilation=2, padding=2)
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.pad(x, (0, 1, 0, 1))) + self.two(x)
        y = y + x.mean(1, keepdim=True)[:, :, ::2, ::2]
        return self.end(F.softplus(self.three(y)))


def smooth(network: nn.Module) -> nn.Module:
    """Nothing that can hide a pixel: mean pooling for max pooling."""
    for name, part in list(network.named_modules()):
        if isinstance(part, nn.MaxPool2d):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.AvgPool2d(part.kernel_size, part.stride, part.padding))
    return network


CASES = {
    "lenet": (lambda: LeNet(10), (1, 28, 28), "features.3"),
    "a pool": (lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 3, 1), nn.MaxPool2d(3, 2, 1)), (1, 31, 26), "1"),
    "residual": (lambda: ResNet(8, 10), (3, 32, 32), "layer2.0.conv2"),
    "a residual stem": (lambda: ResNet(18, 10), (3, 64, 64), "layer2.0.conv1"),
    "branches": (Branches, (2, 20, 24), "end"),
}


def support(model: nn.Module, name: str, x: Tensor, i: int, j: int) -> list[int]:
    """The box of the pixels on which any map of a place depends, by autograd."""
    made: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _part, _given, out: made.append(out))
    leaf = x.clone().requires_grad_()
    model(leaf)
    handle.remove()
    (gradient,) = torch.autograd.grad((made[0][0, :, i, j] * torch.rand(made[0].shape[1])).sum(), leaf)
    rows, columns = (gradient[0].abs().sum((0, k)).nonzero().flatten() for k in (2, 1))
    return [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]


@pytest.mark.parametrize("case", CASES)
def test_box_is_the_gradients_support(case: str) -> None:
    """Tight for generic weights where nothing hides a pixel (mean pooling, softplus for ReLU), never too small with max and ReLU."""
    make, shape, name = CASES[case]
    x = torch.rand(1, *shape)
    model = make().eval()
    of = field(model, x, name)
    made: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _part, _given, out: made.append(out))
    model(x)
    handle.remove()
    h, w = made[0].shape[2:]
    soft = smooth(make()).eval()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for k in soft.parameters():
            k.copy_(torch.rand_like(k) * 0.1 + 0.01)  # positive: no two paths cancel
        patch.setattr(F, "relu", lambda y, inplace=False: F.softplus(y))
        patch.setattr(nn.ReLU, "forward", lambda self, y: F.softplus(y))
        with torch.enable_grad():
            for i, j in ((0, 0), (h // 2, w // 2), (h - 1, w - 1), (h - 1, 0)):
                top, bottom, left, right = of.box(i, j)
                box = [max(top, 0), min(bottom, shape[1]), max(left, 0), min(right, shape[2])]
                assert support(soft, name, x, i, j) == box
    inside = support(model, name, x, h // 2, w // 2)
    box = of.box(h // 2, w // 2)
    assert box[0] <= inside[0] < inside[1] <= box[1]
    assert box[2] <= inside[2] < inside[3] <= box[3]


def test_known_fields() -> None:
    """LeNet's C3 sees 14 pixels of each axis in steps of 2 (5 + 1 + 4·2); a dense layer sees the image."""
    of = field(LeNet(10), torch.rand(1, 1, 28, 28), "features.3")
    assert of.down == of.across == (2, -2.0, 11.0)
    assert of.box(0, 9) == (-2, 12, 16, 30)
    assert field(LeNet(10), torch.rand(1, 1, 28, 28), "").box(0, 0) == (0, 28, 0, 28)


def test_crop_fills_what_lies_outside() -> None:
    image = torch.arange(28.0 * 28).view(1, 28, 28)
    of = field(LeNet(10), torch.rand(1, 1, 28, 28), "features.3")
    crop = of.crop(image, 0, 9, torch.tensor([-5.0]))
    wide = F.pad(image, (2, 2, 2, 2), value=-5.0)
    assert torch.equal(crop, wide[:, 0:14, 18:32])
