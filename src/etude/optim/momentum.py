"""Momentum: add up the gradients, so that directions which disagree cancel

Paper: Polyak, Some methods of speeding up the convergence of iteration methods, 1964; Sutskever, Martens, Dahl &
Hinton, On the importance of initialization and momentum in deep learning, 2013 (the Nesterov form, equations 3-4).

Equation: b_k = g_k + μ b_{k−1}, b_0 = 0;  θ_{k+1} = θ_k − α b_k  (heavy ball), or θ_k − α(g_k + μ b_k)  (Nesterov).
On a quadratic of condition number κ the best (α, μ) contract by (√κ−1)/(√κ+1) a step instead of (κ−1)/(κ+1).

Differences:
- The sum form of the notes and of torch. The averaged form b = μb + (1−μ)g is the same with α divided by 1 − μ.
- The rule is bit-equal to `torch.optim.SGD(momentum=μ, foreach=False)` and the kernel to `torch.optim.SGD(fused=True)`;
  the two differ by the last bit of b where the compiler joins a multiplication and an addition.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from etude.optim.chain import Bucket, Chain, Kernel, Rule, accumulate, chain, fraction, l2, nonnegative


def rule(momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> Rule:
    """b ← μb + g; u = b, or u = g + μb (Nesterov)."""
    return chain(l2(weight_decay), accumulate(momentum, nesterov))


class Momentum(Chain):
    """Heavy ball or Nesterov's form; α and μ are not independent: the step on a constant g tends to α g / (1 − μ)."""

    checks: ClassVar = {"momentum": fraction, "weight_decay": nonnegative}
    absent: ClassVar = {"dampening": 0.0, "maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)

    def rule(self, group: dict[str, Any]) -> Rule:
        return rule(group["momentum"], group["nesterov"], group["weight_decay"])

    def _kernel(self, group: dict[str, Any]) -> Kernel:
        momentum = group["momentum"]

        def kernel(bucket: Bucket) -> None:
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                bucket.parameters,
                bucket.gradients,
                bucket.slot("momentum_buffer") if momentum else [],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                momentum=momentum,
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,  # b_0 is zero, so the first step is like the others
            )

        return kernel
