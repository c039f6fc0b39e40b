"""Selective search: class-independent regions, by merging the segments of a picture in the order of their similarity

Paper: Uijlings, van de Sande, Gevers, Smeulders, Selective Search for Object Recognition, IJCV 2013; segments: Felzenszwalb,
Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004.

Equation: two neighbouring pixels' segments a, b join along an edge of weight w (colour distance), edges by rising weight, if
    w ≤ min(Int(a) + k/|a|, Int(b) + k/|b|),   Int the largest weight within a segment;
segments of fewer than `least` pixels join a neighbour afterwards. Then the two neighbouring regions of greatest similarity
merge until one is left, and the box of every region that ever was is a proposal:
    s(a, b) = Σ min(colour) + Σ min(texture) + [1 − (|a| + |b|)/|image|] + [1 − (|box(a ∪ b)| − |a| − |b|)/|image|],
with normalised histograms of 25 bins a channel (colour) and of 10 bins for each of 8 directions and channel (texture: positive
parts of derivatives of the picture smoothed by a Gaussian of σ = 1). Histograms of a merged region are the weighted means.

Differences:
- The paper diversifies over five colour spaces, four similarities and several k. Here one similarity, the sum of all four, and
  two modes: "single" takes the channels as they are, "fast" HSV and Lab like the paper's mode of that name, both with three k.
  Each space and k gives a hierarchy; their boxes are taken in turn.
- Boxes of a hierarchy come last merge first (large first); the paper multiplies that rank by a random number.

Expect: BCCD at 224 pixels, 87 validation pictures, recall at IoU 0.5: 0.81 by "single" (some 360 boxes, 0.25 CPU seconds each);
    0.85, 0.95 and 0.97 by "fast" in 500, 1,000 and 2,000 boxes (0.41 seconds).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etude.detection.parts.scenes import Scene

if TYPE_CHECKING:
    from etude.core.run import Run

COLOURS, DIRECTIONS, STEPS = 25, 8, 10
Mode = Literal["single", "fast"]
MODES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "single": (("rgb",), (50.0, 150.0, 400.0)),
    "fast": (("hsv", "lab"), (50.0, 150.0, 400.0)),
}
"""Colour spaces and values of k: each pair gives a hierarchy."""
XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)
"""Linear red, green and blue to X, Y and Z as shares of white's (D65)."""


def selective_search(x: Tensor, most: int, mode: Mode = "single", least: int = 12) -> tuple[Tensor, Tensor]:
    """Proposals in pictures x, uint8 (N, C, H, W): boxes (N, most, 4) in pixels and how many of them are real (N,).

    `mode` names colour spaces and values of k in grey levels (`MODES`): larger ones begin with larger segments. `least` pixels
    has a segment. Equal boxes are kept once, those of fewer than 3 pixels' height or width are left out; empty places are boxes
    without an area.
    """
    run = _compiled()
    spaces, scales = MODES[mode]
    seen = []
    for space in spaces:
        said = in_space(x, space)
        colour = (said.permute(0, 2, 3, 1).int() * COLOURS // 256).numpy()
        seen.append((_smoothed(said.float(), 0.8).numpy(), _texture(said.float()), colour))
    boxes, count = np.zeros((len(x), most, 4), np.float32), np.zeros(len(x), np.int64)
    for n in range(len(x)):
        lists = []
        for smooth, texture, colour in seen:
            image = np.ascontiguousarray(smooth[n].transpose(1, 2, 0))
            for k in scales:
                labels, parts = run["segments"](image, *edges(image), np.float32(k), least)
                grown = run["merged"](labels, parts, colour[n], texture[n], COLOURS, DIRECTIONS * STEPS)
                lists.append(grown[::-1])
        found = _in_turn(lists)
        sides = found[:, 2:] - found[:, :2]
        found = found[(sides >= 3).all(1)][:most]
        boxes[n, : len(found)], count[n] = found, len(found)
    return torch.from_numpy(boxes), torch.from_numpy(count)


def proposed(run: Run, part: Scene, most: int, mode: Mode = "single") -> Scene:
    """The split with its proposals, by selective search."""
    run.say(f"selective search in {len(part):,} pictures")
    return dataclasses.replace(part, proposals=selective_search(part.x, most, mode)[0])


def in_space(x: Tensor, space: str) -> Tensor:
    """Pictures uint8 (N, C, H, W) said in a colour space, uint8 too: "rgb" (as they are), "hsv" or "lab"; grey ones as colours.

    All three of HSV span 0 to 255. CIE L*a*b* under D65: 2.55 L*, a* + 128 and b* + 128.
    """
    if space == "rgb":
        return x
    shade = (x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)).float() / 255
    if space == "hsv":
        red, green, blue = shade.unbind(1)
        value, spread = shade.amax(1), shade.amax(1) - shade.amin(1)
        safe = spread.clamp(min=1e-8)
        hue = torch.where(
            value == red,
            (green - blue) / safe % 6,
            torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        said = torch.stack([hue / 6 * (spread > 0), spread / value.clamp(min=1e-8), value], 1) * 255
    else:
        light = torch.where(shade <= 0.04045, shade / 12.92, ((shade + 0.055) / 1.055) ** 2.4)
        given = torch.einsum("ij,njhw->nihw", light.new_tensor(XYZ), light)
        root = torch.where(given > 0.008856, given.clamp(min=1e-9) ** (1 / 3), 7.787 * given + 16 / 116)
        a, b = 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])
        said = torch.stack([2.55 * (116 * root[:, 1] - 16), a + 128, b + 128], 1)
    return said.round().clamp(0, 255).to(torch.uint8)


def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of the eight-connected grid (H, W, C) by rising colour distance: first pixel, second pixel, weight."""
    height, width = image.shape[:2]
    at = np.arange(height * width).reshape(height, width)
    pairs = [
        (at[:, :-1], at[:, 1:]),
        (at[:-1], at[1:]),
        (at[:-1, :-1], at[1:, 1:]),
        (at[:-1, 1:], at[1:, :-1]),
    ]
    one, two = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    flat = image.reshape(height * width, -1)
    weight = np.sqrt(((flat[one] - flat[two]) ** 2).sum(1))
    order = np.argsort(weight, kind="stable")
    return one[order], two[order], weight[order]


def _gaussian(sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    bell = torch.exp(-(at**2) / (2 * sigma**2))
    return bell / bell.sum()


def _smoothed(x: Tensor, sigma: float) -> Tensor:
    """(N, C, H, W) under a Gaussian, edges repeated."""
    bell, channels = _gaussian(sigma), x.shape[1]
    reach = len(bell) // 2
    x = F.conv2d(
        F.pad(x, (reach, reach, 0, 0), "replicate"), bell.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels
    )
    return F.conv2d(
        F.pad(x, (0, 0, reach, reach), "replicate"), bell.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels
    )


def _texture(x: Tensor) -> np.ndarray:
    """Bin of each direction and channel: int (N, H, W, C, DIRECTIONS), 0 to STEPS − 1; 128 grey levels a pixel are the top."""
    smooth = _smoothed(x, 1.0)
    across = F.pad(smooth, (1, 1, 0, 0), "replicate")
    down = F.pad(smooth, (0, 0, 1, 1), "replicate")
    dx, dy = (across[..., 2:] - across[..., :-2]) / 2, (down[..., 2:, :] - down[..., :-2, :]) / 2
    turn = torch.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
    along = (dx[..., None] * turn.cos() + dy[..., None] * turn.sin()).clamp(min=0)
    return (along * (STEPS / 128)).long().clamp(max=STEPS - 1).permute(0, 2, 3, 1, 4).contiguous().numpy()


def _in_turn(lists: list[np.ndarray]) -> np.ndarray:
    """The boxes of several lists one after another in turn, each once: (K, 4)."""
    rank = np.concatenate([np.arange(len(rows)) for rows in lists])
    rows = np.concatenate(lists)[np.argsort(rank, kind="stable")]
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


@functools.cache
def _compiled() -> dict[str, Callable[..., Any]]:
    """Segments and their merging in machine code (compiled once, then cached)."""
    from numba import njit

    @njit(cache=True, nogil=True)
    def root(parent, i):  # type: ignore[no-untyped-def]
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    @njit(cache=True, nogil=True)
    def segments(image, one, two, weight, k, least):  # type: ignore[no-untyped-def]
        """Labels (H, W) from 0 and their number; edges sorted by weight."""
        height, width = image.shape[:2]
        pixels = height * width
        parent, size = np.arange(pixels), np.ones(pixels, np.int64)
        within = np.zeros(pixels, np.float32)
        for e in range(len(one)):
            a, b = root(parent, one[e]), root(parent, two[e])
            if a != b and weight[e] <= min(within[a] + k / size[a], within[b] + k / size[b]):
                parent[b] = a
                size[a] += size[b]
                within[a] = weight[e]
        for e in range(len(one)):
            a, b = root(parent, one[e]), root(parent, two[e])
            if a != b and (size[a] < least or size[b] < least):
                parent[b] = a
                size[a] += size[b]
        labels, names, count = np.empty(pixels, np.int64), np.full(pixels, -1, np.int64), 0
        for i in range(pixels):
            r = root(parent, i)
            if names[r] < 0:
                names[r] = count
                count += 1
            labels[i] = names[r]
        return labels.reshape(height, width), count

    @njit(cache=True, nogil=True)
    def alike(a, b, size, boxes, colour, texture, pixels):  # type: ignore[no-untyped-def]
        total = 0.0
        for i in range(colour.shape[1]):
            total += min(colour[a, i], colour[b, i])
        for i in range(texture.shape[1]):
            total += min(texture[a, i], texture[b, i])
        wide = max(boxes[a, 2], boxes[b, 2]) - min(boxes[a, 0], boxes[b, 0])
        high = max(boxes[a, 3], boxes[b, 3]) - min(boxes[a, 1], boxes[b, 1])
        both = size[a] + size[b]
        return total + (1 - both / pixels) + (1 - (wide * high - both) / pixels)

    @njit(cache=True, nogil=True)
    def merged(labels, parts, colours, textures, shades, strokes):  # type: ignore[no-untyped-def]
        """Boxes (2 · parts − 1, 4) of all regions, the segments first, then each merge."""
        height, width, channels = colours.shape
        pixels = float(height * width)
        most = 2 * parts - 1
        boxes = np.zeros((most, 4), np.float32)
        boxes[:, :2] = 1e9
        size = np.zeros(most)
        colour, texture = np.zeros((most, shades * channels)), np.zeros((most, strokes * channels))
        directions = textures.shape[3]
        steps = strokes // directions
        near = np.zeros((most, most), np.bool_)
        for y in range(height):
            for x in range(width):
                r = labels[y, x]
                size[r] += 1
                boxes[r, 0], boxes[r, 1] = min(boxes[r, 0], x), min(boxes[r, 1], y)
                boxes[r, 2], boxes[r, 3] = max(boxes[r, 2], x + 1), max(boxes[r, 3], y + 1)
                for c in range(channels):
                    colour[r, c * shades + colours[y, x, c]] += 1
                    for d in range(directions):
                        texture[r, (c * directions + d) * steps + textures[y, x, c, d]] += 1
                for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    v, u = y + dy, x + dx
                    if v < height and 0 <= u < width and labels[v, u] != r:
                        near[r, labels[v, u]] = near[labels[v, u], r] = True
        for r in range(parts):
            colour[r] /= size[r] * channels
            texture[r] /= size[r] * channels * directions
        like = np.full((most, most), -1.0)
        best = np.full(most, -1, np.int64)  # of each region, its most similar neighbour of a lower number
        alive = np.zeros(most, np.bool_)
        alive[:parts] = True
        for a in range(parts):
            for b in range(a):
                if near[a, b]:
                    like[a, b] = alike(a, b, size, boxes, colour, texture, pixels)
                    if best[a] < 0 or like[a, b] > like[a, best[a]]:
                        best[a] = b
        for new in range(parts, most):
            a = -1
            for r in range(new):
                if alive[r] and best[r] >= 0 and (a < 0 or like[r, best[r]] > like[a, best[a]]):
                    a = r
            b = best[a]
            size[new] = size[a] + size[b]
            colour[new] = (colour[a] * size[a] + colour[b] * size[b]) / size[new]
            texture[new] = (texture[a] * size[a] + texture[b] * size[b]) / size[new]
            boxes[new, :2], boxes[new, 2:] = (
                np.minimum(boxes[a, :2], boxes[b, :2]),
                np.maximum(boxes[a, 2:], boxes[b, 2:]),
            )
            alive[a] = alive[b] = False
            for r in range(new):
                if alive[r]:
                    if near[r, a] or near[r, b]:
                        near[r, new] = near[new, r] = True
                        like[new, r] = alike(new, r, size, boxes, colour, texture, pixels)
                        if best[new] < 0 or like[new, r] > like[new, best[new]]:
                            best[new] = r
                    if best[r] == a or best[r] == b:
                        best[r] = -1
                        for s in range(r):
                            if alive[s] and near[r, s] and (best[r] < 0 or like[r, s] > like[r, best[r]]):
                                best[r] = s
            alive[new] = True
        return boxes

    return {"segments": segments, "merged": merged}
