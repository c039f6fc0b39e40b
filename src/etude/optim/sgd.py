"""Gradient descent: step against the gradient of all examples, of one, or of a mini-batch

Paper: Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847; Robbins & Monro, A
Stochastic Approximation Method, 1951; Bottou, Stochastic Gradient Descent Tricks, 2012.

Equation: θ_{k+1} = θ_k − α g_k, where g_k is ∇L(θ_k) (batch), ∇ℓ_i (stochastic) or (1/|B|) Σ_{i∈B} ∇ℓ_i (mini-batch).
On L = ½ θᵀHθ this is θ_k = (I − αH)ᵏ θ_0, which converges exactly when α < 2 / λ_max(H).

Differences:
- E07: "always converges to the global minimum" for logistic regression needs a finite minimiser. On separable data
  the infimum 0 is not attained and ‖θ‖ grows for ever; add an L2 term.
- E12: the notes' mini-batch line averages −log p itself; it is the gradients that are averaged, ∇_θ log p.
- E13: the notes shuffle once "in advance". `minibatch` reshuffles every epoch, draws without replacement inside one
  (so the variance carries the factor (N−B)/(N−1)), and says what happens to the last partial batch.
- Bit-equal to `torch.optim.SGD` (momentum 0) in every dtype.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from etude.core.randomness import fold
from etude.optim.chain import Bucket, Chain, Kernel, Rule, chain, l2, nonnegative


def rule(weight_decay: float = 0.0) -> Rule:
    """u = g (+ λθ)."""
    return chain(l2(weight_decay))


class SGD(Chain):
    """θ ← θ − α(g + λθ), with λ = `weight_decay`; the gradient of an added (λ/2)‖θ‖²."""

    checks: ClassVar = {"weight_decay": nonnegative}
    absent: ClassVar = {"momentum": 0.0, "dampening": 0.0, "maximize": False}

    def __init__(self, params: ParamsT, lr: float = 1e-3, *, weight_decay: float = 0.0, fused: bool | None = None):
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=fused)

    def rule(self, group: dict[str, Any]) -> Rule:
        return rule(group["weight_decay"])

    def _kernel(self, group: dict[str, Any]) -> Kernel:
        def kernel(bucket: Bucket) -> None:
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                bucket.parameters,
                bucket.gradients,
                [],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

        return kernel


def minibatch(
    count: int, size: int, step: int, seed: int, last: Literal["keep", "drop"] = "keep", shuffle: bool = True
) -> Tensor:
    """Indices of the mini-batch of `step` (0, 1, …): (size,) int64, or fewer for the last of an epoch when kept.

    A pure function of its arguments: epoch e = step // batches-per-epoch is one permutation of `count` examples, fixed
    by (seed, e). `size` = `count` is batch gradient descent, `size` = 1 the stochastic one.
    Raises ValueError unless 1 ≤ size ≤ count and step ≥ 0.
    """
    if not 1 <= size <= count or step < 0:
        raise ValueError(f"need 1 <= size <= count and step >= 0, got size={size}, count={count}, step={step}")
    per_epoch = count // size if last == "drop" else -(-count // size)
    epoch, position = divmod(step, per_epoch)
    window = slice(position * size, (position + 1) * size)
    if not shuffle:
        return torch.arange(count)[window]
    generator = torch.Generator().manual_seed(fold(seed, epoch, 0, "shuffle"))
    return torch.randperm(count, generator=generator)[window]
