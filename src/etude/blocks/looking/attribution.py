"""Gradients with respect to the input of any network, and the pictures and checks made from them

Equation: for logits z = model(x) and a vector v(z) at the output, the map is vᵀ ∂z/∂x, nothing else.
    Guided (Springenberg et al., arXiv:1412.6806): at each ReLU with input u and incoming gradient δ,
    δ·1[u>0]·1[δ>0] goes on.

`input_gradient` runs the model in eval mode and computes no gradient of its parameters; `etude.blocks.looking.lens` sees every
function that the model calls. When it returns, or raises, the model is as it was: no hook, the same training flags,
requires_grad flags, gradients, parameters and buffers.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude.blocks.looking.lens import Folding, Lens, Norm, Unfold
from etude.blocks.pictures.plots import INK, PALETTE, PAPER, SOFT, WIDTH


class Known(NamedTuple):
    """Batch norms that were seen to follow convolutions (`etude.blocks.looking.lens.Folding`), and whether to fold them."""

    norms: dict[str, Norm]
    sure: bool = False


_FOLDS: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()
"""By model: seen in the first call, held against the plain result in the second, used from the third on."""

_SIGNED = LinearSegmentedColormap.from_list("etude_signed", [PALETTE[0], PAPER, PALETTE[1]])


# --------------------------------------------------------------------------------------------------------- gradients


def input_gradient(
    model: nn.Module, x: Tensor, start: Callable[[Tensor], Tensor], guided: bool = False
) -> tuple[Tensor, Tensor]:
    """Backpropagate `start(logits)` to the input: the gradient, shape of x, and the logits (N, K), both detached.

    x is floating (N, …), in the units the model takes; `start` is given the logits, K ≥ 2, and returns what enters at
    each of them, (N, K): 1 at one logit for its gradient. Each image's gradient is its own: batch norm uses its running
    estimates, and a layer that has none is refused. ``guided`` lets only positive gradients enter each ReLU. Raises
    ValueError where x is not floating, the output is not (N, K) or does not depend on x, the items of the batch are
    coupled, or ``guided`` is asked of a model in which no ReLU is seen.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype}; it must be floating, in the units the model takes (uint8 pixels: x.float() / 255)"
        )
    model = getattr(model, "_orig_mod", model)  # torch.compile: a compiled graph would hide its ReLUs
    if len(x) > 1:
        for name, part in model.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
                raise ValueError(f"{name} normalises by the batch, which couples its images; give one image at a time")
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_evaluating(model))
        known = _FOLDS.get(model)
        norms = known.norms if known is not None and known.sure and not _hooked(model) else {}
        try:
            gradient, logits, proved = _pass(model, x, start, guided, norms)
        except Unfold:  # the model took another way than in the calls before
            known, norms = None, {}
            gradient, logits, proved = _pass(model, x, start, guided, {})
        if (known is None or not known.sure) and not _hooked(model):
            again = known is not None and known.norms == proved
            agrees = again and _agrees((gradient, logits), model, x, start, guided, proved)
            _FOLDS[model] = Known({} if again and not agrees else proved, sure=again or not proved)
    if gradient is None:
        raise ValueError(
            f"the output of {type(model).__name__} has no gradient at x; does it detach or round its input?"
        )
    return gradient.contiguous(), logits.detach()


def _pass(
    model: nn.Module,
    x: Tensor,
    start: Callable[[Tensor], Tensor],
    guided: bool,
    folds: dict[str, Norm],
) -> tuple[Tensor | None, Tensor, dict[str, Norm]]:
    """Forward and back once with `folds` of batch norm: the gradient (None for none), the logits, the folds proved."""
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    on_cpu = x.device.type == "cpu"
    # channels last and folded batch norm halve the time of a residual network
    last = on_cpu and x.ndim == 4 and bool(convolutions) and all(part.in_channels > 1 for part in convolutions)
    leaf = x.clone() if x.is_inference() else x.detach()
    leaf = (leaf.contiguous(memory_format=torch.channels_last) if last else leaf).requires_grad_()
    image = leaf.clone()  # x stays, should the model work in place
    lens, seeing, held = Lens(guided), contextlib.nullcontext(), {}
    if guided or (convolutions and on_cpu):  # the lens costs a little at every call
        held = _fixed(model, last)
        lens = seeing = Lens(guided, Folding({**held, **dict(model.named_buffers())}, folds))
    with seeing:
        logits = torch.func.functional_call(model, held, (image,)) if held else model(image)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} returns {found} for {len(x)} images; it must return logits (N, classes)"
        )
    if guided and not lens.relus:
        raise ValueError(
            f"no ReLU is seen in {type(model).__name__}; the guided map would be the gradient, so use saliency"
        )
    proved = lens.folding.proved() if lens.folding is not None else {}
    gradient = None
    if logits.requires_grad:
        above = start(logits.detach())
        with seeing:  # a checkpointed part runs forward again in here
            (gradient,) = torch.autograd.grad(logits, leaf, above, allow_unused=True)
    return gradient, logits, proved


def _hooked(model: nn.Module) -> bool:
    """Whether a hook looks at what a layer makes: then every layer must make it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def _agrees(
    plain: tuple[Tensor | None, Tensor],
    model: nn.Module,
    x: Tensor,
    start: Callable[[Tensor], Tensor],
    guided: bool,
    folds: dict[str, Norm],
) -> bool:
    """Whether folding gives the plain gradient and logits: functions that are compiled or scripted are not seen."""
    try:
        gradient, logits, _ = _pass(model, x, start, guided, folds)
    except Unfold:
        return False
    pairs = ((plain[0], gradient), (plain[1].detach(), logits.detach()))
    return all(
        a is not None and b is not None and float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()) for a, b in pairs
    )


def chosen(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """Class numbers (N,) int64: `target` itself, one number for all images, or the predicted classes for None."""
    count, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    picked = torch.as_tensor(target, device=logits.device)
    if picked.is_floating_point() or picked.dtype == torch.bool or picked.shape not in ((), (count,)):
        raise ValueError(
            f"target is {picked.dtype} {tuple(picked.shape)}; it must be class numbers ({count},) or one class number"
        )
    picked = picked.long().expand(count)
    if count:
        low, high = (int(bound) for bound in torch.aminmax(picked))
        if not 0 <= low <= high < classes:
            raise ValueError(f"target holds classes {low} to {high}; the model has 0 to {classes - 1}")
    return picked


def unit(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """1 at the target's logit of each image and 0 elsewhere, (N, K): what starts the gradient of one logit."""
    return torch.zeros_like(logits).scatter_(1, chosen(logits, target)[:, None], 1)


def _fixed(model: nn.Module, last: bool) -> dict[str, Tensor]:
    """The parameters as constants; with `last`, kernels are channels last."""
    held = {name: value.detach() for name, value in model.named_parameters()}
    if last:
        kernels = {name: value for name, value in held.items() if value.ndim == 4}
        held |= {name: value.contiguous(memory_format=torch.channels_last) for name, value in kernels.items()}
    return held


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the training flag and the buffers it had."""
    parts = list(model.modules())
    flags = [(part, part.training) for part in parts] if any(part.training for part in parts) else []
    kept = [
        (part, name, buffer, buffer._version, buffer.clone())
        for part in parts
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    if flags:
        model.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
        for part, name, buffer, version, value in kept:
            if part._buffers[name] is not buffer or buffer._version != version:
                with torch.no_grad():
                    part._buffers[name] = buffer.copy_(value)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What the model returns for x, (N, K), in eval mode; its training flags are as before when it returns."""
    with _evaluating(model):
        return model(x)


def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Softmax of `logits`, (N, K)."""
    return logits(model, x).softmax(1)


# ------------------------------------------------------------------------------------------------------------ checks


def heat(maps: Tensor) -> Tensor:
    """max over channels of |map|: (N, C, H, W) → (N, H, W) (Simonyan et al., section 3.1)."""
    return maps.abs().amax(1)


def erase(x: Tensor, rank: Tensor, share: float, fill: Tensor | float = 0.0) -> Tensor:
    """x (N, C, H, W) with the ⌈share·H·W⌉ pixels of highest `rank` (N, H, W) replaced by `fill` (broadcast to x)."""
    flat = rank.flatten(1)
    count = int(np.ceil(share * flat.shape[1]))
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count).indices, True)
    return torch.where(mask.view(len(x), 1, *x.shape[2:]), torch.as_tensor(fill, dtype=x.dtype, device=x.device), x)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each pair of maps: (N, …), (N, …) → (N,) float64 on the CPU; ties share their mean rank.

    0 where a map is constant.
    """

    def ranks(values: Tensor) -> Tensor:
        values = values.flatten(1).cpu()  # some devices have no float64
        order = values.sort(1).values
        low, high = torch.searchsorted(order, values), torch.searchsorted(order, values, right=True)
        place = (low + high).double()
        return place - place.mean(1, keepdim=True)

    one, two = ranks(a), ranks(b)
    size = one.norm(dim=1) * two.norm(dim=1)
    return torch.where(size > 0, (one * two).sum(1) / size.clamp(min=1e-300), 0.0)


def shuffled(model: nn.Module, generator: torch.Generator, last_only: bool = False) -> nn.Module:
    """A copy whose weights are random: the entries of each parameter are permuted, so their distribution stays.

    `last_only` permutes the parameters of the last layer that has any, in the order of registration.
    """
    changed = copy.deepcopy(model)
    owners = [part for part in changed.modules() if any(True for _ in part.parameters(recurse=False))]
    for part in owners[-1:] if last_only else owners:
        for parameter in part.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.data = parameter.data.flatten()[order].view(parameter.shape)
    return changed


# ---------------------------------------------------------------------------------------------------------- pictures


def panel(columns: dict[str, Tensor], said: Sequence[Sequence[str]], least: float = 0.0) -> Figure:
    """Rows of pictures with words beside them, one row an image.

    `columns` by heading: (N, C, H, W) with C = 1 or 3 is drawn as pixels in [0, 1]; (N, H, W) as a map, blue below
    0, red above, each scaled by its own largest absolute value (at least `least`). `said` holds the lines of each row.
    """
    count = len(said)
    across = len(columns) + 1
    tile = WIDTH / across
    figure = Figure(figsize=(WIDTH, tile * count + 0.25), dpi=160, facecolor=PAPER)
    tall = tile / (tile * count + 0.25)
    for j, (heading, values) in enumerate(columns.items()):
        figure.text((j + 0.03) / across, 1 - 0.06 * tall, heading, fontsize=8, color=SOFT, va="top", parse_math=False)
        for i, value in enumerate(values[:count].detach().cpu().float()):
            axes = figure.add_axes(((j + 0.03) / across, (count - 1 - i + 0.03) * tall, 0.94 / across, 0.94 * tall))
            axes.set_axis_off()
            sharp = "nearest" if max(value.shape[-2:]) <= 64 else "antialiased"
            if value.ndim == 2:
                top = max(float(value.abs().max()), least, 1e-30)
                axes.imshow(value.numpy(), cmap=_SIGNED, vmin=-top, vmax=top, interpolation=sharp)
            elif len(value) == 1:
                axes.imshow(value[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation=sharp)
            else:
                axes.imshow(value.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation=sharp)
    for i, lines in enumerate(said):
        for k, line in enumerate(lines):
            place = ((across - 1 + 0.06) / across, (count - i - 0.12 - 0.2 * k) * tall)
            colour = SOFT if k == 0 else INK
            figure.text(*place, line, fontsize=8, color=colour, va="top", parse_math=False)
    return figure


def verdicts(before: Tensor, after: Tensor, names: Sequence[str], truth: Tensor | None = None) -> list[list[str]]:
    """Lines for `panel`: the truth, the prediction and its probability before and after; inputs (N, K) and (N,)."""

    def top(row: Tensor) -> str:
        sure, k = row.max(0)
        share = 100 * float(sure)
        return f"{_short(names[int(k)])} {'>99' if 99.5 <= share < 100 else f'{share:.0f}'}%"

    rows = []
    for i, (one, two) in enumerate(zip(before, after)):
        head = [f"is {_short(names[int(truth[i])])}"] if truth is not None else ["predicted"]
        rows.append([*head, f"before: {top(one)}", f"after: {top(two)}"])
    return rows


def one_plane(maps: Tensor) -> Tensor:
    """Signed maps for one channel, `heat` for several: (N, C, H, W) → (N, H, W)."""
    return maps[:, 0] if maps.shape[1] == 1 else heat(maps)


def _short(name: str, most: int = 8) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
