"""L-BFGS on one tensor: the direction from the last steps, and a search that mostly evaluates once

Paper: Nocedal & Wright, Numerical Optimization, algorithms 7.4 (two loops) and 3.1 (backtracking).

Equation: d = −H g, with H the inverse Hessian that the pairs s = x' − x, y = g' − g imply, begun with (sᵀy / yᵀH₀y) H₀
    x ← x + t d, t the first of 1, then shorter ones, with f(x + t d) ≤ f(x) + 10⁻⁴ t gᵀd
The value and gradient of the point that is taken are those of the next step: one evaluation a step where t = 1 will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etude.core.checkpoint import Box

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x → f(x), 0-dim, and its gradient, of the shape of x; both detached."""
Preconditioner = Callable[[Tensor], Tensor]
"""q → H₀ q of the shape of x, linear, symmetric and positive: what is known of the inverse Hessian beforehand, to a factor."""


def begin(x: Tensor, evaluate: Evaluate, history: int) -> Box:
    """All that a step needs and changes; to be tracked. `history` pairs are kept."""
    value, gradient = evaluate(x)
    pairs = x.new_zeros(2, history, x.numel())
    return Box(x=x.clone(), value=value.clone(), gradient=gradient.clone(), pairs=pairs, count=0, evaluations=1)


def spectral(example: Tensor, power: float) -> Preconditioner:
    """H₀ = |frequency|^−power in cycles a pixel over the last two axes of `example`, at least those of one cycle a side.

    Large areas change before small grain does. For power 0: the identity, without a transform.
    """
    height, width = example.shape[-2:]
    if not power:
        return lambda q: q
    like = {"dtype": example.dtype, "device": example.device}
    down, across = torch.fft.fftfreq(height, **like), torch.fft.rfftfreq(width, **like)
    weight = torch.hypot(down.unsqueeze(1), across).clamp(min=1 / max(height, width)) ** -power
    return lambda q: torch.fft.irfft2(torch.fft.rfft2(q) * weight, s=(height, width))


def direction(gradient: Tensor, pairs: Tensor, count: int, precondition: Preconditioner = lambda q: q) -> Tensor:
    """−H g of the newest of `count` pairs (2, m, P); the pair of number n lies in row n mod m. gradient: any shape, P numbers."""
    s, y = pairs
    q = gradient.flatten().clone()
    rows = [n % s.shape[0] for n in range(max(0, count - s.shape[0]), count)]
    kept = []
    for k in reversed(rows):
        rho = 1 / torch.dot(y[k], s[k])
        a = rho * torch.dot(s[k], q)
        q -= a * y[k]
        kept.append((a, rho))
    q = precondition(q.view_as(gradient)).flatten()
    if rows:
        newest = rows[-1]
        tilted = precondition(y[newest].view_as(gradient)).flatten()
        q *= torch.dot(s[newest], y[newest]) / torch.dot(y[newest], tilted)
    for k, (a, rho) in zip(rows, reversed(kept)):
        q += (a - rho * torch.dot(y[k], q)) * s[k]
    return -q.view_as(gradient)


def step(
    state: Box, evaluate: Evaluate, first: float, precondition: Preconditioner = lambda q: q, most: int = 15
) -> None:
    """One step, in place; of the first one the mean change of an entry is `first`. Without descent x stays and the pairs go."""
    d = direction(state.gradient, state.pairs, state.count, precondition)
    slope = torch.dot(d.flatten(), state.gradient.flatten())
    if not float(slope) < 0:
        state.count = 0
        d = -state.gradient
        slope = -state.gradient.pow(2).sum()
    t = 1.0 if state.count else first / max(float(d.abs().mean()), 1e-30)
    for _ in range(most):
        x = state.x + t * d
        value, gradient = evaluate(x)
        state.evaluations += 1
        if float(value) <= float(state.value + 1e-4 * t * slope):
            break
        t *= 0.3
    else:
        state.count = 0
        return
    s, y = (x - state.x).flatten(), (gradient - state.gradient).flatten()
    if float(torch.dot(s, y)) > 1e-10 * float(torch.dot(y, y)):
        row = state.count % state.pairs.shape[1]
        state.pairs[0, row], state.pairs[1, row] = s, y
        state.count += 1
    state.x, state.value, state.gradient = x, value, gradient
