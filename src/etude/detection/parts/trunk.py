"""The convolutional trunk that the detectors share: halve the picture three to five times, double the channels

Each layer is a 3 × 3 convolution, batch normalisation and a leaky ReLU of slope 0.1 (Darknet's).
"""

from __future__ import annotations

from torch import nn

from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.core.spec import Spec

HALVINGS = {8: 3, 16: 4, 32: 5}
"""Strided layers by the total stride."""


def layer(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution that keeps the size (or halves it), batch normalisation, leaky ReLU; He's initial weights."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, a=0.1, mode="fan_in", nonlinearity="leaky_relu")
    return nn.Sequential(convolution, BatchNorm(outputs), nn.LeakyReLU(0.1, inplace=True))


class Trunk(nn.Module):
    """Pictures (N, C, S, S), uint8 or float in [0, 1] → features (N, `channels`, S/stride, S/stride).

    The first layer has `width` channels and every halving doubles them; `deeper` layers follow at the last resolution.
    """

    def __init__(self, spec: Spec, width: int, stride: int, deeper: int = 1) -> None:
        super().__init__()
        layers, inputs = [], spec.shape[0]
        for halving in range(HALVINGS[stride]):
            layers.append(layer(inputs, width << halving, 2))
            inputs = width << halving
        layers += [layer(inputs, inputs) for _ in range(deeper)]
        self.channels = inputs
        self.standardise = Standardise(spec.mean, spec.std)
        self.layers = nn.Sequential(*layers)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.layers(self.standardise(x))
