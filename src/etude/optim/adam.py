"""Adam: momentum divided by the root of the gradients' second moment, both corrected for their zero start

Paper: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2014, arXiv:1412.6980; Loshchilov & Hutter, Decoupled
Weight Decay Regularization, 2017, arXiv:1711.05101 (AdamW).

Equation: with g_k = ∇L(θ_k) and m_0 = v_0 = 0,
    m_k = β₁ m_{k−1} + (1 − β₁) g_k        m̂_k = m_k / (1 − β₁ᵏ)
    v_k = β₂ v_{k−1} + (1 − β₂) g_k²       v̂_k = v_k / (1 − β₂ᵏ)
    θ_{k+1} = θ_k − α m̂_k / (√v̂_k + ε)     (AdamW: − αλθ_k as well)

Differences:
- E10: ε stands outside the root: at g = 1e-8 = ε the first step is exactly α/2.
- E11: the notes say that without the correction early steps are very small, and that the correction blows them up. m
  and v are small, but the step is m/√v: uncorrected it is 3.16 α at k = 1 and 6.57 α at its largest (k = 12) for a
  constant gradient, with the default betas. The correction makes early steps *smaller*: exactly α.
- `weight_decay` is the L2 term inside the gradient (as in `torch.optim.Adam`), which the division rescales;
  `AdamW` decays θ beside the step. `corrected=False` exists to show E11.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from etude.optim.chain import (
    Bucket,
    Chain,
    Kernel,
    Rule,
    average,
    chain,
    decay,
    l2,
    nonnegative,
    over_root,
    two_fractions,
)


def rule(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    corrected: bool = True,
) -> Rule:
    """u = m̂ / (√v̂ + ε) (+ λθ when `decoupled`, which is AdamW)."""
    return chain(
        None if decoupled else l2(weight_decay),
        average(betas[0], corrected),
        over_root(betas[1], eps, corrected),
        decay(weight_decay) if decoupled else None,
    )


class Adam(Chain):
    """Adam with torch's names and defaults; `decoupled_weight_decay=True` is AdamW."""

    checks: ClassVar = {"betas": two_fractions, "eps": nonnegative, "weight_decay": nonnegative}
    absent: ClassVar = {"amsgrad": False, "maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        corrected: bool = True,
        fused: bool | None = None,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            corrected=corrected,
            fused=fused,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("corrected", True)

    def rule(self, group: dict[str, Any]) -> Rule:
        return rule(
            group["betas"], group["eps"], group["weight_decay"], group["decoupled_weight_decay"], group["corrected"]
        )

    def _kernel(self, group: dict[str, Any]) -> Kernel | None:
        if not group["corrected"]:
            return None
        fused = getattr(torch, "_fused_adamw_" if group["decoupled_weight_decay"] else "_fused_adam_")
        beta1, beta2 = group["betas"]

        def kernel(bucket: Bucket) -> None:
            fused(
                bucket.parameters,
                bucket.gradients,
                bucket.slot("exp_avg"),
                bucket.slot("exp_avg_sq"),
                [],
                bucket.steps,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

        return kernel


class AdamW(Adam):
    """θ ← (1 − αλ)θ − α m̂ / (√v̂ + ε)."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool | None = None,
    ):
        super().__init__(
            params, lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True, fused=fused
        )
