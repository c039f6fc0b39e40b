"""Pictures of any size through a network of pixels: in one pass, or tile by tile with the very same answer

The overlap-tile strategy (U-Net, arXiv:1505.04597, figure 2): a tile is shown with as much around it as its pixels can
see, mirrored where the picture ends; tiles begin at multiples of the network's stride, so that its pooling windows are those
of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.segmentation.parts.crops import mirrored


class PixelNetwork(nn.Module):
    """Pictures (N, C, H, W), uint8 or float in [0, 1] → logits (N, K, H − 2 margin, W − 2 margin).

    What prediction must know of it: `stride`, its output's sides being `residue` modulo it; `margin`, the pixels lost on each
    side; where nothing is lost, `reach`, how far beyond an aligned block of `stride` answers its pixels see.
    """

    stride: int = 1
    residue: int = 0
    margin: int = 0
    reach: int = 0

    def fitting(self, side: int) -> int:
        """The smallest side ≥ `side` that an output can have."""
        return side + (self.residue - side) % self.stride

    def check(self, crop: int) -> None:
        """Raise UserError for a crop that is no side of an output."""
        if self.fitting(crop) != crop:
            above = self.fitting(crop)
            below = above - self.stride
            near = f"{below} or {above}" if below > 0 else str(above)
            raise UserError(f"--crop {crop} is no side of this network's output; take {near}")


@torch.no_grad()
def logits(net: PixelNetwork, x: Tensor, tile: int = 0) -> Tensor:
    """Pictures (N, C, H, W) of any size → logits (N, K, H, W). `tile` > 0: at most that many pixels a side at once."""
    height, width = x.shape[-2:]
    tall, wide = net.fitting(height), net.fitting(width)
    m = net.margin
    x = mirrored(x, m, m + tall - height, m, m + wide - width)
    if not tile:
        return net(x)[..., :height, :width]
    out = x.new_empty(0)
    for top, bottom, above, below in spans(net, tall, tile):
        for left, right, before, after in spans(net, wide, tile):
            part = net(x[..., above:below, before:after])
            down, across = (0, 0) if m else (top - above, left - before)
            part = part[..., down : down + bottom - top, across : across + right - left]
            if not out.numel():
                out = part.new_empty(len(x), part.shape[1], tall, wide)
            out[..., top:bottom, left:right] = part
    return out[..., :height, :width]


def spans(net: PixelNetwork, side: int, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Along one axis of an output of `side` pixels: each tile's begin and end, and those of the input that it needs."""
    if net.margin:  # outputs of one size; the last one ends where the picture does
        size = min(net.fitting(tile), side)
        for start in [*range(0, side - size, max(net.stride, size // net.stride * net.stride)), side - size]:
            yield start, start + size, start, start + size + 2 * net.margin
    else:
        size = net.fitting(tile)
        around = net.fitting(net.reach)
        for start in range(0, side, size):
            end = min(start + size, side)
            yield start, end, max(0, start - around), min(side, end + around)
