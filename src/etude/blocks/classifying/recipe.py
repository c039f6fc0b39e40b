"""The settings that image classifiers share: checked in one sentence, and made into optimizer, rate and ensemble

`Recipe.of(config)` takes the fields that a method's Config shares with all classifiers and refuses, in one sentence,
combinations that make no sense.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from etude import optim
from etude.blocks.classifying.ensembles import MEMBERS, Combine, Kind, assemble, snapshot_moments
from etude.blocks.nn.dropout import Form
from etude.blocks.nn.norm import BatchNorm, LayerNorm
from etude.core.errors import UserError
from etude.core.run import Run

Normalizer = Literal["none", "batch", "layer"]
"""What a `--normalizer` flag may say."""
DAMPING = (
    0.01  # of Newton's method: the Hessian of a softmax is singular, as a constant added to all logits does nothing
)
MOST = 3000  # parameters for Newton's method, whose step costs their cube


@dataclass(frozen=True)
class Recipe:
    """The settings that classifiers share; a Config that lacks one gets the default. Raises UserError."""

    steps: int
    batch: int = 128
    optimizer: optim.Name = "adam"
    learning_rate: float = 1e-3
    schedule: optim.Schedule = "constant"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    normalizer: Normalizer = "none"
    dropout: float = 0.0
    dropout_style: Form = "inverted"
    ensemble: Kind = "none"
    members: int | None = None
    combine: Combine = "probability"
    examples: int | None = None
    evaluate_every: int = 0

    @classmethod
    def of(cls, config: Any, **changes: Any) -> Recipe:
        """From the fields of a method's Config that are named like these, with `changes`."""
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls) if hasattr(config, f.name)}
        return cls(**shared | changes)

    def __post_init__(self) -> None:
        if self.clip_norm is not None and self.clip_value is not None:
            raise UserError("--clip-norm and --clip-value are two ways to do one thing; give only one of them")
        if self.optimizer == "newton":
            given = {
                "clip-norm": self.clip_norm,
                "clip-value": self.clip_value,
                "weight-decay": self.weight_decay or None,
            }
            for flag in (name for name, value in given.items() if value is not None):
                raise UserError(
                    f"--{flag} changes a gradient, but --optimizer newton solves for its step; leave it out"
                )
            if self.ensemble != "none":
                raise UserError("--optimizer newton solves for one network at a time; leave --ensemble out")
        for flag in ("batch", "examples"):
            if self.normalizer == "batch" and getattr(self, flag) == 1:
                raise UserError(
                    f"--normalizer batch has no statistics in a batch of one; take --{flag} 2 or more, or layer"
                )
        if self.dropout_style != "inverted" and not self.dropout:
            raise UserError(f"--dropout-style {self.dropout_style} changes nothing at --dropout 0; give --dropout too")
        if self.ensemble == "none":
            if self.members is not None and self.members > 1:
                raise UserError(
                    f"--members {self.members} needs an ensemble; add --ensemble seeds, bagging, heads or snapshots"
                )
            if self.combine != "probability":
                raise UserError(f"--combine {self.combine} needs an ensemble; add --ensemble (and --members)")
        if self.combine == "weights" and self.ensemble not in ("none", "snapshots"):
            raise UserError(
                f"--combine weights averages the parameters of one network's snapshots; the members of --ensemble "
                f"{self.ensemble} begin with different weights, and their average is no trained network: take probability or vote"
            )
        if self.ensemble == "snapshots":
            snapshot_moments(self.schedule, self.steps, self.count)

    @property
    def count(self) -> int:
        """The number of members."""
        return 1 if self.ensemble == "none" else self.members or MEMBERS

    @functools.cached_property
    def rate(self) -> Callable[[int], float]:
        """The learning rate of a step; a cyclic one restarts with every snapshot, five times where none is taken."""
        cycles = self.count if self.ensemble == "snapshots" else MEMBERS
        return optim.schedule(self.schedule, self.learning_rate, self.steps, cycles=cycles)

    @functools.cached_property
    def moments(self) -> tuple[int, ...]:
        """The steps behind which a snapshot is taken; none without snapshots."""
        snapshots = self.ensemble == "snapshots"
        return tuple(snapshot_moments(self.schedule, self.steps, self.count)) if snapshots else ()

    def make_optimizer(self, model: nn.Module, run: Run) -> torch.optim.Optimizer:
        """The update rule for the trainable parameters of a model that stands in its place. Raises UserError."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer != "newton":
            return optim.make(self.optimizer, parameters, self.learning_rate, weight_decay=self.weight_decay)
        count = sum(parameter.numel() for parameter in parameters)
        if count > MOST:
            raise UserError(
                f"--optimizer newton solves with a matrix of parameters × parameters, and this network has {count:,}; "
                f"it takes up to {MOST:,}"
            )
        if run.world > 1:
            raise UserError("--optimizer newton solves on one rank; take another optimizer under torchrun")
        return optim.make(self.optimizer, parameters, self.learning_rate, damping=DAMPING)


def ensemble(make: Callable[[], nn.Module], config: Any) -> nn.Module:
    """What `build` returns as ``model``: `make()`, or as many of them as the Config's ensemble has members."""
    recipe = Recipe.of(config)
    return assemble(make, recipe.ensemble, recipe.count, recipe.combine)


def normaliser(name: Normalizer, *shape: int) -> list[nn.Module]:
    """The layers to put behind one with outputs (N, *shape), between it and its squashing function.

    batch: one mean a channel (`shape[0]`), over the batch and all positions; the layer's bias does nothing then. layer:
    one mean an example, over its whole `shape` (Ba et al. 2016).
    """
    made: dict[str, Callable[[], list[nn.Module]]] = {
        "none": list,
        "batch": lambda: [BatchNorm(shape[0])],
        "layer": lambda: [LayerNorm(shape)],
    }
    return made[name]()
