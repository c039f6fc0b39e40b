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
import torch.nn.functional as F
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
        return (_unit(x, self.mean.dtype) - _per_channel(self.mean, x)) * _per_channel(self.scale, x)

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}"


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 → [0, 1]; floating stays as it is."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x


def batch_norm(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """Algorithm 1 on (N, C, …): x normalised per channel over all other axes, and the batch moments, (C,) each.

    Plain differentiable tensor arithmetic, so it goes through `torch.func.vmap`, `grad` and `functional_call`.
    """
    over = moments(x, [axis for axis in range(x.ndim) if axis != 1])
    y = normalise(x, over, eps, *(None if t is None else _per_channel(t, x) for t in (scale, shift)))
    return y, Moments(over.mean.flatten(), over.variance.flatten())


class BatchNorm(nn.Module):
    """Batch normalisation of (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); names and state dict as in torch.

    `momentum` η weighs the *new* batch (torch's sense; TensorFlow's 0.99 is 0.01 here); None keeps the plain average of
    all batches since `reset_running_stats`. `fused=False` uses `batch_norm` above instead of torch's kernel: the same
    numbers, and differentiable through `torch.func`. Without running statistics (`track_running_stats=False`)
    evaluation uses the batch too. Raises ValueError when there is one value per channel in training.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        fused: bool = True,
    ):
        super().__init__()
        self.num_features, self.eps, self.momentum, self.fused = num_features, eps, momentum, fused
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1, count 0."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got shape {tuple(x.shape)}")
        tracks = self.running_mean is not None
        learns = self.training or not tracks
        if learns and x.numel() == self.num_features:
            raise ValueError(f"batch statistics need more than one value per channel, got shape {tuple(x.shape)}")
        weight = 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.fused:
            # torch's kernel updates whatever running buffers it is given when it takes the batch's moments
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, learns, weight, self.eps
            )
        if learns:
            y, batch = batch_norm(x, self.weight, self.bias, self.eps)
            if self.training:
                self._absorb(batch, x.numel() // self.num_features, weight)
            return y
        assert self.running_mean is not None
        assert self.running_var is not None
        running = Moments(_per_channel(self.running_mean, x), _per_channel(self.running_var, x))
        affine = (None if t is None else _per_channel(t, x) for t in (self.weight, self.bias))
        return normalise(x, running, self.eps, *affine)

    @torch.no_grad()
    def _absorb(self, batch: Moments, count: int, weight: float) -> None:
        """running ← (1 − η) running + η batch, with the unbiased variance."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(batch.mean.to(self.running_mean), weight)
            self.running_var.lerp_((batch.variance * (count / (count - 1))).to(self.running_var), weight)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


def layer_norm(
    x: Tensor, dims: int = 1, scale: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """x normalised over its last `dims` axes, example by example; `scale` and `shift` have those axes' shape."""
    return normalise(x, moments(x, range(-dims, 0)), eps, scale, shift)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axes, which have shape `normalized_shape`; names and state dict as in torch.

    The same in training and evaluation, for any batch. `fused=False` uses `layer_norm` above instead of torch's kernel.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        fused: bool = True,
    ):
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps, self.fused = shape, eps, fused
        self.weight = nn.Parameter(torch.ones(shape)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[x.ndim - len(self.normalized_shape) :]) != self.normalized_shape:
            raise ValueError(
                f"expected (..., {', '.join(map(str, self.normalized_shape))}), got shape {tuple(x.shape)}"
            )
        if self.fused:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(x, len(self.normalized_shape), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, …), to broadcast against x."""
    return t.view(1, -1, *[1] * (x.ndim - 2))
