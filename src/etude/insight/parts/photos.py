"""A user's photograph, or one that scikit-learn bundles, as a network takes it; and back, with its colours"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from etude import data as room
from etude.core.errors import UserError, nearest
from etude.data.folders import decoded

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue, as JPEG and television weigh them


def photograph(name: str, size: int, flag: str = "--image") -> Tensor:
    """RGB (1, 3, H, W), float in [0, 1]: a file, or "china" or "flower"; its longer side is brought to `size` pixels.

    Raises UserError, naming the flag, where there is no such file or it is no picture.
    """
    bundled = room.photographs()
    if name in bundled:
        x = torch.tensor(bundled[name]).permute(2, 0, 1)
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(
                f"{flag} {name} {what}{nearest(name, bundled) or '.'} Name a picture, or one of: {', '.join(bundled)}"
            )
        x = torch.tensor(decoded(path, None, grey=False))
    x = x[None].to(torch.get_default_dtype()) / 255
    scale = size / max(x.shape[2:])
    return resized(x, (max(1, round(x.shape[2] * scale)), max(1, round(x.shape[3] * scale))))


def resized(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N, C, H, W) → (N, C, *shape), bilinear, with averaging where it shrinks; the same tensor where nothing changes."""
    if tuple(x.shape[2:]) == tuple(shape):
        return x
    return F.interpolate(x, size=shape, mode="bilinear", antialias=True, align_corners=False)


def entering(x: Tensor, channels: int) -> Tensor:
    """RGB (N, 3, H, W) as a network of `channels` takes it: itself, or its lightness (N, 1, H, W)."""
    if channels not in (1, 3):
        raise UserError(f"a picture has 3 channels or 1, and this network takes {channels}")
    return x if channels == 3 else (x * torch.tensor(LUMA).to(x).view(1, 3, 1, 1)).sum(1, keepdim=True)


def leaving(x: Tensor, photo: Tensor) -> Tensor:
    """Back to RGB: x itself, or, of lightness x, what has the colours (the differences from the lightness) of `photo`."""
    return x if x.shape[1] == 3 else (x + photo - entering(photo, 1)).clamp(0, 1)
