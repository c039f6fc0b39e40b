"""Training images that live on the device: one gather cuts, moves and mirrors a batch, and nothing waits for it

The whole set lies there once, as bytes (N, H + 2s, W + 2s, C) with a border of the mean pixel; a batch is one indexed
read, whose result is channels_last as convolutions want it. The numbers that choose it are functions of (seed, step),
drawn on the CPU for 64 steps at a time, so an accelerator is told what to do long before it is there.
Of images on the disk (`etude.data.streamed`) the batches come from there instead, cut and mirrored in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etude.core.run import Run
from etude.data.batches import Stream
from etude.data.sets import Images
from etude.data.streamed import Stored, reader

TOGETHER = 64
"""Steps whose random numbers travel to an accelerator in one message."""


def bordered(x: Tensor, border: int, colour: tuple[float, ...]) -> Tensor:
    """(N, C, H, W) uint8 → (N, H + 2 border, W + 2 border, C), the border in `colour` ([0, 1] units, C of them)."""
    n, channels, height, width = x.shape
    pixels = torch.tensor(colour).mul(255).round().to(torch.uint8)
    whole = pixels.expand(n, height + 2 * border, width + 2 * border, channels).contiguous()
    whole[:, border : border + height, border : border + width] = x.permute(0, 2, 3, 1)
    return whole


def cut(whole: Tensor, index: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, height: int, width: int) -> Tensor:
    """Windows height × width of images (N, H', W', C): (B, C, height, width), channels_last.

    Args:
        index, top, left: (B,) int64, which image and where its window begins; mirrored: (B,) int64, 1 turns the window
            left to right.
    """
    down = torch.arange(height, device=whole.device)
    across = torch.arange(width, device=whole.device)
    columns = torch.where(mirrored[:, None] > 0, width - 1 - across, across) + left[:, None]
    rows = down + top[:, None]
    return whole[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(run: Run, data: Images, batch: int, shift: int, flip: bool) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The mini-batch of a step: images (B, C, H, W) uint8 and labels (B,), on the run's device.

    Each image is moved by −shift … shift pixels down and across (the gap shows the mean pixel of the training set, which
    is zero behind `Standardise`: the paper's zero padding) and, with `flip`, mirrored in every other case.
    """
    stream = Stream(len(data.train), batch, run.seed, run.rank, run.world)
    labels = data.train.y.to(run.device)
    height, width = data.train.x.shape[-2:]
    images = reader(data.train.x, stream.indices) if isinstance(data.train.x, Stored) else None
    whole = torch.empty(0) if images else bordered(data.train.x, shift, data.spec.mean).to(run.device)
    rows = torch.arange(batch, device=run.device)
    ahead = 1 if run.device.type == "cpu" else TOGETHER
    held: dict[int, Tensor] = {}

    def drawn(step: int) -> Tensor:
        generator = run.generator("augment", step)
        places = torch.randint(2 * shift + 1, (2, batch), generator=generator)
        turned = torch.randint(2, (1, batch), generator=generator) * int(flip)
        return torch.cat([stream.indices(step)[None], places, turned])

    def at(step: int) -> tuple[Tensor, Tensor]:
        block = step // ahead
        if block not in held:
            held.clear()
            numbers = torch.stack([drawn(block * ahead + number) for number in range(ahead)])
            pinned = numbers.pin_memory() if run.device.type == "cuda" else numbers
            held[block] = pinned.to(run.device, non_blocking=True)
        index, top, left, mirrored = held[block][step % ahead]
        if images is None:
            return cut(whole, index, top, left, mirrored, height, width), labels[index]
        here = bordered(images(step), shift, data.spec.mean).to(run.device)
        return cut(here, rows, top, left, mirrored, height, width), labels[index]

    return at
