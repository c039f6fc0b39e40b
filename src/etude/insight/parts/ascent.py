"""One ascent on pictures: variable, score, penalty, transform, step rule and projection, each a function

Equation: g = ∇ₓ Σ (S(t(x)) − R(x)),    x ← P(x + r(g))
    S: a score for each picture; t: what is done to a picture before it is scored, such as a shift, whose adjoint brings the
    gradient back; R: a penalty; r: the step rule, g → change; P: back onto the set where pictures may lie.

Every picture of a batch climbs by itself: its gradient is its own, and the rules scale picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.looking.attribution import _evaluating as evaluating
from etude.core.errors import UserError, nearest
from etude.robustness.fgsm import Norm, project

Map = Callable[[Tensor], Tensor]


def ascend(
    x: Tensor,
    score: Map,
    rule: Map,
    penalty: Map | None = None,
    transform: Map | None = None,
    onto: Map | None = None,
) -> tuple[Tensor, Tensor]:
    """One step up: pictures x (N, …) → the next ones and the scores (N,) of those before, both detached.

    score and penalty: (N, …) → (N,); transform: pictures → pictures; rule: gradients → changes; onto: pictures → pictures.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        value = score(leaf if transform is None else transform(leaf))
        height = value.sum() if penalty is None else value.sum() - penalty(leaf).sum()
        (gradient,) = torch.autograd.grad(height, leaf)
    y = x.detach() + rule(gradient)
    return y if onto is None else onto(y), value.detach()


# ------------------------------------------------------------------------------------------------------------- rules


def steepest(rate: float) -> Map:
    """g → rate · g."""
    return lambda gradient: rate * gradient


def even(rate: float) -> Map:
    """g → rate · g / mean |g| of each picture: a step moves the pixels by `rate` on average, whatever the score's scale."""

    def rule(gradient: Tensor) -> Tensor:
        size = gradient.abs().flatten(1).mean(1).view(-1, *[1] * (gradient.ndim - 1))
        return rate * gradient / size.clamp(min=torch.finfo(gradient.dtype).tiny)

    return rule


def within(
    start: Tensor, epsilon: float | None = None, norm: Norm = "linf", low: float = 0.0, high: float = 1.0
) -> Map:
    """y → the nearest picture at most `epsilon` (None: any distance) from `start`, then clipped to [low, high].

    The projection and the clip of `etude.robustness.fgsm`.
    """

    def onto(y: Tensor) -> Tensor:
        near = y if epsilon is None else start + project(y - start, epsilon, norm)
        return near.clamp(low, high)

    return onto


def squared(around: Tensor, weight: float) -> Map:
    """x → weight · ‖x − around‖² of each picture, (N,): the penalty R."""
    return lambda x: weight * (x - around).pow(2).flatten(1).sum(1)


def shifted(x: Tensor, down: int, across: int) -> Tensor:
    """(…, H, W), rolled round; the adjoint of the shift is the shift back."""
    return x.roll((down, across), (-2, -1))


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of (N, C, H, W), deviation `sigma` pixels, cut at 4σ, mirrored at the rim; scipy's gaussian_filter."""
    reach = int(4 * sigma + 0.5)
    if reach == 0:
        return x
    place = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(place**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for axis in (-2, -1):
        length = x.shape[axis]
        at = torch.arange(-reach, length + reach, device=x.device) % (2 * length)
        wide = x.index_select(axis, torch.minimum(at, 2 * length - 1 - at)).movedim(axis, -1)
        flat = wide.reshape(-1, 1, wide.shape[-1])
        x = F.conv1d(flat, kernel.view(1, 1, -1)).view(*wide.shape[:-1], length).movedim(-1, axis)
    return x


# ------------------------------------------------------------------------------------------------------------- units


class _EnoughError(Exception):
    """Every layer asked for has answered."""


def layers(model: nn.Module) -> list[str]:
    """The names of the layers that can be looked at: modules without modules inside."""
    return [name for name, part in model.named_modules() if name and not any(True for _ in part.children())]


def layer(model: nn.Module, name: str, flag: str = "--layer") -> str:
    """This name. Raises UserError where the model has no such layer."""
    known = dict(model.named_modules())
    if name not in known or not name:
        found = layers(model)
        raise UserError(f"{flag} {name or '(empty)'} is no layer{nearest(name, found)} Known: {', '.join(found)}")
    return name


def seen(model: nn.Module, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """What these layers make of x, in eval mode: one tensor a name; "" is what the model returns.

    The forward pass ends when all have answered, so what comes behind them need not fit a picture of this size.
    """
    parts, handles = dict(model.named_modules()), []
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_part: nn.Module, _given: object, made: Tensor) -> None:
            held[name] = made.clone()  # what comes next may work in place
            if "" not in names and len(held) == len(set(names)):
                raise _EnoughError

        return hook

    with evaluating(model):
        try:
            handles += [parts[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names) if name]
            held[""] = model(x)
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()
    if lost := [name for name in names if name not in held]:
        raise UserError(f"the layer {lost[0]} takes no part in what {type(model).__name__} answers")
    return [held[name] for name in names]


def unit_score(model: nn.Module, name: str, units: Tensor) -> Map:
    """The score of picture n: the mean over all places of unit `units[n]` (int64 (N,)) of layer `name` ("": the logit)."""

    def score(x: Tensor) -> Tensor:
        (made,) = seen(model, x, [name])
        return (
            made.flatten(2).mean(2)[torch.arange(len(x)), units] if made.ndim > 2 else made[torch.arange(len(x)), units]
        )

    return score
