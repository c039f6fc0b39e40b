"""MLPs forwards and backwards, written out: small networks cost dispatches, and a recorded graph doubles them.

`activations` and `backward`: ReLU, the layers are views of one vector. `followed` and `backed`: linear layers and tanh as torch's
modules, gradients into their ``.grad``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def followed(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Input (N, D) and what leaves every linear layer (after its tanh, if one follows)."""
    kept = [x]
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            kept.append(torch.addmm(layer.bias, kept[-1], layer.weight.t()))
        elif isinstance(layer, nn.Tanh):
            kept[-1].tanh_()
    return kept


def backed(net: nn.Module, kept: list[Tensor], delta: Tensor, onward: bool) -> Tensor:
    """Write ∂L/∂θ of every linear layer into its .grad, given ∂L/∂output `delta` (N, outputs); `onward`: return ∂L/∂x."""
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Tanh))]
    place = len(kept) - 1
    for layer in reversed(layers):
        if isinstance(layer, nn.Tanh):
            delta = torch.ops.aten.tanh_backward(delta, kept[place])
            continue
        torch.mm(delta.t(), kept[place - 1], out=layer.weight.grad)
        torch.sum(delta, 0, out=layer.bias.grad)
        place -= 1
        if place or onward:
            delta = torch.mm(delta, layer.weight)
    return delta
