"""Nulls of the vision methods: what stands in a method's file while a control of an experiment runs"""

from __future__ import annotations

from typing import Any

from torch import nn

from etude.vision.lenet import LeNet, ScaledTanh


def linear(*settings: Any, **named: Any) -> LeNet:
    """LeNet without its squashing functions, pooling by means: as many layers and weights, one linear map in all."""
    network = LeNet(*settings, **named)
    for chain in (network.features, network.classifier):
        for place, part in enumerate(chain):
            if isinstance(part, (nn.ReLU, ScaledTanh)):
                chain[place] = nn.Identity()
            elif isinstance(part, nn.MaxPool2d):
                chain[place] = nn.AvgPool2d(2)
    return network
