"""Normalisers: subtract the mean, divide by the deviation over a set of axes, then an affine map

Paper: LeCun, Bottou, Orr & Müller, Efficient BackProp, 1998 (inputs); Ioffe & Szegedy, Batch Normalization, 2015,
arXiv:1502.03167, Algorithms 1-2; Ba, Kiros & Hinton, Layer Normalization, 2016, arXiv:1607.06450, equation 4.

Equation: y = γ (x − μ_A) / √(σ²_A + ε) + β, where μ_A and σ²_A = E_A[(x − μ_A)²] (the biased variance) are taken over
    the training set      Standardise, frozen, per channel, no γ, β
    (N, H, W)             BatchNorm, one pair per channel, replaced by running estimates in evaluation
    the last d axes       LayerNorm, one pair per example (and position), the same in training and evaluation
BatchNorm keeps  running ← (1 − η) running + η batch, where the batch variance is the *unbiased* N·H·W/(N·H·W − 1) σ²_A.

Differences:
- E15: the notes' batch normalisation has no ε, no axes and no rule for the statistics used at test. Here: ε inside the
  root; per channel over N, H and W; biased variance to normalise, unbiased into the running estimate; an exponential
  moving average, or the plain average over all batches with momentum=None.
- E63: layer normalisation without ε; γ and β are vectors over the normalised axes, not numbers.
- Input standardisation takes its statistics from the training split only; a constant feature becomes 0, not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """Mean and biased variance, broadcastable against what they were taken from."""

    mean: Tensor
    variance: Tensor


def moments(x: Tensor, axes: Sequence[int]) -> Moments:
    """μ_A and E_A[(x − μ_A)²] over `axes`, which stay as axes of length 1."""
    variance, mean = torch.var_mean(x, dim=tuple(axes), correction=0, keepdim=True)
    return Moments(mean, variance)


def normalise(x: Tensor, over: Moments, eps: float, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """γ (x − μ) / √(σ² + ε) + β; `scale` and `shift` broadcast against x."""
    y = (x - over.mean) * torch.rsqrt(over.variance + eps)
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


class Standardise(nn.Module):
    """(x − mean) / std per channel, the first layer of a classifier, so that its input stays in pixel units.

    Input (N, C, …) floating, in [0, 1] for images, or uint8, which is divided by 255 first; output floating, the same
    shape. `mean` and `std` have C entries, in units of [0, 1]. A channel with std 0 was constant in training: it gives
    0 whatever it holds. They are rebuilt from the data's spec, so they are buffers that are *not* saved, and published
    state dicts load as they are. Raises ValueError for lengths that differ, or for a negative std.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor):
        super().__init__()
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        mean, std = (t if t.is_floating_point() else t.to(torch.get_default_dtype()) for t in (mean, std))
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(
                f"mean and std must be two lists of one length, got {tuple(mean.shape)}, {tuple(std.shape)}"
            )
        if not bool((std >= 0).all()):
            raise ValueError(f"std must be >= 0, got {std.tolist()}")
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("scale", torch.where(std > 0, 1 / std.clamp(min=1e-30), 0.0), persistent=False)

    @classmethod
    def fit(cls, x: Tensor) -> Standardise:
        """From a *training* split (N, C, …), uint8 or floating: mean and biased deviation per channel."""
        values = _unit(x, torch.get_default_dtype()).double()
        over = moments(values, [axis for axis in range(x.ndim) if axis != 1])
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        mean, std = over.mean.flatten(), over.variance.sqrt().flatten()
        # a constant feature's rounding error is not a scale
        std = torch.where(std <= 1e-12 * mean.abs(), 0.0, std)
        return cls(mean.to(dtype), std.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"expected (N, {len(self.mean)}, ...), got shape {tuple(x.shape)}")
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (_unit(x, self.mean.dtype) - self.mean.view(shape)) * self.scale.view(shape)

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}"


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 → [0, 1]; floating stays as it is."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x
