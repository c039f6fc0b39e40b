"""A mode that sees every torch function a model calls, and answers some of them faster, when only x has a gradient

`Lens` is a `TorchFunctionMode`: it meets a ReLU as a module, a function, a method, in place, or one module used many
times. Attribution hangs the guided rule on it. On a CPU it also answers with equals of

- convolutions of few input channels, whose library backward is slow (`_FewChannels`);
- batch norm in eval mode: one affine map, or nothing at all where `Folding` could put it into the convolution before;
- `view` of a tensor that is channels last, which must copy, as `reshape` does.

Weights are constants here: no gradient of them is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RELUS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})


class Lens(TorchFunctionMode):
    """Counts the ReLUs; with `guided` only positive gradients enter them (each image's hook goes with its graph)."""

    def __init__(self, guided: bool, folding: Folding | None = None) -> None:
        super().__init__()
        self.guided, self.folding, self.relus = guided, folding, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.folding is not None and (fast := self.folding.see(func, args, kwargs)) is not None:
            return fast
        equal = _FASTER.get(func)
        out = None if equal is None else equal(*args, **kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if self.folding is not None and func is torch.conv2d:
            self.folding.convolved(out, args[1] if len(args) > 1 else kwargs["weight"])
        if self.guided and func in _RELUS:
            self.relus += 1
            if out.requires_grad:
                out.register_hook(_positive)  # on this call's own tensor: it goes when the graph goes
        return out


class Norm(NamedTuple):
    """Names of the tensors of a batch norm in eval mode ("" for none), and its ε."""

    mean: str
    var: str
    weight: str
    bias: str
    eps: float


class Unfold(Exception):
    """A convolution into which a batch norm was folded was used for something else."""


class Output(NamedTuple):
    """The result of one convolution, as long as it lives."""

    tensor: weakref.ref[Tensor]
    weight: str
    folded: Norm | None
    uses: list[Norm | None]


class Folding:
    """Learns in one call which batch norms follow which convolutions, and folds them in the calls after.

    A pair is proved when the norm was the only function that saw the convolution's output and nothing kept it. When
    another function meets the output in a later call (the model branched another way), `Unfold` is raised and the call
    must be made again without folding. Weights and estimates are read anew in every call.
    """

    def __init__(self, tensors: dict[str, Tensor], folds: dict[str, Norm]) -> None:
        self.tensors, self.folds = tensors, folds
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.outputs: list[Output] = []
        self.living: dict[int, Output] = {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of `func` where folding knows better, else None."""
        if func is torch.conv2d and len(args) > 1 and (fold := self.folds.get(self.names.get(id(args[1]), ""))):
            return self._folded(fold, *args, **kwargs)
        if func in _LOOKS:
            return None
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                known = self.living.get(id(item))
                if known is None or known.tensor() is not item:
                    continue
                norm = self._norm(args, kwargs) if func is F.batch_norm and args and item is args[0] else None
                known.uses.append(norm)
                if known.folded is not None:
                    if norm != known.folded or len(known.uses) > 1:
                        raise Unfold
                    return item.view_as(item)  # another object, so a second use of `item` is noticed
        return None

    def convolved(self, out: Tensor, weight: Tensor, folded: Norm | None = None) -> None:
        """Remember the result of a convolution."""
        if name := self.names.get(id(weight)):
            known = Output(weakref.ref(out), name, folded, [])
            self.outputs.append(known)
            self.living[id(out)] = known

    def proved(self) -> dict[str, Norm]:
        """After the forward pass: convolutions with the norm that alone saw their output. Raises Unfold."""
        found: dict[str, Norm] = {}
        spoiled = set()
        for known in self.outputs:
            if known.folded is not None:
                if not known.uses:
                    raise Unfold
                continue
            norm = known.uses[0] if len(known.uses) == 1 and known.tensor() is None else None
            if norm is None or found.setdefault(known.weight, norm) != norm:
                spoiled.add(known.weight)
        return {name: norm for name, norm in found.items() if name not in spoiled}

    def _norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
        asked = dict(zip(_BATCH_NORM, args)) | kwargs
        if asked.get("training") or asked.get("running_mean") is None or asked["input"].ndim != 4:
            return None
        parts = [asked.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        names = ["" if part is None else self.names.get(id(part)) for part in parts]
        return None if None in names else Norm(*names, asked.get("eps", 1e-5))  # type: ignore[arg-type]

    def _folded(self, fold: Norm, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any):
        scale = (self.tensors[fold.var] + fold.eps).rsqrt()
        scale = scale * self.tensors[fold.weight] if fold.weight else scale
        shift = scale * ((0 if bias is None else bias) - self.tensors[fold.mean])
        shift = shift + self.tensors[fold.bias] if fold.bias else shift
        scaled = weight * scale[:, None, None, None]
        out = _few_channels(input, scaled, shift, *rest, **more)
        out = torch.conv2d(input, scaled, shift, *rest, **more) if out is None else out
        self.convolved(out, weight, fold)
        return out


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp(min=0)


class _FewChannels(torch.autograd.Function):
    """A convolution of few input channels, stride 1, fixed weights; its input gradient is a forward convolution again.

    The library's own backward is slow where few channels come out, because a CPU works on many at once. So here a tile
    of T × T neighbouring pixels comes out as channels: a kernel of k + T − 1 at stride T, then a shuffle of pixels. On
    seven shapes tried, 1.7 to 12 times as fast (small kernels of several channels, channels last, are left out).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.around = [k - 1 - p for k, p in zip(weight.shape[2:], padding)]
        ctx.size = x.shape[2:]
        return torch.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        outputs, inputs, tall, wide = weight.shape
        tile = 4 if inputs == 1 else 2
        flipped = weight.flip(2, 3).transpose(0, 1)
        tiles = weight.new_zeros(inputs, tile, tile, outputs, tall + tile - 1, wide + tile - 1)
        for i in range(tile):
            for j in range(tile):
                tiles[:, i, j, :, i : i + tall, j : j + wide] = flipped
        over = [-size % tile for size in ctx.size]
        if any(over):
            gradient = F.pad(gradient, (0, over[1], 0, over[0]))
        found = torch.conv2d(gradient, tiles.flatten(0, 2), stride=tile, padding=ctx.around)
        return F.pixel_shuffle(found, tile)[:, :, : ctx.size[0], : ctx.size[1]], None, None, None


def _few_channels(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution by `_FewChannels` where that applies, else None."""
    if input.ndim != 4 or weight.shape[1] > 4 or groups != 1 or input.device.type != "cpu" or isinstance(padding, str):
        return None
    around = (padding, padding) if isinstance(padding, int) else tuple(padding)
    plain = set(np.atleast_1d(stride)) == {1} and set(np.atleast_1d(dilation)) == {1} and len(around) == 2
    if weight.shape[1] > 1 and weight[0, 0].numel() < 16 and not input.is_contiguous():
        return None  # a small kernel, channels last: the library's backward is as fast
    fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if not plain or not fixed or not input.requires_grad or any(p > k - 1 for k, p in zip(weight.shape[2:], around)):
        return None
    return _FewChannels.apply(input, weight, bias, around)  # type: ignore[no-any-return]


def _affine_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch norm of (N, C, H, W) by its running estimates as shift + scale · input in one pass, else None."""
    if training or running_mean is None or running_var is None or input.ndim != 4 or input.device.type != "cpu":
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return torch.addcmul(shift[:, None, None], input, scale[:, None, None])


def _view(input: Tensor, *shape: Any, **named: Any) -> Tensor | None:
    """`reshape` of a tensor that is channels last, which `view` would refuse, else None."""
    shape = shape or tuple(named.values())  # view(size=…), view(dtype=…)
    return None if input.is_contiguous() or isinstance(shape[0], torch.dtype) else input.reshape(*shape)


_FASTER: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: _few_channels,
    F.batch_norm: _affine_norm,
    Tensor.view: _view,
}
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LOOKS = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "ndim", "dtype", "device")),
    }
)
