"""The parts of a classifier's step that differ for ensembles, snapshots and Newton's method

Every member of an ensemble learns as it would alone: its loss, its clipping and its batches are its own. Heads on one
trunk share the batch, and are clipped together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.classifying.batches import training_images
from etude.blocks.classifying.ensembles import Ensemble, Snapshots, apart, reestimate
from etude.core.errors import RunError
from etude.core.run import Run
from etude.data.sets import Images
from etude.optim.clipping import clip_norm_, clip_value_


def losses(model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a batch (see `batches`), twice: the one to descend and the one to log, both 0-dim.

    They are one for a single network. Of an ensemble the sum over the members is descended, so that each gets the
    gradient of its own loss (and a trunk the sum of its heads'), and the mean is logged.
    """
    if not isinstance(model, Ensemble):
        loss = F.cross_entropy(model(x), y)
        return loss, loss
    labels = y if apart(model) else y * len(model)  # heads: one batch for all
    each = torch.stack([F.cross_entropy(logits, own) for logits, own in zip(model(x), labels)])
    return each.sum(), each.detach().mean()


def clipped_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters in groups that are clipped as one: a network, a member, or a trunk with its heads."""
    parts = list(model.members) if apart(model) else [model]
    return [[parameter for parameter in part.parameters() if parameter.requires_grad] for part in parts]


def clip(groups: Sequence[Sequence[Tensor]], norm: float | None, value: float | None) -> None:
    """Clip the gradients of each group, in place, by their joint norm or by value; not at all where both are None."""
    if norm is None and value is None:
        return
    for parameters in groups:
        if norm is not None:
            clip_norm_(parameters, norm)
        elif value is not None:
            clip_value_(parameters, value)


def newton_step(run: Run, optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A step of Newton's method, which differentiates the loss of the batch by itself; returns the loss before it.

    Raises RunError where the Hessian has no inverse.
    """
    try:
        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
    except RuntimeError as error:
        raise RunError(f"the update of step {run.step} was not made: {error}") from error
    run.average(loss=loss)
    return loss


def take_snapshot(run: Run, model: nn.Module, data: Images) -> None:
    """Keep the network as it is now (`Snapshots`); an average of weights gets batch-norm statistics of its own."""
    if not isinstance(model, Snapshots):
        raise TypeError(f"only Snapshots are taken of, not {type(model).__name__}")
    model.take()
    if model.how == "weights":
        reestimate(model.networks()[0], lambda: training_images(run, data), through=model)
