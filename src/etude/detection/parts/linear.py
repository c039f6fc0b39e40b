"""Linear classifiers and regressions in closed form or by Newton's method: what R-CNN puts on its features

Equation: squared hinge, ½ (‖w‖² + b²) + c Σ max(0, 1 − y (w·x + b))²; ridge, Σ ‖t − V x − v‖² + λ ‖V‖².
"""

from __future__ import annotations

import torch
from torch import Tensor


def support_vectors(x: Tensor, sign: Tensor, slack: float, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """x (n, D), sign (n,) of ±1 → w (D,) and b (): the minimum, by Newton's method with halved steps.

    The objective is convex and piecewise quadratic, so that a full step from the right set of vectors inside the margin ends it.
    Without an example of one of the signs the minimum is found as well (all weight in the constant).
    """
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    weight = x.new_zeros(x.shape[1])

    def value(at: Tensor) -> Tensor:
        return 0.5 * at @ at + slack * (1 - sign * (x @ at)).clamp(min=0).square().sum()

    now = value(weight)
    for _ in range(200):
        gap = 1 - sign * (x @ weight)
        inside = gap > 0
        rows = x[inside]
        slope = weight - 2 * slack * rows.T @ (sign[inside] * gap[inside])
        if slope.abs().max() <= tolerance * max(1.0, slack):
            break
        curve = 2 * slack * rows.T @ rows
        curve.diagonal().add_(1.0)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        then = value(weight - step)
        while size > 1e-8 and then > now - 1e-4 * size * slope @ step:
            size /= 2
            then = value(weight - size * step)
        if size <= 1e-8:
            break
        weight, now = weight - size * step, then
    return weight[:-1], weight[-1]


def ridge(x: Tensor, target: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """x (n, D), target (n, T) → V (T, D) and v (T,), the constant outside the penalty; zeros where there is no example."""
    if not len(x):
        return x.new_zeros(target.shape[1], x.shape[1]), x.new_zeros(target.shape[1])
    middle, aim = x.mean(0), target.mean(0)
    centred = x - middle
    curve = centred.T @ centred
    curve.diagonal().add_(shrink)
    weight = torch.linalg.solve(curve, centred.T @ (target - aim)).T
    return weight, aim - weight @ middle
