"""Gradient clipping: by value, element by element, or by the norm of the whole gradient

Paper: Mikolov, Statistical Language Models Based on Neural Networks (thesis), 2012; Pascanu, Mikolov & Bengio, On the
difficulty of training recurrent neural networks, 2012, arXiv:1211.5063, Algorithm 1.

Equation: ḡ_i = max(min(g_i, c), −c)   (by value);   ḡ = g min(1, c / ‖g‖)   (by norm)

Differences:
- E21: the notes write the norm per g_i. It is *one* norm over all parameters, so that clipping shortens the step and
  keeps its direction. ‖g‖ = 0 is safe. "Train for a new epoch" to find c: a few epochs, watching `global_norm`.
- torch's `clip_grad_norm_` divides by ‖g‖ + 1e-6, which leaves (3, 4) at c = 1 with norm 0.9999998; pass `eps=1e-6` for
  that. The default is the paper's, exact.

The functions without an underscore are pure; those with one change `.grad` in place (None is skipped). All work on the
one flat vector too. As links of a chain: `etude.optim.chain.clip_value`, `clip_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """‖g‖₂ over all tensors as one vector (0-dim, on the first one's device; 0 when there is none)."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    if not norms:
        return torch.zeros(())
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # of sharded tensors: the whole norm


def shrink(norm: Tensor, limit: float, eps: float = 0.0) -> Tensor:
    """min(1, c / (‖g‖ + ε)), which is 1 at ‖g‖ = 0 (0-dim)."""
    _positive(limit)
    return (limit / (norm + eps)).clamp(max=1.0)


def clip_by_value(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Every element into [−limit, limit]. Raises ValueError unless limit > 0."""
    _positive(limit)
    bounds = [_within(limit, gradient) for gradient in gradients]
    return [gradient.clamp(-bound, bound) for gradient, bound in zip(gradients, bounds)]


def clip_by_norm(gradients: Sequence[Tensor], limit: float, eps: float = 0.0) -> list[Tensor]:
    """All gradients times min(1, limit / (‖g‖ + eps)), ‖g‖ over all of them. Raises ValueError unless limit > 0."""
    factor = shrink(global_norm(gradients), limit, eps)
    return [gradient * factor.to(gradient.device, gradient.dtype) for gradient in gradients]


@torch.no_grad()
def clip_value_(parameters: Iterable[Tensor], limit: float) -> None:
    """Clip every parameter's `.grad` by value, in place."""
    _positive(limit)
    for gradient in map(_local, _gradients(parameters)):
        bound = _within(limit, gradient)
        gradient.clamp_(-bound, bound)


@torch.no_grad()
def clip_norm_(parameters: Iterable[Tensor], limit: float, eps: float = 0.0) -> Tensor:
    """Clip the `.grad` of all parameters by their joint norm, in place; returns the norm before, without a sync."""
    gradients = _gradients(parameters)
    norm = global_norm(gradients)
    factor = shrink(norm, limit, eps)
    for gradient in map(_local, gradients):
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return norm


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (sharing its memory); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [parameter.grad for parameter in parameters]
    return [gradient for gradient in gradients if gradient is not None]


def _within(limit: float, gradient: Tensor) -> float:
    """The limit, or the largest number of the gradient's dtype."""
    return min(limit, torch.finfo(gradient.dtype).max)


def _positive(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"the clipping limit must be > 0, got {limit}")
