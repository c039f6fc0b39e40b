"""Random changes of whole batches: shift, crop, flip. Pure, vectorised, the randomness is an argument.

Every function takes `x` (B, C, H, W) of any dtype on any device and returns a new tensor of the same dtype and device;
each image of the batch gets its own random numbers, drawn on the CPU from `generator`, so that a step gives the same
pictures on every device. `Run.generator("augment", step)` makes such a generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop(x: Tensor, padding: int, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Pad every side with `padding` zeros and cut a window of size × size (default H × W) at a random place.

    Every one of the (H + 2 padding − h + 1)(W + 2 padding − w + 1) places is equally likely; this is the crop of the
    CIFAR-10 recipe (He et al. 2015, arXiv:1512.03385, §4.2) for padding 4. Raises `ValueError` when the window is
    larger than the padded image.
    """
    height, width = (size, size) if size else x.shape[-2:]
    padded = F.pad(x, (padding,) * 4)
    down, across = padded.shape[-2] - height + 1, padded.shape[-1] - width + 1
    if down < 1 or across < 1:
        raise ValueError(f"cannot cut {height}×{width} from {padded.shape[-2]}×{padded.shape[-1]} pixels")
    top = torch.randint(down, (len(x),), generator=generator).to(x.device)
    left = torch.randint(across, (len(x),), generator=generator).to(x.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, down, across, h, w), a view
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move every image by −most … most pixels down and across, independently and uniformly; zeros fill the gap."""
    return crop(x, most, generator)


def flip(x: Tensor, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """Mirror each image left to right with the given probability. Not for digits or letters."""
    turned = torch.rand(len(x), generator=generator).to(x.device) < probability
    return torch.where(turned[:, None, None, None], x.flip(-1), x)
