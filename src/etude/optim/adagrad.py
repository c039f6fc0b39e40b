"""AdaGrad: divide each coordinate by the root of the sum of all its squared gradients

Paper: Duchi, Hazan & Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR 2011.

Equation: s_k = s_{k−1} + g_k², s_0 = 0;  θ_{k+1} = θ_k − α g_k / (√s_k + ε), element by element.
On convex losses with |θ_i − θ*_i| ≤ D and α = D/√2 the regret is at most √2 D Σ_i √(Σ_k g²_{k,i}) (Theorem 5).

Differences:
- E09: the notes divide by √s alone; ε (1e-10, as in torch) is added outside the root.
- No `lr_decay` and no `initial_accumulator_value`: `etude.optim.schedules` does the first, and s_0 = 0 is the paper.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from etude.optim.chain import Bucket, Chain, Kernel, Rule, chain, l2, nonnegative, over_root


def rule(eps: float = 1e-10, weight_decay: float = 0.0) -> Rule:
    """u = g / (√s + ε), s the sum of g²."""
    return chain(l2(weight_decay), over_root(None, eps, slot="sum"))


class AdaGrad(Chain):
    """AdaGrad in torch's names."""

    checks: ClassVar = {"eps": nonnegative, "weight_decay": nonnegative}
    absent: ClassVar = {"lr_decay": 0.0, "initial_accumulator_value": 0.0, "maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, fused=fused)

    def rule(self, group: dict[str, Any]) -> Rule:
        return rule(group["eps"], group["weight_decay"])

    def _kernel(self, group: dict[str, Any]) -> Kernel:
        def kernel(bucket: Bucket) -> None:
            torch._fused_adagrad_(  # pyright: ignore[reportPrivateImportUsage]
                bucket.parameters,
                bucket.gradients,
                bucket.slot("sum"),
                bucket.steps,
                lr=float(group["lr"]),
                lr_decay=0.0,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

        return kernel
