"""Faults and nulls of the methods about training: what stands in a method's file while a control of an experiment runs

What they build on is imported by name, so that it stays what it was while the file's own name is swapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etude.basics.descent import NAMES, curvatures, settings, starts
from etude.optim import momentum
from etude.optim.clipping import clip_by_norm


def clip_all(gradients: list[Tensor], name: str, config: Any) -> list[Tensor]:
    """basics/clipping: every network clipped by norm, the one too that should not be clipped."""
    return clip_by_norm(gradients, config.clip_norm)


def no_momentum(config: Any) -> Any:
    """basics/descent: heavy ball and Nesterov with μ = 0, at gradient descent's rate."""
    rules, rates = settings(config)
    for name, ahead in (("momentum", False), ("nesterov", True)):
        rules[NAMES.index(name)] = momentum.rule(0.0, nesterov=ahead)
        rates[NAMES.index(name)] = rates[0]
    return rules, rates


def without_signs(theta: Tensor, kappa: float, angle: float) -> Tensor:
    """basics/descent: |H|, whose Newton step leaves a saddle (Dauphin et al. 2014)."""
    values, vectors = torch.linalg.eigh(curvatures(theta, kappa, angle))
    return vectors @ torch.diag_embed(values.abs()) @ vectors.mT


def beside_the_ridge(angle: float) -> Tensor:
    """basics/descent: nobody starts on the ridge itself."""
    points = starts(angle)
    points[2, 1] = 1e-3
    return points
