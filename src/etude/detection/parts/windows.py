"""Windows over position, scale and aspect: a pyramid of resized pictures, in each of which a window of one size slides

Paper: Viola, Jones, Rapid Object Detection using a Boosted Cascade of Simple Features, 2001; Sermanet, Eigen, Zhang, Mathieu,
Fergus, LeCun, OverFeat, 2013, arXiv:1312.6229.

Equation: a window of scale s and aspect a covers (s · size)² pixels of the picture, height / width = a. The picture is resized
until that is `side` × `side`; along an edge of n pixels a window that moves by `stride` has ⌊(n − side) / stride⌋ + 1 places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.detection.parts.boxes import paired_iou
from etude.detection.parts.matching import assign, sample
from etude.detection.parts.scenes import Scene

FINE, POOL = 2, 3
"""Pixels that a cell of the last convolution moves by, and cells of that map in a cell of its pooling."""


class Grid(NamedTuple):
    """The windows of a picture of `size` × `size`: those of the first level row by row, then the next level's."""

    size: int
    side: int
    stride: int
    levels: tuple[tuple[int, int], ...]
    """Height and width that the picture is resized to."""

    def rows(self) -> list[tuple[int, int]]:
        """Places of a window along the height and the width of each level."""
        return [
            (places(high, self.side, self.stride), places(wide, self.side, self.stride)) for high, wide in self.levels
        ]

    def boxes(self) -> Tensor:
        """Every window, (W, 4) in pixels of the picture."""
        parts = []
        for (high, wide), (rows, columns) in zip(self.levels, self.rows()):
            y, x = torch.meshgrid(torch.arange(rows) * self.stride, torch.arange(columns) * self.stride, indexing="ij")
            low = torch.stack([x, y], -1).to(torch.get_default_dtype())
            times = low.new_tensor([self.size / wide, self.size / high])
            parts.append(torch.cat([low * times, (low + self.side) * times], -1).flatten(0, 1))
        return torch.cat(parts)


def places(length: int, side: int, stride: int) -> int:
    """How many windows of `side` pixels fit along `length` pixels, moved by `stride`."""
    return (length - side) // stride + 1


def grid(size: int, side: int, stride: int, scales: Sequence[float], aspects: Sequence[float] = (1.0,)) -> Grid:
    """All aspects of the first scale, then those of the next. Raises UserError for a window that is larger than the picture."""
    levels = []
    for scale in scales:
        for aspect in aspects:
            high, wide = scale * aspect**0.5, scale / aspect**0.5
            if max(high, wide) > 1:
                raise UserError(
                    f"a window of scale {scale:g} and aspect {aspect:g} is larger than the picture: take smaller ones"
                )
            levels.append((max(side, round(side / high)), max(side, round(side / wide))))
    return Grid(size, side, stride, tuple(levels))


def resized(x: Tensor, level: tuple[int, int]) -> Tensor:
    """Pictures uint8 (N, C, S, S) → (N, C, height, width) in [0, 1], interpolated linearly between pixels."""
    x = x.to(torch.get_default_dtype()) / 255
    return F.interpolate(x, level, mode="bilinear", align_corners=False, antialias=True)


def unfolded(x: Tensor, side: int, stride: int) -> Tensor:
    """Every window of pictures (N, C, H, W) as a view: (N, rows, columns, C, side, side)."""
    return x.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)


def cut(x: Tensor, grid: Grid, index: Tensor) -> Tensor:
    """The windows of these numbers, index (N, K), of pictures uint8 (N, C, S, S): (N, K, C, side, side) in [0, 1]."""
    out = x.new_zeros(*index.shape, x.shape[1], grid.side, grid.side, dtype=torch.get_default_dtype())
    first = 0
    for level, (rows, columns) in zip(grid.levels, grid.rows()):
        picture, place = ((index >= first) & (index < first + rows * columns)).nonzero(as_tuple=True)
        if len(picture):
            number = index[picture, place] - first
            views = unfolded(resized(x, level), grid.side, grid.stride)
            out[picture, place] = views[picture, number // columns, number % columns]
        first += rows * columns
    return out


class Drawn(NamedTuple):
    """The windows of a mini-batch."""

    numbers: Tensor
    """int64 (N, K): their numbers."""
    kinds: Tensor
    """int64 (N, K): the object's class, C for background, −1 for a place that does not count."""
    owner: Tensor
    """int64 (N, K): the object's number; 0 where there is none."""


def drawn(
    overlap: Tensor, scene: Scene, positive: float, negative: float, count: int, classes: int, dice: torch.Generator
) -> Drawn:
    """Of windows that overlap the objects by (N, W, M), `count` a picture, at most half of them at objects."""
    assigned = assign(overlap, scene.labels, positive, negative, difficult=scene.difficult)
    index, valid = sample(assigned, count, 0.5, dice)
    owner = assigned.gather(1, index)
    at = (owner >= 0) & valid
    owner = owner.clamp(min=0)
    return Drawn(index, torch.where(at, scene.labels.gather(1, owner), classes).masked_fill(~valid, -1), owner)


class WindowNet(nn.Module):
    """LeNet's plan on windows (K, C, side, side) → logits of the classes and, last, background: (K, C + 1).

    No layer pads, so that what is said of a window does not depend on what lies around it: 5 × 5 convolution, halved, 3 × 3
    convolution, pooled by 3, one hidden layer. Batch normalisation behind each convolution.
    """

    def __init__(self, spec: Spec, side: int, width: int, head_width: int) -> None:
        super().__init__()
        self.cells = (side - 8) // (FINE * POOL)
        self.standardise = Standardise(spec.mean, spec.std)
        self.features = nn.Sequential(
            nn.Conv2d(spec.shape[0], width, 5, bias=False), BatchNorm(width), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, bias=False), BatchNorm(2 * width), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.hidden = nn.Linear(2 * width * self.cells**2, head_width)
        self.scores = nn.Linear(head_width, len(spec.classes) + 1)

    def pooled(self, x: Tensor) -> Tensor:
        """The features that the dense layers read, (K, 2·width·cells²)."""
        return F.max_pool2d(self.features(self.standardise(x)), POOL).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.hidden(self.pooled(x)).relu())


def fitting(side: int) -> None:
    """Raises UserError for a side that the network's layers do not divide."""
    if side < 14 or (side - 8) % (FINE * POOL):
        raise UserError(f"--side {side} is none of 14, 20, 26, 32, …, which the network's layers divide")


def localised(found: tuple[Tensor, Tensor, Tensor], part: Scene) -> float:
    """Share of the pictures whose best detection has the class of an object that it overlaps by IoU 0.5."""
    box, kind = found[0][:, :1], found[2][:, :1]
    overlap = paired_iou(box.expand_as(part.boxes), part.boxes)
    return float(((overlap >= 0.5) & (part.labels == kind) & (part.labels >= 0)).any(1).double().mean())
