"""Faults and nulls of the methods about risk and its parts: what stands in a method's file while a control runs.

What they build on is imported by name, so that it stays what it was while the file's own name is swapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from etude.basics.bias_variance import Parts, closed_form, decompose


def one_parameter_more(problem: Any, n: int) -> float:
    """basics/risk: the train risk of a fit with d + 1 parameters."""
    return problem.noise**2 * (1 - (len(problem.weight) + 1) / n)


def fixed_inputs(problem: Any, n: int) -> float:
    """basics/risk: the risk at the inputs that were fitted, as if new samples had them too."""
    return problem.noise**2 * (1 + len(problem.weight) / n)


def unbiased_variance(fits: Tensor, truth: Tensor) -> Parts:
    """basics/bias_variance: the variance divides by D − 1, as for an estimate, and the identity is lost."""
    return decompose(fits, truth)._replace(variance=fits.var(0))


def variance_alone(x: Tensor, grid: Tensor, degree: int, noise: float, l2: float = 0.0) -> Parts:
    """basics/bias_variance: a closed form without the bias."""
    form = closed_form(x, grid, degree, noise, l2)
    return Parts(form.variance, torch.zeros_like(form.variance), form.variance)


def unpenalised(likelihood: Callable[..., Tensor], x: Tensor, y: Tensor, l2: float) -> Callable[[Tensor], Tensor]:
    """basics/regularization: the likelihood alone."""
    return lambda theta: likelihood(theta, x, y)


def printed_sign(likelihood: Callable[..., Tensor], x: Tensor, y: Tensor, l2: float) -> Callable[[Tensor], Tensor]:
    """basics/regularization: the notes' "… − λ‖θ‖²" (E04)."""
    return lambda theta: likelihood(theta, x, y) - l2 * theta.square().sum()


def same_number(l2: float) -> float:
    """basics/regularization: weight decay λ, as if it were the penalty's coefficient (E05)."""
    return l2


class Raw:
    """basics/standardization: mean 0 and scale 1 whatever the data."""

    def __init__(self, features: int) -> None:
        self.mean, self.scale = torch.zeros(features), torch.ones(features)

    @classmethod
    def fit(cls, x: Tensor) -> Raw:
        return cls(x.shape[-1])

    def __call__(self, x: Tensor) -> Tensor:
        return x


def by_training_error(errors: Tensor) -> int:
    """basics/regularization: λ is chosen by the training error."""
    return int(errors[..., 0].mean(1).argmin())


def gradient_step(loss: Callable[[Tensor], Tensor], theta: Tensor, lr: float = 1.0) -> Tensor:
    """basics/regularization: steepest descent in place of Newton's step."""
    return theta - lr * torch.func.grad(loss)(theta)
