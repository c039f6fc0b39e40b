"""Newton's method: jump to the minimum of the local quadratic, with damping for where that is not a minimum

Paper: Nocedal & Wright, Numerical Optimization, chapter 3; Levenberg, A Method for the Solution of Certain Non-Linear
Problems in Least Squares, 1944 (H + λI); Dauphin et al., Identifying and attacking the saddle point problem, 2014,
arXiv:1406.2572 (|H|).

Equation: L(θ) ≈ L(θ_k) + ∇Lᵀ(θ − θ_k) + ½ (θ − θ_k)ᵀ H (θ − θ_k), so  θ_{k+1} = θ_k − α B⁻¹ ∇L(θ_k) with
    B = H           plain: the critical point of the quadratic, whatever its kind
    B = H + λI      Levenberg: descends once λ > −λ_min(H); towards gradient descent with rate α/λ as λ grows
    B = |H| + λI    saddle-free: |H| has H's eigenvectors and the absolute eigenvalues, so every step descends

Differences:
- E08: the notes write ∇L(θ − θ_0) without the transpose and solve without a condition. The step descends only where
  H is positive definite; elsewhere plain Newton converges to saddles and maxima, which `damping` or `absolute`
  prevents. O(n) against O(n³) is the cost of one iteration in the number n of parameters; the Hessian takes n² memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from etude.optim.chain import Rule, Signal, State, chain, nonnegative, update


def solve(hessian: Tensor, gradient: Tensor, damping: float = 0.0, absolute: bool = False) -> Tensor:
    """B⁻¹ g for a symmetric (n, n) `hessian` and an (n,) `gradient`.

    RuntimeError when B is singular, and for a dtype that is neither float32 nor float64.
    """
    if hessian.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"Newton's method solves in float32 or float64, not in {hessian.dtype}")
    if absolute:
        values, vectors = torch.linalg.eigh(hessian)
        scale = values.abs() + damping
        direction = vectors @ ((vectors.T @ gradient) / scale)
    else:
        shifted = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        direction, _ = torch.linalg.solve_ex(shifted, gradient)
    if not bool(direction.isfinite().all()):
        raise RuntimeError("the Hessian is singular or not finite here: give Newton a damping > 0, or a smaller step")
    return direction


def rule(hessian: Tensor, damping: float = 0.0, absolute: bool = False) -> Rule:
    """u = B⁻¹ g: the one link whose scaling is a matrix, so θ and g are whole (n,) vectors."""

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        return signal._replace(update=solve(hessian, signal.update, damping, absolute)), dict(state)

    return chain(link)


def newton_step(
    loss: Callable[[Tensor], Tensor], theta: Tensor, lr: float = 1.0, damping: float = 0.0, absolute: bool = False
) -> Tensor:
    """One pure step of the scalar function `loss` at the (n,) vector `theta`, its derivatives by `torch.func`."""
    gradient = torch.func.grad(loss)(theta)
    hessian = torch.func.jacrev(torch.func.grad(loss))(theta)
    return update(rule(hessian, damping, absolute), theta, gradient, {}, 1, lr)[0]


class Newton(torch.optim.Optimizer):
    """Newton's method on any module: `step(closure)`, where the closure returns the loss and does *not* call backward.

    All parameters form one vector, so there is one parameter group (as in `torch.optim.LBFGS`). The Hessian comes from
    differentiating twice, all rows at once. Raises ValueError for a setting out of range or several groups,
    RuntimeError for a singular Hessian or parameters in another dtype than float32 and float64.
    """

    takes_loss: ClassVar = True
    """`step` is given the loss and differentiates it, instead of reading gradients."""

    def __init__(self, params: ParamsT, lr: float = 1.0, *, damping: float = 0.0, absolute: bool = False):
        nonnegative("lr", lr)
        nonnegative("damping", damping)
        super().__init__(params, {"lr": lr, "damping": damping, "absolute": absolute})
        if len(self.param_groups) > 1:
            raise ValueError("Newton's method takes one parameter group: its Hessian couples all parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step and return the loss before it."""
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.requires_grad]
        with torch.enable_grad():
            loss = closure()
            gradient, hessian = derivatives(loss, parameters)
        theta = torch.cat([parameter.reshape(-1) for parameter in parameters])
        newton = rule(hessian, group["damping"], group["absolute"])
        theta, _ = update(newton, theta, gradient, {}, 1, float(group["lr"]))
        pieces = theta.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.view(parameter.shape))
        return loss.detach()


def derivatives(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(n,) gradient and (n, n) Hessian of the scalar `loss` in all `parameters`, flattened and joined in order."""
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([slope.reshape(-1) for slope in slopes])
    count = len(gradient)
    if not gradient.requires_grad:  # a loss that is linear in every parameter
        return gradient, gradient.new_zeros(count, count)
    rows: Any = torch.autograd.grad(
        gradient, parameters, torch.eye(count).to(gradient), is_grads_batched=True, allow_unused=True
    )
    columns = [
        gradient.new_zeros(count, parameter.numel()) if row is None else row.reshape(count, -1)
        for row, parameter in zip(rows, parameters, strict=True)
    ]
    return gradient.detach(), torch.cat(columns, dim=1)
