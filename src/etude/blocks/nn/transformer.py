"""The Transformer block: attention and a position-wise network, each with a residual path and a layer norm.

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, sections 3.1 and 3.3; pre-norm:
Xiong et al., 2020, arXiv:2002.04745. Parameter names are those of `nn.TransformerEncoderLayer` (and of
`nn.TransformerDecoderLayer` with `cross=True`), so weights travel both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from etude.blocks.nn.attention import MultiHeadAttention

__all__ = ["ACTIVATIONS", "Block", "affine", "pack"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


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


class Block(nn.Module):
    """One layer: self-attention, optionally cross-attention, then Linear–activation–Linear at every position alone.

    norm="post" is the 2017 paper, x ← LN(x + Sub(x)); norm="pre" is what later models use, x ← x + Sub(LN(x)), and
    wants one more LN after the last block. (Erratum E64: the notes' x + LN(Sub(x)) is neither.)

    Args:
        width: D; heads: H; hidden: width of the position-wise network, None = 4·D as in the paper.
        norm: where the layer norms stand.
        causal: self-attention sees no later position (a decoder).
        cross: a second attention looks at `memory`, the output of the **last** encoder layer (erratum E65).
        activation: "relu" (the paper), "gelu" (exact) or "gelu_tanh" (GPT-2's approximation).
        dropout: on both attentions' weights, inside the network, and on each branch before it is added.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        causal: bool = False,
        cross: bool = False,
        activation: Literal["relu", "gelu", "gelu_tanh"] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        self.norm_first, self.causal, self.activation = norm == "pre", causal, ACTIVATIONS[activation]
        self.self_attn = MultiHeadAttention(width, heads, dropout)
        self.multihead_attn = MultiHeadAttention(width, heads, dropout) if cross else None
        self.linear1 = nn.Linear(width, hidden or 4 * width)
        self.linear2 = nn.Linear(hidden or 4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width) if cross else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_key_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D); memory (B, S, D) is needed exactly when the block was built with `cross=True`.

        `mask` and `key_mask` (B, T) rule the self-attention, `memory_key_mask` (B, S) the cross-attention; True =
        may be looked at (see `etude.blocks.nn.attention`).
        """
        if (memory is None) != (self.multihead_attn is None):
            raise ValueError("memory goes with cross=True: give it to a block with cross-attention and to no other")

        def look(h: Tensor) -> Tensor:
            return self.self_attn(h, mask=mask, key_mask=key_mask, causal=self.causal)

        x = self._residual(x, look, self.norm1)
        last = self.norm2
        if self.multihead_attn is not None and self.norm3 is not None:
            cross, last = self.multihead_attn, self.norm3
            x = self._residual(x, lambda h: cross(h, memory, key_mask=memory_key_mask), self.norm2)
        return self._residual(x, self._network, last)

    def _network(self, h: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(h))))

    def _residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))
