"""EfficientNet-Lite0: inverted bottlenecks with ReLU6, the ImageNet network small enough to come in a Python package

Paper: Tan, Le, EfficientNet, 2019, arXiv:1905.11946, table 1; the Lite variant (no squeeze-and-excitation, ReLU6 for swish, a
    stem and a head that are not scaled) is of TensorFlow's `tpu/models/official/efficientnet/lite`.

The names of the weights are those of `efficientnet_lite_pytorch`, so its files load as they are. Convolutions are padded as
TensorFlow's SAME pads at 224 pixels: one row or column more at the bottom and on the right where the stride is 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.nn.norm import Standardise

# repeats, kernel, stride, expansion, maps
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


class Conv(nn.Conv2d):
    """A convolution without bias, (N, C, H, W) → (N, D, ⌈H/s⌉, ⌈W/s⌉) for even H and W."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        even = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, even, groups=groups, bias=False)
        low = (kernel - stride) // 2
        self.rim = (low, kernel - stride - low) * 2 if stride > 1 else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.rim is None else F.pad(input, self.rim))


def _norm(maps: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(maps, eps=1e-3, momentum=0.01)


class Bottleneck(nn.Module):
    """1×1 to `expansion` times the maps, k×k on each map by itself, 1×1 to `outputs`; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = Conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = Conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = Conv(wide, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expands:
            y = F.hardtanh(self._bn0(self._expand_conv(y)), 0.0, 6.0)
        y = F.hardtanh(self._bn1(self._depthwise_conv(y)), 0.0, 6.0)
        y = self._bn2(self._project_conv(y))
        return y + x if self.skips else y


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W), uint8 or float in [0, 1], made for 224 × 224 → logits (N, classes); 4,652,008 parameters of 1,000."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.standardise = Standardise(MEAN, STD)
        self._conv_stem, self._bn0 = Conv(3, 32, 3, 2), _norm(32)
        self._blocks, inputs = nn.ModuleList(), 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for number in range(repeats):
                self._blocks.append(Bottleneck(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self._conv_head, self._bn1 = Conv(inputs, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self._bn0(self._conv_stem(self.standardise(x))), 0.0, 6.0)
        for block in self._blocks:
            x = block(x)
        x = F.hardtanh(self._bn1(self._conv_head(x)), 0.0, 6.0)
        return self._fc(torch.flatten(x.mean((2, 3)), 1))
