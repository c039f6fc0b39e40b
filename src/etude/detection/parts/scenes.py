"""Pictures with boxes: digits on a canvas (offline), BCCD blood cells, and folders in VOC, COCO or YOLO form

`scenes` gives three splits, each with `x` uint8 (N, C, S, S), and the objects of each picture, padded to the most that one
has: `boxes` (N, M, 4) float32, (x1, y1, x2, y2) in pixels of the S × S picture; `labels` (N, M), −1 for none; `difficult`.
Pictures are warped to a square, as YOLO's and Fast R-CNN's crops are; boxes follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etude import data
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data.sets import moments
from etude.detection.parts import boxes as box
from etude.detection.parts.formats import Annotated, read

LEAST = 3.0  # pixels: a canvas object has at least this height and width


@dataclass(frozen=True, eq=False)
class Scene:
    """One split: pictures and their objects (see the file's docstring)."""

    x: Tensor
    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    proposals: Tensor | None = None
    """(N, P, 4), where a method has computed some; empty places are boxes without an area."""

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> Scene:
        """The pictures of these numbers."""
        return Scene(*(part[index] for part in self._parts()))

    def to(self, device: torch.device) -> Scene:
        """On another device."""
        return Scene(*(part.to(device) for part in self._parts()))

    def _parts(self) -> list[Tensor]:
        parts = (self.x, self.boxes, self.labels, self.difficult, self.proposals)
        return [part for part in parts if part is not None]


@dataclass(frozen=True, eq=False)
class Scenes:
    """Three splits of pictures with boxes, and what a network must know of them."""

    name: str
    train: Scene
    validation: Scene
    test: Scene
    spec: Spec
    source: str
    dropped: int = 0
    """Annotated boxes without an area, which were left out."""

    def about(self) -> dict[str, Any]:
        """What a report says of it: name, source, and each split's pictures and objects by class."""
        splits = {}
        for name in ("train", "validation", "test"):
            part: Scene = getattr(self, name)
            counts = part.labels[part.labels >= 0].bincount(minlength=len(self.spec.classes)).tolist()
            splits[name] = {"images": len(part), "by class": dict(zip(self.spec.classes, counts))}
        lost = f"; {self.dropped} boxes without an area were left out" if self.dropped else ""
        return {"name": self.name, "source": self.source + lost, "splits": splits}


def scenes(name: str, size: int, examples: int | None = None, most: int = 3) -> Scenes:
    """Read the pictures with boxes called `name`, warped to `size` × `size`.

    A dataset of labelled images (digits, mnist, …) is scattered over black canvases, up to `most` objects each: `examples`
    training scenes (None: 3,000), an eighth of that for validation and a fifth for test, the same ones in every run. bccd, or a
    folder in VOC, COCO or YOLO form, is read with its own splits; `examples` cuts the training split. Raises UserError.
    """
    if name == "bccd" or Path(name).expanduser().exists():
        return _annotated(name, size, examples)
    if name not in data.names("images"):
        known = ", ".join([*data.names("images"), "bccd"])
        raise UserError(
            f"there is no '{name}' to detect in: name {known}, or a folder with boxes in VOC, COCO or YOLO form"
        )
    if size < 24:
        raise UserError(f"--size {size} leaves no room for objects; take at least 24 pixels")
    whole = data.images(name)
    count = examples or 3000
    parts = [
        scattered(split.x, split.y, number, size, most, seed)
        for seed, (split, number) in enumerate(
            ((whole.train, count), (whole.validation, max(8, count // 8)), (whole.test, max(8, count // 5)))
        )
    ]
    mean, std = moments(parts[0].x.numpy())
    spec = Spec(tuple(parts[0].x.shape[1:]), whole.spec.classes, mean, std, {"boxes": True})
    return Scenes(
        whole.name,
        parts[0],
        parts[1],
        parts[2],
        spec,
        f"{whole.source}; scattered over canvases of {size} × {size} pixels",
    )


def scattered(x: Tensor, y: Tensor, count: int, size: int, most: int, seed: int) -> Scene:
    """`count` canvases, each with 1 to `most` of the pictures x (N, C, H, W) uint8, resized, at random places.

    An object is a quarter to a half of the canvas high, stretched sideways by up to a third; its box is the tightest
    around its bright pixels (from 48 of 255). Objects that would overlap another by more than IoU 0.1 are tried elsewhere.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    channels = x.shape[1]
    canvas = np.zeros((count, channels, size, size), np.uint8)
    boxes, labels = np.zeros((count, most, 4), np.float32), np.full((count, most), -1, np.int64)
    how_many = draw.integers(1, most + 1, count)
    which = draw.integers(0, len(x), (count, most))
    heights = draw.integers(size // 4, size // 2 + 1, (count, most))
    widths = np.clip((heights * draw.uniform(0.75, 1.33, (count, most))).round().astype(int), size // 5, size // 2)
    places = draw.random((count, most, 8, 2))
    tiles: dict[tuple[int, int], np.ndarray] = {}
    for high, wide in np.unique(np.stack([heights.ravel(), widths.ravel()], 1), axis=0).tolist():
        at = np.flatnonzero((heights.ravel() == high) & (widths.ravel() == wide))
        pixels = F.interpolate(
            x[torch.from_numpy(which.ravel()[at])].float(),
            (high, wide),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        for flat, tile in zip(at.tolist(), pixels.round().clamp(0, 255).to(torch.uint8).numpy()):
            tiles[divmod(flat, most)] = tile
    for image in range(count):
        placed = 0
        for slot in range(how_many[image]):
            tile = tiles[image, slot]
            bright = tile.max(0) >= 48
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            if not len(rows) or rows[-1] - rows[0] + 1 < LEAST or columns[-1] - columns[0] + 1 < LEAST:
                continue
            high, wide = tile.shape[1:]
            for down, across in places[image, slot]:
                top, left = int(down * (size - high + 1)), int(across * (size - wide + 1))
                own = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
                if all(_overlap(own, other) <= 0.1 for other in boxes[image, :placed]):
                    region = canvas[image, :, top : top + high, left : left + wide]
                    np.maximum(region, tile, out=region)
                    boxes[image, placed], labels[image, placed] = own, y[which[image, slot]]
                    placed += 1
                    break
    objects = torch.from_numpy(labels)
    return Scene(
        torch.from_numpy(canvas), torch.from_numpy(boxes), objects, torch.zeros_like(objects, dtype=torch.bool)
    )


def flipped(part: Scene, generator: torch.Generator) -> Scene:
    """Each picture mirrored left to right with its boxes, or not, evenly."""
    turn = (torch.rand(len(part), generator=generator) < 0.5).to(part.x.device)
    x = torch.where(turn[:, None, None, None], part.x.flip(-1), part.x)

    def moved(boxes: Tensor) -> Tensor:
        return torch.where(turn[:, None, None], box.mirror(boxes, part.x.shape[-1]), boxes)

    proposals = None if part.proposals is None else moved(part.proposals)
    return Scene(x, moved(part.boxes), part.labels, part.difficult, proposals)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    shared = wide * high
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _annotated(name: str, size: int, examples: int | None) -> Scenes:
    path = data.home() / "bccd" if name == "bccd" else Path(name).expanduser()
    splits, classes, source, dropped = read(path, size)
    parts = [_padded(splits[part]) for part in ("train", "validation", "test")]
    if examples is not None and examples < len(parts[0]):
        parts[0] = parts[0].at(torch.arange(examples))
    mean, std = moments(parts[0].x.numpy())
    spec = Spec(tuple(parts[0].x.shape[1:]), classes, mean, std, {"boxes": True})
    return Scenes(name, parts[0], parts[1], parts[2], spec, source, dropped)


def _padded(rows: Annotated) -> Scene:
    count, most = len(rows.x), max([1, *(len(part) for part in rows.labels)])
    boxes, labels = np.zeros((count, most, 4), np.float32), np.full((count, most), -1, np.int64)
    hard = np.zeros((count, most), bool)
    for row, (own, kinds, difficult) in enumerate(zip(rows.boxes, rows.labels, rows.difficult)):
        if len(kinds):
            boxes[row, : len(kinds)], labels[row, : len(kinds)], hard[row, : len(kinds)] = own, kinds, difficult
    return Scene(*map(torch.from_numpy, (rows.x, boxes, labels, hard)))
