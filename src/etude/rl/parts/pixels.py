"""The network that looks at screens: three convolutions, then dense layers, ReLU behind each (Mnih et al., Nature 518, 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude.blocks.nn.init import orthogonal
from etude.core.errors import UserError

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""(planes, side of the kernel, stride) of each."""


class Bytes(nn.Module):
    """Bytes 0 … 255 as numbers 0 … 1 in torch's default dtype; what is no bytes stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return floats(x, torch.get_default_dtype())


def floats(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes 0 … 255 as numbers 0 … 1; what is no bytes stays as it is."""
    return x.to(dtype).mul_(1 / 255) if x.dtype == torch.uint8 else x


def sides(shape: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of what is seen, (C, H, W), and behind each convolution. Raises UserError below 36 pixels."""
    found = [(int(shape[1]), int(shape[2]))]
    for _, kernel, stride in CONVOLUTIONS:
        height, width = found[-1]
        found.append(((height - kernel) // stride + 1, (width - kernel) // stride + 1))
    if min(found[-1]) < 1:
        raise UserError(
            f"the images observed have {shape[1]} × {shape[2]} pixels, and the convolutions need 36 × 36 at least"
        )
    return found


def flat_size(shape: Sequence[int]) -> int:
    """Numbers behind the last convolution: 3136 of 84 × 84 pixels."""
    height, width = sides(shape)[-1]
    return CONVOLUTIONS[-1][0] * height * width


def convolutions(shape: Sequence[int], widths: Sequence[int]) -> nn.Sequential:
    """Images (N, C, H, W), bytes or numbers → (N, last of `widths`), or `flat_size` numbers without dense layers.

    Initial weights orthogonal with gain √2, biases 0.
    """
    size, planes = flat_size(shape), int(shape[0])
    parts: list[nn.Module] = [Bytes()]
    for out, kernel, stride in CONVOLUTIONS:
        parts += [nn.Conv2d(planes, out, kernel, stride), nn.ReLU()]
        planes = out
    parts.append(nn.Flatten())
    for width in widths:
        parts += [nn.Linear(size, width), nn.ReLU()]
        size = width
    for part in parts:
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            orthogonal(part.weight.data.view(len(part.weight), -1), math.sqrt(2.0))
            nn.init.zeros_(part.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(*parts)
