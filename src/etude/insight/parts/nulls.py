"""Maps, and checks of maps, that know nothing of the network: what a measure of a map must tell from a real one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def centre_blob(x: Tensor) -> Tensor:
    """The same round blob in the middle of every image, the shape of x (N, C, H, W): 1 at the centre, 0.14 at the edges."""
    rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    return torch.exp(-2 * (rows[:, None] ** 2 + columns**2)).expand_as(x)


def not_shuffled(model: nn.Module, generator: torch.Generator, last_only: bool = False) -> nn.Module:
    """In place of `shuffled`: the network itself, so that a map is compared with itself."""
    return model
