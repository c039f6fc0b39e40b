"""RMSProp: divide each coordinate by a running root mean square of its gradients

Paper: Tieleman & Hinton, Neural Networks for Machine Learning, lecture 6.5, 2012.

Equation: s_k = β s_{k−1} + (1 − β) g_k², s_0 = 0;  θ_{k+1} = θ_k − α g_k / (√s_k + ε), element by element.

Differences:
- E09: the notes divide by √s alone, which is 0/0 for a coordinate without a gradient; ε is added outside the root.
- No bias correction, as in the lecture: the first step is α / √(1 − β) for any g much larger than ε.
- torch's names: β is `alpha`, the default 0.99; the equal of `torch.optim.RMSprop(centered=False, momentum=0)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from etude.optim.chain import Bucket, Chain, Kernel, Rule, blocks, chain, fraction, l2, nonnegative, over_root


def rule(alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0) -> Rule:
    """u = g / (√s + ε), s the running mean of g²."""
    return chain(l2(weight_decay), over_root(alpha, eps, slot="square_avg"))


class RMSProp(Chain):
    """RMSProp in torch's names (`alpha` is β)."""

    checks: ClassVar = {"alpha": fraction, "eps": nonnegative, "weight_decay": nonnegative}
    absent: ClassVar = {"centered": False, "momentum": 0.0, "maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, fused=fused)

    def rule(self, group: dict[str, Any]) -> Rule:
        return rule(group["alpha"], group["eps"], group["weight_decay"])

    def _kernel(self, group: dict[str, Any]) -> Kernel:
        alpha, eps, weight_decay, lr = group["alpha"], group["eps"], group["weight_decay"], float(group["lr"])

        def of_adam(bucket: Bucket) -> None:
            """Adam's kernel at β₁ = 0, where m is g: so g stands in m's place too and is written back as it was.

            Its corrections 1 − βᵏ are 1 at a step k without end.
            """
            never = [torch.full_like(bucket.steps[0], 1e30)] * len(bucket.steps)
            squares, g = bucket.slot("square_avg"), bucket.gradients
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                bucket.parameters,
                g,
                g,
                squares,
                [],
                never,
                lr=lr,
                beta1=0.0,
                beta2=alpha,
                weight_decay=0.0,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )

        def in_place(bucket: Bucket) -> None:
            """Operation by operation, for Adam's kernel would write λθ into the gradient."""
            for tensors in zip(bucket.parameters, bucket.gradients, bucket.slot("square_avg"), strict=True):
                for theta, g, square in blocks(*tensors):
                    g = g.add(theta, alpha=weight_decay)
                    square.mul_(alpha).addcmul_(g, g, value=1 - alpha)
                    theta.addcdiv_(g, square.sqrt().add_(eps), value=-lr)

        return in_place if weight_decay else of_adam
