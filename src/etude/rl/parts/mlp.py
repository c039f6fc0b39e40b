"""An MLP with ReLU forwards and backwards, written out: the layers are views of one vector, nothing is recorded."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
    """Input, every hidden layer after ReLU, and output of the MLP: (N, width) each."""
    kept = [x]
    for weight, bias in layers[:-1]:
        kept.append(torch.addmm(bias, kept[-1], weight.t()).relu_())
    weight, bias = layers[-1]
    return [*kept, torch.addmm(bias, kept[-1], weight.t())]


def backward(layers: list[tuple[Tensor, Tensor]], kept: list[Tensor], delta: Tensor, out: list[tuple[Tensor, Tensor]]):
    """Write ∂L/∂φ into `out` (same views as `layers`), given ∂L/∂output `delta` (N, outputs) and the activations."""
    for index in reversed(range(len(layers))):
        torch.mm(delta.t(), kept[index], out=out[index][0])
        torch.sum(delta, 0, out=out[index][1])
        if index:
            delta = torch.mm(delta, layers[index][0]).mul_(kept[index].sign())  # sign of a ReLU's output is its slope
