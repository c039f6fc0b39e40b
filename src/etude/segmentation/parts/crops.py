"""The training crops of a step, a function of (seed, step): places, turns and elastic deformation

Elastic deformation as in U-Net's paper (§3.1): Gaussian displacements on a 3×3 grid, interpolated bicubically to every pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from etude.core.run import Run
from etude.data.batches import Stream
from etude.segmentation.parts.scenes import VOID, Part

Turns = Literal["none", "mirror", "all"]
"""What happens to a crop: nothing, left and right exchanged with probability ½, or one of the eight turns and mirrors."""


def crops(
    run: Run, part: Part, batch: int, side: int, margin: int = 0, turns: Turns = "none", elastic: float = 0.0
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function of the step: x uint8 or float32 (B, C, side + 2 margin, …), y int64 (B, side, side) on the run's device.

    The pictures lie on the device; `margin` pixels around a crop are shown, too, and pictures are continued by
    mirroring. A picture smaller than `side` is continued likewise, with void labels.
    """
    xs, ys = [], []
    for x, y in zip(part.x, part.y):
        low = [max(0, side - length) for length in y.shape]
        around = (margin, margin + low[0], margin, margin + low[1])
        xs.append(mirrored(x.to(run.device), *around))
        void = F.pad(y.to(run.device), (0, low[1], 0, low[0]), value=VOID)
        ys.append(mirrored(void, margin, margin, margin, margin))
    stream = Stream(len(part), batch, run.seed, run.rank, run.world)
    whole = side + 2 * margin

    def at(step: int) -> tuple[Tensor, Tensor]:
        generator = run.generator("crops", step)
        chances = torch.rand(batch, 3, generator=generator).tolist()
        found = []
        for index, (down, across, turn) in zip(stream.indices(step).tolist(), chances):
            x, y = xs[index], ys[index]
            top, left = int(down * (y.shape[0] - whole + 1)), int(across * (y.shape[1] - whole + 1))
            pair = (part[..., top : top + whole, left : left + whole] for part in (x, y))
            found.append([turned(part, turn, turns) for part in pair])
        x, y = (torch.stack([*parts]) for parts in zip(*found))
        if elastic:
            x, y = deformed(x, y, elastic, generator)
        end = whole - margin
        return x, y[:, margin:end, margin:end].long()

    return at


def turned(x: Tensor, chance: float, turns: Turns) -> Tensor:
    """(…, S, S), turned as `chance` in [0, 1) says: mirror in its upper half, and a quarter turn for every further eighth."""
    if turns == "none":
        return x
    x = x.flip(-1) if chance >= 0.5 else x
    return x if turns == "mirror" else x.rot90(int(chance * 8) % 4, (-2, -1))


def deformed(x: Tensor, y: Tensor, deviation: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, S, S) and masks (B, S, S), bent alike: float32 pictures in [0, 1], masks of the nearest label."""
    size = x.shape[-1]
    coarse = deviation * torch.randn(len(x), 2, 3, 3, generator=generator).to(x.device)
    field = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).movedim(1, -1)
    line = torch.arange(size, device=x.device, dtype=torch.float32)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + field
    grid = 2 * places / (size - 1) - 1
    rule = {"padding_mode": "reflection", "align_corners": True}
    bent = F.grid_sample(x.float() / 255, grid, mode="bilinear", **rule)
    labels = F.grid_sample(y[:, None].float(), grid, mode="nearest", **rule)
    return bent, labels[:, 0].to(y.dtype)


def mirrored(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """(…, H, W) continued on all sides by mirroring at its edge pixels, however far: (…, top + H + bottom, left + W + right)."""
    down, across = _reflected(x.shape[-2], top, bottom, x.device), _reflected(x.shape[-1], left, right, x.device)
    return x.index_select(-2, down).index_select(-1, across)


def _reflected(length: int, before: int, after: int, device: torch.device) -> Tensor:
    place = torch.arange(-before, length + after, device=device)
    period = max(1, 2 * (length - 1))
    place = place % period
    return torch.minimum(place, period - place) if length > 1 else torch.zeros_like(place)
