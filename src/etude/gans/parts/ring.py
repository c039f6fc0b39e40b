"""Eight Gaussians on a circle: a distribution known exactly, whose modes can be counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES, RADIUS, SIGMA = 8, 2.0, 0.05
ENOUGH = 0.25
"""Share of its fair share of the samples from which a mode, or a class of images, counts as covered."""


def centres() -> Tensor:
    """(8, 2) the modes: evenly on a circle of radius 2, the first at (2, 0)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def ring(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 2) draws of the mixture of eight Gaussians of deviation 0.05 on the ring, in torch's default dtype."""
    which = torch.randint(MODES, (count,), generator=generator)
    return centres()[which] + SIGMA * torch.randn(count, 2, generator=generator)


def moments() -> tuple[Tensor, Tensor]:
    """Mean (2,) and covariance (2, 2) of the mixture, float64: 0, and the same variance in every direction."""
    return torch.zeros(2).double(), (RADIUS**2 / 2 + SIGMA**2) * torch.eye(2).double()


def ring_scores(samples: Tensor) -> dict[str, float]:
    """Of samples (N, 2): `modes`, how many of the eight get at least N/32 of them within 3σ, and `share`, the share of
    all within 3σ of any mode. The mixture itself has 8 and 1 − e^−4.5 = 0.989."""
    near, which = torch.cdist(samples.float().cpu(), centres().float()).min(1)
    inside = torch.bincount(which[near <= 3 * SIGMA], minlength=MODES)
    covered = inside >= ENOUGH * len(samples) / MODES
    return {"modes": float(covered.sum()), "share": int(inside.sum()) / len(samples)}
