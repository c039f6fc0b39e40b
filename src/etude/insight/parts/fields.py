"""Receptive fields by arithmetic: of which pixels is a place of a layer a function?

Equation: the place p of a map sees the pixels first + jump·p … last + jump·p of an axis. A window of kernel k, stride s, padding
    q and dilation d on top of it has
    first' = first − jump·q,    last' = last + jump·(d (k − 1) − q),    jump' = jump·s,
    the image itself first = last = 0, jump = 1. A sum of two branches sees from the smaller first to the larger last.

`field` watches what a network calls (convolutions, pooling, padding, slices), so a network needs no particular form. Functions
that keep the places of their input, such as ReLU, batch norm in eval mode and sums, change nothing; whatever else makes a tensor
of another shape (a mean over all places, a linear layer) is taken to see everything, never too little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from etude.insight.parts.ascent import seen


class Axis(NamedTuple):
    """Of one axis: place p sees first + jump·p … last + jump·p, both ends included, in pixels."""

    jump: int
    first: float
    last: float

    def windowed(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        """Seen through a window on top."""
        low = self.first - self.jump * padding
        return Axis(self.jump * stride, low, self.last + self.jump * (dilation * (kernel - 1) - padding))

    def joined(self, other: Axis) -> Axis:
        """Of a sum of both."""
        if self.jump != other.jump:
            return ALL
        return Axis(self.jump, min(self.first, other.first), max(self.last, other.last))

    def span(self, place: int, length: int) -> tuple[int, int]:
        """The pixels [low, high) that a place sees, before they are cut to the image; `length` where it is everything."""
        if math.isinf(self.last):
            return 0, length
        return int(self.first) + self.jump * place, int(self.last) + self.jump * place + 1


ALL = Axis(0, -math.inf, math.inf)
PIXEL = Axis(1, 0, 0)
_POOLS = {"max_pool2d", "_max_pool2d", "max_pool2d_with_indices", "avg_pool2d"}
_MIXING = {F.group_norm, torch.group_norm, F.instance_norm, torch.instance_norm, F.layer_norm, torch.layer_norm}
_MIXING |= {F.interpolate, torch.roll, torch.flip, Tensor.roll, Tensor.flip}


@dataclass(frozen=True)
class Field:
    """What one place of a layer sees, down and across the image of `shape` (H, W)."""

    down: Axis
    across: Axis
    shape: tuple[int, int]

    def box(self, i: int, j: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right), bottom and right excluded, before the box is cut to the image."""
        return *self.down.span(i, self.shape[0]), *self.across.span(j, self.shape[1])

    def crop(self, image: Tensor, i: int, j: int, fill: Tensor) -> Tensor:
        """The box of `image` (C, H, W); what lies outside is `fill`, (C,). Boxes of one layer have one shape."""
        top, bottom, left, right = self.box(i, j)
        out = fill.to(image).view(-1, 1, 1).repeat(1, bottom - top, right - left)
        rows, columns = slice(max(top, 0), min(bottom, self.shape[0])), slice(max(left, 0), min(right, self.shape[1]))
        part = image[:, rows, columns]
        row, column = rows.start - top, columns.start - left
        out[:, row : row + part.shape[1], column : column + part.shape[2]] = part
        return out


class _Watch(TorchFunctionMode):
    """Carries the axes of each tensor with it, by the function that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[int, tuple[Tensor, tuple[Axis, Axis]]] = {}  # the tensor is held, so that its id stays its own

    def of(self, value: Any) -> tuple[Axis, Axis] | None:
        return self.axes[id(value)][1] if isinstance(value, Tensor) and id(value) in self.axes else None

    def put(self, value: Tensor, axes: tuple[Axis, Axis]) -> None:
        self.axes[id(value)] = value, axes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [*args, *kwargs.values()]
        flat += [one for many in flat if isinstance(many, (tuple, list)) for one in many]
        given = [(value, axes) for value in flat if (axes := self.of(value)) is not None]
        shapes = {tuple(value.shape[2:]) for value, _ in given}
        made = func(*args, **kwargs)
        if not given:
            return made
        for out in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(out, Tensor):
                self.put(out, _after(func, args, kwargs, given[0][1], [axes for _, axes in given], shapes, out))
        return made


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value * 2)[:2] if len(value) == 1 else tuple(value)


def _after(
    func: Any,
    args: Any,
    kwargs: Any,
    first: tuple[Axis, Axis],
    every: list[tuple[Axis, Axis]],
    shapes: set[Any],
    out: Tensor,
) -> tuple[Axis, Axis]:
    """The axes of what `func` makes."""

    def named(place: int, name: str, default: Any) -> Any:
        return args[place] if len(args) > place else kwargs.get(name, default)

    if func in (F.conv2d, torch.conv2d):
        weight, padding = named(1, "weight", None), named(4, "padding", 0)
        steps, holes = _pair(named(3, "stride", 1)), _pair(named(5, "dilation", 1))
        kernel = weight.shape[2:]
        if isinstance(padding, str):
            padding = [holes[k] * (kernel[k] - 1) // 2 if padding == "same" else 0 for k in (0, 1)]
        pads = _pair(padding)
        return tuple(first[k].windowed(kernel[k], steps[k], pads[k], holes[k]) for k in (0, 1))  # type: ignore[return-value]
    if func in (F.max_pool2d, F.max_pool2d_with_indices) or getattr(func, "__name__", "") in _POOLS:
        kernel = _pair(named(1, "kernel_size", None))
        steps, pads = _pair(named(2, "stride", None) or kernel), _pair(named(3, "padding", 0))
        mean = getattr(func, "__name__", "") == "avg_pool2d"
        holes = (1, 1) if mean else _pair(named(4, "dilation", 1))
        return tuple(first[k].windowed(kernel[k], steps[k], pads[k], holes[k]) for k in (0, 1))  # type: ignore[return-value]
    if func in (F.pad, torch.nn.functional.pad) and named(2, "mode", "constant") == "constant":
        rim = [*named(1, "pad", ()), 0, 0, 0, 0]
        return tuple(first[k].windowed(1, 1, rim[2 - 2 * k]) for k in (0, 1))  # type: ignore[return-value]
    if func is Tensor.__getitem__ and out.ndim == 4:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if all(isinstance(one, slice) for one in index) and len(index) <= 4:
            index = [*index, *[slice(None)] * (4 - len(index))]
            cuts = [one.indices(length) for one, length in zip(index[2:], args[0].shape[2:])]
            return tuple(
                Axis(axis.jump * step, axis.first + axis.jump * start, axis.last + axis.jump * start)
                for axis, (start, _, step) in zip(first, cuts)
            )  # type: ignore[return-value]
    if func not in _MIXING and out.ndim == 4 and shapes == {tuple(out.shape[2:])}:
        down, across = first
        for one, two in every[1:]:
            down, across = down.joined(one), across.joined(two)
        return down, across
    return ALL, ALL


@torch.no_grad()
def field(model: nn.Module, image: Tensor, name: str) -> Field:
    """What one place of layer `name` ("": the logits) sees of `image` (1, C, H, W), which only gives the shape."""
    watch, own = _Watch(), image.clone()
    watch.put(own, (PIXEL, PIXEL))
    with watch:
        (made,) = seen(model, own, [name])
    down, across = watch.of(made) or (ALL, ALL)
    return Field(down, across, (image.shape[2], image.shape[3]))
