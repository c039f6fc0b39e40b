"""Convolutions in a row and the middle of maps, as every network of this room has them."""

from __future__ import annotations

from torch import Tensor, nn

from etude.blocks.nn.norm import BatchNorm


def convolutions(
    before: int, after: int, count: int = 2, padding: str = "same", normalizer: str = "none", transposed: bool = False
) -> nn.Sequential:
    """`count` 3×3 convolutions with ReLUs: (N, before, H, W) → (N, after, H, W), or H − 2 count with `padding` "valid".

    `normalizer` "batch" puts batch normalisation before each ReLU, in place of a bias. `transposed`: transposed convolutions
    with stride 1 that keep the sides.
    """
    layers: list[nn.Module] = []
    for maps in [before] + [after] * (count - 1):
        bias = normalizer == "none"
        if transposed:
            layers += [nn.ConvTranspose2d(maps, after, 3, padding=1, bias=bias)]
        else:
            layers += [nn.Conv2d(maps, after, 3, padding=padding, bias=bias)]
        layers += [BatchNorm(after)] if normalizer == "batch" else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def cropped(maps: Tensor, like: Tensor) -> Tensor:
    """The middle of maps (N, C, H, W), of the height and width of `like`."""
    top, left = ((a - b) // 2 for a, b in zip(maps.shape[-2:], like.shape[-2:]))
    return maps[..., top : top + like.shape[-2], left : left + like.shape[-1]]
