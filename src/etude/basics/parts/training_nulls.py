"""Faults and nulls of the methods about training: what stands in a method's file while a control of an experiment runs

What they build on is imported by name, so that it stays what it was while the file's own name is swapped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from etude.basics.backprop.engine import Node
from etude.basics.descent import NAMES, curvatures, settings, starts
from etude.basics.gradient_noise import draw
from etude.basics.initialization import deviation, passes
from etude.blocks.nn.norm import Standardise
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


def always_with(total: int, size: int, count: int, replacement: bool, generator: torch.Generator) -> Tensor:
    """basics/gradient_noise: every batch drawn with replacement."""
    return draw(total, size, count, True, generator)


def always_without(total: int, size: int, count: int, replacement: bool, generator: torch.Generator) -> Tensor:
    """basics/gradient_noise: every batch drawn without replacement, as in an epoch."""
    return draw(total, size, count, False, generator)


def half_the_rate(learning_rate: float) -> float:
    """basics/gradient_noise: α/2, which is the stationary variance to first order only."""
    return learning_rate / 2


def variance(function: str) -> float:
    """basics/initialization: Var relu(z) = (½ − 1/2π) Var z followed through the layers, in place of E relu(z)² = ½ E z²."""
    return 0.5 - 1 / (2 * math.pi) if function == "relu" else passes(function)


def squared(name: str, width: int) -> float:
    """basics/initialization: the notes' N(0, .0001) taken for a standard deviation (E16)."""
    return 0.0001 if name == "small" else deviation(name, width)


def wall(a: Node) -> Node:
    """basics/backprop: a ReLU that passes nothing back, so that only the last layer learns."""
    return Node(a.value.clamp(min=0), "relu", (a, torch.zeros_like))


def straight_through(a: Node) -> Node:
    """basics/backprop: a ReLU that passes δ back as it is, without its Jacobian."""
    return Node(a.value.clamp(min=0), "relu", (a, lambda d: d))


class Raw(Standardise):
    """basics/initialization: pixels in [0, 1] as they are."""

    @classmethod
    def fit(cls, x: Tensor) -> Raw:
        return cls(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
