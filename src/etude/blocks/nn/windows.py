"""Convolution, pooling, un-pooling and local normalisation over one map: the windows of an image, and its adjoint

Paper: Dumoulin & Visin, A guide to convolution arithmetic for deep learning, 2016, arXiv:1603.07285 (shapes); Zeiler &
Fergus, Visualizing and Understanding Convolutional Networks, 2013, arXiv:1311.2901 (un-pooling); Krizhevsky, Sutskever &
Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012, section 3.3 (local response normalisation).

Equation: the windows of x, with kernel k, stride s, padding p and dilation d, are a linear map U,
    (U x)[n, c, u, v, i, j] = x[n, c, s i + d u − p, s j + d v − p]   (0 outside the image)
    of H' = ⌊(H + 2p − d(k − 1) − 1)/s⌋ + 1 places down and as many across. Its adjoint Uᵀ adds windows up where they were taken.
    convolution             y = W U x + b        ∂x = Uᵀ Wᵀ ∂y,  ∂W = ∂y (U x)ᵀ
    transposed convolution  y = Uᵀ Wᵀ x + b      ∂x = W U ∂y,    ∂W = x (U ∂y)ᵀ
    max pooling             y = max_{u,v} U x    ∂x: ∂y goes to the place of the maximum (un-pooling of ∂y)
    mean pooling            y = mean_{u,v} U x   ∂x = Uᵀ ∂y / k²
    local normalisation     y = x · (κ + (α/n) Σ_{c' within n/2 of c} x[c']²)^{−β}, a window over the maps

Differences:
- E25: the notes write H×W×C images and kh×kw×in×out kernels and call this convolution. Tensors are (N, C, H, W) and kernels
  (out, in/groups, kh, kw) here, the operation is cross-correlation, and the size stays only for p = d(k − 1)/2 and s = 1.
- Local normalisation divides α by the window's length, as torch and Caffe do; the paper does not (its 10⁻⁴ is 5·10⁻⁴ here).
- Written for reading and for proofs, in any floating dtype: every network here uses torch's kernels, which give the same numbers.

Every function that ends in `_backward` is the gradient of the one before it, written out; `tests` hold both against torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | tuple[int, int]
"""One number for both directions, or (down, across)."""


class Window(NamedTuple):
    """How windows lie on an image; each field is (down, across)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, kernel: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Window:
        """From single numbers or pairs. Raises ValueError where a size, a step or a distance is not positive."""
        values = [(v, v) if isinstance(v, int) else (v[0], v[1]) for v in (kernel, stride, padding, dilation)]
        names = ("kernel", "stride", "padding", "dilation")
        for name, pair in zip(names, values):
            if min(pair) < (0 if name == "padding" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'padding' else 1}, got {pair}")
        return cls(*values)

    def places(self, height: int, width: int) -> tuple[int, int]:
        """The windows down and across an image. Raises ValueError where the first one does not fit."""
        found = []
        for n, k, s, p, d in zip((height, width), self.kernel, self.stride, self.padding, self.dilation):
            rest = n + 2 * p - d * (k - 1) - 1
            if rest < 0:
                raise ValueError(f"a window of {d * (k - 1) + 1} pixels does not fit into {n} + 2·{p}")
            found.append(rest // s + 1)
        return found[0], found[1]


def unfold(x: Tensor, window: Window, value: float = 0.0) -> Tensor:
    """U x: (N, C, H, W) → (N, C, kh, kw, H', W'), a view of the padded image; `value` stands outside it."""
    down, across = window.places(*x.shape[-2:])
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    x = F.pad(x, (pw, pw, ph, ph), value=value)
    n, c, h, w = x.stride()
    return x.as_strided(
        (*x.shape[:2], kh, kw, down, across), (n, c, h * dh, w * dw, h * sh, w * sw), x.storage_offset()
    )


def fold(windows: Tensor, window: Window, height: int, width: int) -> Tensor:
    """Uᵀ: (N, C, kh, kw, H', W') → (N, C, height, width), each value added where `unfold` takes it from.

    Raises ValueError where an image of this size has other windows.
    """
    if (places := window.places(height, width)) != tuple(windows.shape[-2:]):
        raise ValueError(f"an image of {height}×{width} has {places} windows, not {tuple(windows.shape[-2:])}")
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    x = windows.new_zeros(*windows.shape[:2], height + 2 * ph, width + 2 * pw)
    for u in range(kh):
        for v in range(kw):
            rows = slice(u * dh, u * dh + sh * (places[0] - 1) + 1, sh)
            columns = slice(v * dw, v * dw + sw * (places[1] - 1) + 1, sw)
            x[:, :, rows, columns] += windows[:, :, u, v]
    return x[:, :, ph : ph + height, pw : pw + width]


# ------------------------------------------------------------------------------------------------------- convolution


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """W U x + b: x (N, C, H, W), weight (O, C/groups, kh, kw), bias (O,) → (N, O, H', W'); torch's `conv2d`."""
    window = Window.of((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    seen = _grouped(unfold(x, window), groups)  # (N, G, C/G, kh, kw, H', W')
    y = torch.einsum("gocuv,ngcuvij->ngoij", _grouped(weight, groups, 0), seen).flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


def convolve_backward(
    slope: Tensor, x: Tensor, weight: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `convolve` for x, weight and bias, given that of its result, `slope` (N, O, H', W')."""
    window = Window.of((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    seen, kernels, slopes = _grouped(unfold(x, window), groups), _grouped(weight, groups, 0), _grouped(slope, groups)
    back = torch.einsum("gocuv,ngoij->ngcuvij", kernels, slopes).flatten(1, 2)  # Wᵀ ∂y
    of_weight = torch.einsum("ngoij,ngcuvij->gocuv", slopes, seen).flatten(0, 1)  # ∂y (U x)ᵀ
    return fold(back, window, x.shape[2], x.shape[3]), of_weight, slope.sum((0, 2, 3))


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Uᵀ Wᵀ x + b: x (N, C, H, W), weight (C, O/groups, kh, kw) → (N, O, H', W'), H' = (H − 1)s − 2p + d(k − 1) + 1 + extra.

    The map that takes images of H' to H as a convolution does, backwards; torch's `conv_transpose2d`. `output_padding` chooses
    among the sizes H' that a convolution takes to H.
    """
    window = Window.of((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    extra = (output_padding, output_padding) if isinstance(output_padding, int) else output_padding
    height, width = (
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
        for n, k, s, p, d, e in zip(x.shape[2:], window.kernel, window.stride, window.padding, window.dilation, extra)
    )
    back = torch.einsum("gcouv,ngcij->ngouvij", _grouped(weight, groups, 0), _grouped(x, groups)).flatten(1, 2)
    y = fold(back, window, height, width)
    return y if bias is None else y + bias[:, None, None]


def convolve_transposed_backward(
    slope: Tensor, x: Tensor, weight: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `convolve_transposed` for x, weight and bias: the first is a convolution of `slope`."""
    window = Window.of((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    seen = _grouped(unfold(slope, window), groups)
    of_x = torch.einsum("gcouv,ngouvij->ngcij", _grouped(weight, groups, 0), seen).flatten(1, 2)
    of_weight = torch.einsum("ngcij,ngouvij->gcouv", _grouped(x, groups), seen).flatten(0, 1)
    return of_x, of_weight, slope.sum((0, 2, 3))


def _grouped(x: Tensor, groups: int, axis: int = 1) -> Tensor:
    """Axis of channels → (groups, channels a group)."""
    if x.shape[axis] % groups:
        raise ValueError(f"{x.shape[axis]} channels cannot be split into {groups} groups")
    return x.unflatten(axis, (groups, x.shape[axis] // groups))


# ----------------------------------------------------------------------------------------------------------- pooling


def max_pool(x: Tensor, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> tuple[Tensor, Tensor]:
    """The largest value of each window and its place in the map, row · W + column: (N, C, H', W') each, int64 the second.

    `stride` is the kernel where it is None (windows side by side). Of equal values the first counts, as in torch.
    """
    window = Window.of(kernel, kernel if stride is None else stride, padding)
    height, width = x.shape[2:]
    y, best = unfold(x, window, -torch.inf).flatten(2, 3).max(2)
    number = torch.arange(height * width, device=x.device).view(1, 1, height, width)
    places = unfold(number, window, -1).flatten(2, 3).expand(*x.shape[:2], -1, -1, -1)
    return y, places.gather(2, best[:, :, None]).squeeze(2)


def max_pool_backward(slope: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """The gradient of `max_pool` for x, (N, C, height, width): slopes whose windows share a maximum add up there."""
    flat = slope.new_zeros(*slope.shape[:2], height * width)
    return flat.scatter_add_(2, places.flatten(2), slope.flatten(2)).unflatten(2, (height, width))


def max_unpool(y: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """Each value back at the place it was the maximum of, 0 elsewhere: (N, C, H', W') → (N, C, height, width).

    One of the values stands where windows share a maximum (they are equal in what `max_pool` returned).
    """
    flat = y.new_zeros(*y.shape[:2], height * width)
    return flat.scatter_(2, places.flatten(2), y.flatten(2)).unflatten(2, (height, width))


def max_unpool_backward(slope: Tensor, places: Tensor) -> Tensor:
    """The gradient of `max_unpool` for y: (N, C, height, width) → (N, C, H', W'), read at the places."""
    return slope.flatten(2).gather(2, places.flatten(2)).view_as(places)


def mean_pool(x: Tensor, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The mean of each window, zeros of the padding included: (N, C, H, W) → (N, C, H', W')."""
    return unfold(x, Window.of(kernel, kernel if stride is None else stride, padding)).mean((2, 3))


def mean_pool_backward(
    slope: Tensor, height: int, width: int, kernel: Pair, stride: Pair | None = None, padding: Pair = 0
) -> Tensor:
    """The gradient of `mean_pool` for x: every pixel of a window gets its share."""
    window = Window.of(kernel, kernel if stride is None else stride, padding)
    kh, kw = window.kernel
    shares = (slope / (kh * kw))[:, :, None, None].expand(-1, -1, kh, kw, -1, -1)
    return fold(shares, window, height, width)


# ------------------------------------------------------------------------------------------------ local normalisation


def local_response(x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x · (k + α/size · Σ x²)^−β over `size` neighbouring maps: (N, C, H, W); torch's `local_response_norm`."""
    return x * _neighbours(x * x, size).mul(alpha / size).add(k).pow(-beta)


def local_response_backward(
    slope: Tensor, x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """The gradient of `local_response` for x: ∂y·D^−β − 2(α/size)β · x · Σ' ∂y·x·D^(−β−1), Σ' over the mirrored window."""
    inside = _neighbours(x * x, size).mul(alpha / size).add(k)
    return slope * inside.pow(-beta) - 2 * alpha / size * beta * x * _neighbours(
        slope * x * inside.pow(-beta - 1), size, mirrored=True
    )


def _neighbours(x: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """Sums over the maps c − ⌊size/2⌋ … c + ⌊(size − 1)/2⌋, or (the adjoint) over the mirror of that."""
    before, after = size // 2, (size - 1) // 2
    before, after = (after, before) if mirrored else (before, after)
    window = Window.of((size, 1))
    return unfold(F.pad(x.flatten(2)[:, None], (0, 0, before, after)), window).sum((1, 2, 3)).view_as(x)
