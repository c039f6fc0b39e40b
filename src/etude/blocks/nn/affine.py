"""x·W + b by the faster of torch's two kernels on a CPU, and weights laid out once for a few rows again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Linear", "affine", "pack"]


class Linear(nn.Linear):
    """x·Wᵀ + b by the kernels of `affine`."""

    def forward(self, input: Tensor) -> Tensor:
        return affine(input, self.weight.t(), self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x·W + b: x (..., I), W (I, O), b (O) → (..., O), differentiable once by oneDNN's kernels on a CPU.

    torch sends float32 products on a CPU to MKL. On the AMD EPYC where this was measured oneDNN, which torch ships
    too, is about twice as fast at the same precision (other processors were not measured). Everywhere else this is
    `torch.addmm` (in bfloat16 torch goes to oneDNN by itself).

    Args:
        packed: `pack(weight, rows)`, used when x has as many rows as it was packed for; then there is no gradient.
    """
    rows = x.flatten(0, -2)
    if packed is not None:
        return _onednn(rows, packed, bias).unflatten(0, x.shape[:-1])
    large = rows.shape[0] >= 32  # below, laying W out for the kernel costs more than the kernel saves
    if large and x.dtype == torch.float32 and _takes_onednn(x) and not torch.is_autocast_enabled("cpu"):
        out = _Product.apply(rows, weight, bias)
    else:
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    shape = (*x.shape[:-1], out.shape[-1])
    # as torch's own product does: `out` is new, and FSDP warns of a module that returns a view
    return torch.ops.aten._unsafe_view(out, shape) if torch.is_grad_enabled() else out.view(shape)


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """W (I, O) laid out as oneDNN's kernel wants it for x of `rows` rows; None where `affine` is as fast without.

    A copy: later changes of the weight do not reach it. It saves the layout work in every call, worth it when the same
    weights multiply a few rows again and again.
    """
    if not _takes_onednn(weight) or (rows == 1 and weight.dtype == torch.float32):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().t(), rows)


class _Product(torch.autograd.Function):
    """x·W + b and its two products backwards, each by oneDNN; x (M, I), W (I, O), b (O) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = _onednn(grad, weight) if needs[0] else None
        grad_weight = None
        if needs[1]:  # xᵀ·g, or (gᵀ·x)ᵀ: the left factor is copied, so it should be the smaller one
            narrow = x.shape[1] <= grad.shape[1]
            grad_weight = _onednn(x.t(), grad.t()) if narrow else _onednn(grad.t(), x.t()).t()
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, I) times the transpose of weight (O, I), plus bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
)


def _takes_onednn(x: Tensor) -> bool:
    fits = _HAS_ONEDNN and x.device.type == "cpu" and x.numel() > 0
    if x.dtype == torch.bfloat16:  # oneDNN refuses it on processors that lack the instructions
        fits = fits and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif x.dtype != torch.float32:
        return False
    return fits and torch.backends.mkldnn.enabled and not torch.compiler.is_compiling()
