"""MLPs forwards and backwards, written out: small networks cost dispatches, and a recorded graph doubles them.

`activations`, `backward` and `input_slope`: ReLU, the layers are pairs of tensors (views of one vector).
`followed` and `backed`: linear layers, convolutions, tanh and ReLU as torch's modules, gradients into their ``.grad``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude.rl.parts.pixels import CONVOLUTIONS, Bytes, floats


def activations(layers: list[tuple[Tensor, Tensor]], x: Tensor, out: Tensor | None = None) -> list[Tensor]:
    """Input, every hidden layer after ReLU, and output of the network: (N, width) each; `out`: where the last is written.

    Layers whose weights have four axes are the convolutions of `pixels`, in their order, for images (N, C, H, W).
    """
    kept = [floats(x, layers[0][0].dtype)]
    for index, (weight, bias) in enumerate(layers[:-1]):
        if weight.dim() == 4:
            kept.append(torch.conv2d(kept[-1], weight, bias, CONVOLUTIONS[index][2]).relu_())
        else:
            kept.append(torch.addmm(bias, kept[-1].flatten(1), weight.t()).relu_())
    weight, bias = layers[-1]
    return [*kept, torch.addmm(bias, kept[-1].flatten(1), weight.t(), out=out)]


def backward(layers: list[tuple[Tensor, Tensor]], kept: list[Tensor], delta: Tensor, out: list[tuple[Tensor, Tensor]]):
    """Write ∂L/∂φ into `out` (same views as `layers`), given ∂L/∂output `delta` (N, outputs) and the activations."""
    for index in reversed(range(len(layers))):
        weight, below = layers[index][0], kept[index]
        if weight.dim() == 4:
            kind = ([len(weight)], [CONVOLUTIONS[index][2]] * 2, [0, 0], [1, 1], False, [0, 0], 1)
            found = torch.ops.aten.convolution_backward(delta, below, weight, *kind, [index > 0, True, True])
            for place, value in zip(out[index], found[1:]):
                place.copy_(value)
            delta = found[0]
        else:
            torch.mm(delta.t(), below.flatten(1), out=out[index][0])
            torch.sum(delta, 0, out=out[index][1])
            if index:
                delta = torch.mm(delta, weight).view_as(below)
        if index:
            delta = torch.ops.aten.threshold_backward(delta, below, 0)  # ReLU


def input_slope(layers: list[tuple[Tensor, Tensor]], kept: list[Tensor], delta: Tensor) -> Tensor:
    """∂L/∂x (N, D), given ∂L/∂output `delta` (N, outputs) and the activations; the layers learn nothing from it."""
    for index in reversed(range(len(layers))):
        delta = torch.mm(delta, layers[index][0])
        if index:
            delta.mul_(kept[index].sign())
    return delta


def followed(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Input (N, D) or images (N, C, H, W), and what leaves every layer with weights (after its tanh or ReLU, if one follows)."""
    kept = [x]
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            kept.append(torch.addmm(layer.bias, kept[-1].flatten(1), layer.weight.t()))
        elif isinstance(layer, nn.Tanh):
            kept[-1].tanh_()
        elif isinstance(layer, nn.Conv2d):
            kept.append(layer(kept[-1]))
        elif isinstance(layer, nn.ReLU):
            kept[-1].relu_()
        elif isinstance(layer, Bytes):
            kept[-1] = layer(kept[-1])
    return kept


def backed(net: nn.Module, kept: list[Tensor], delta: Tensor, onward: bool) -> Tensor:
    """Write ∂L/∂θ of every layer into its .grad, given ∂L/∂output `delta` (N, outputs); `onward`: return ∂L/∂x."""
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Tanh, nn.Conv2d, nn.ReLU))]
    place = len(kept) - 1
    for layer in reversed(layers):
        if isinstance(layer, nn.Tanh):
            delta = torch.ops.aten.tanh_backward(delta, kept[place])
            continue
        if isinstance(layer, nn.ReLU):
            delta = torch.ops.aten.threshold_backward(delta.view_as(kept[place]), kept[place], 0)
            continue
        place -= 1
        further = place > 0 or onward
        if isinstance(layer, nn.Conv2d):
            delta = convolved_back(layer, kept[place], delta.view_as(kept[place + 1]), further)
            continue
        torch.mm(delta.t(), kept[place].flatten(1), out=layer.weight.grad)
        torch.sum(delta, 0, out=layer.bias.grad)
        if further:
            delta = torch.mm(delta, layer.weight)
    return delta


def convolved_back(layer: nn.Conv2d, x: Tensor, delta: Tensor, onward: bool) -> Tensor:
    """Write a convolution's two gradients, given its input and ∂L/∂output; `onward`: return ∂L/∂x, else `delta`."""
    kind = ([len(layer.weight)], layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
    by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(delta, x, layer.weight, *kind, [onward, True, True])
    layer.weight.grad.copy_(by_weight)  # pyright: ignore[reportOptionalMemberAccess]
    layer.bias.grad.copy_(by_bias)  # pyright: ignore[reportOptionalMemberAccess]
    return by_x if onward else delta
