"""Training a classifier of images from its settings: optimizer, schedule, clipping, batches, ensemble, evaluation

`Recipe.of(config)` takes the fields that a method's Config shares with all classifiers and refuses, in one sentence,
combinations that make no sense; `learn` is what a classifier's method does between `build` and its pictures:

1. the images of step s are a function of (seed, s): a new permutation every epoch; members have streams of their own
2. g ← ∇_θ of the mean cross-entropy of the mini-batch, one member at a time
3. clip g, member by member, when asked to
4. θ ← update(θ, g) at the rate of step s;  at its moments keep a snapshot
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.blocks.ensembles import (
    MEMBERS,
    Combine,
    Ensemble,
    Kind,
    Snapshots,
    assemble,
    bootstrap,
    member_seed,
    reestimate,
    snapshot_moments,
)
from etude.blocks.nn.dropout import Form
from etude.blocks.nn.norm import BatchNorm, LayerNorm
from etude.blocks.plots import classifier_pictures
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.fit import accuracy, fit
from etude.core.randomness import generator
from etude.core.run import Run
from etude.data.batches import Stream
from etude.data.sets import Images, Split, moments
from etude.optim.clipping import clip_norm_, clip_value_

Normalizer = Literal["none", "batch", "layer"]
"""What a `--normalizer` flag may say."""
DAMPING = (
    0.01  # of Newton's method: the Hessian of a softmax is singular, as a constant added to all logits does nothing
)
MOST = 3000  # parameters for Newton's method, whose step costs their cube
Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Training images (B, C, H, W) uint8 and a generator → images of the same shape and dtype."""


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


def subset(images: Images, examples: int | None, seed: int) -> Images:
    """The same data with `examples` training images, the first of a permutation drawn by `seed`; None keeps all.

    Mean and deviation of the spec are those of the images kept. Raises UserError when there are fewer.
    """
    if examples is None:
        return images
    if examples > len(images.train):
        raise UserError(
            f"--examples {examples} is more than the {len(images.train):,} training images of {images.name}"
        )
    kept = torch.randperm(len(images.train), generator=generator(seed, 0, 0, "training subset"))[:examples]
    x, y = images.train.x[kept], images.train.y[kept]
    mean, std = moments(x.numpy())
    spec = dataclasses.replace(images.spec, mean=mean, std=std)
    return dataclasses.replace(images, train=Split(x, y), spec=spec)


def ensemble(make: Callable[[], nn.Module], config: Any) -> nn.Module:
    """What `build` returns as ``model``: `make()`, or as many of them as the Config's ensemble has members."""
    recipe = Recipe.of(config)
    return assemble(make, recipe.ensemble, recipe.count, recipe.combine)


def learn(run: Run, recipe: Recipe, model: nn.Module, data: Images, augment: Augment | None = None) -> dict[str, float]:
    """Train `model` (from `ensemble` or `assemble`, already placed) and return test_loss and test_accuracy.

    Tracks ``model`` and ``optimizer``. Every member of an ensemble learns as it would alone: its loss, its clipping and
    its batches are its own; heads on one trunk share the batch, and are clipped together.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"weight_decay": recipe.weight_decay}
    if recipe.optimizer == "newton":
        settings = {"damping": DAMPING}
        count = sum(parameter.numel() for parameter in parameters)
        if count > MOST:
            raise UserError(
                f"--optimizer newton solves with a matrix of parameters × parameters, and this network has {count:,}; "
                f"it takes up to {MOST:,}"
            )
        if run.world > 1:
            raise UserError("--optimizer newton solves on one rank; take another optimizer under torchrun")
    optimizer = optim.make(recipe.optimizer, parameters, recipe.learning_rate, **settings)
    cycles = recipe.count if recipe.ensemble == "snapshots" else MEMBERS
    rate = optim.schedule(recipe.schedule, recipe.learning_rate, recipe.steps, cycles=cycles)
    apart = isinstance(model, Ensemble) and model.trunk is None  # every member with a batch of its own
    batches = [_batches(run, recipe, data, augment, member) for member in range(recipe.count if apart else 1)]

    def batch(step: int) -> Any:
        drawn = [member(step) for member in batches]
        return tuple(zip(*drawn)) if isinstance(model, Ensemble) else drawn[0]

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if not isinstance(model, Ensemble):
            return F.cross_entropy(outputs, targets)
        each = targets if apart else targets * len(model)  # heads: one batch for all
        return torch.stack([F.cross_entropy(logits, y) for logits, y in zip(outputs, each)])

    due = snapshot_moments(recipe.schedule, recipe.steps, recipe.count) if isinstance(model, Snapshots) else ()

    def after(step: int) -> None:
        if isinstance(model, Snapshots) and step in due:
            model.take()
            if model.how == "weights":
                reestimate(model.networks()[0], lambda: training_images(run, data), through=model)

    def evaluate() -> dict[str, float]:
        return {f"test_{name}": value for name, value in accuracy(run, model, data.test.x, data.test.y).items()}

    return fit(
        run,
        model,
        optimizer,
        batch,
        recipe.steps,
        rate=rate,
        loss=loss,
        clip=_clip(recipe, model),
        after=after if due else None,
        evaluate=evaluate,
        evaluate_every=recipe.evaluate_every,
    )


def pictures(run: Run, model: nn.Module, data: Images, first: Tensor) -> None:
    """Confusion matrix, surest mistakes and the filters of a first layer's weight, (O, C, h, w) or (O, C·H·W)."""
    whole = checkpoint.state_of(first)  # under --shard every rank holds a part of it
    filters = whole if whole.ndim == 4 else whole.view(len(whole), *data.spec.shape)
    classifier_pictures(run, model, data.test.x, data.test.y, data.spec.classes, filters)


def training_images(run: Run, data: Images, batch: int = 1000) -> Iterator[Tensor]:
    """The training images in order, on the run's device, for statistics; equal on every rank.

    In the fewest batches of at most `batch`, of sizes that differ by one: statistics are averaged over batches, so a
    short last one would weigh too much, and one of a single image has none.
    """
    for x in data.train.x.tensor_split(-(-len(data.train) // batch)):
        yield x.to(run.device)


def _batches(
    run: Run, recipe: Recipe, data: Images, augment: Augment | None, member: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The mini-batches of one member; those of member 0 (unless it is bagged) are the single network's."""
    count = len(data.train.y)
    stream = Stream(count, recipe.batch, member_seed(run.seed, member), run.rank, run.world)
    drawn = bootstrap(count, run.seed, member) if recipe.ensemble == "bagging" else None
    purpose = f"shift {member}" if member else "shift"

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = stream.indices(step)
        if drawn is not None:
            index = drawn[index]
        x = data.train.x[index]
        if augment is not None:
            x = augment(x, run.generator(purpose, step))
        return x.to(run.device), data.train.y[index].to(run.device)

    return batch


def _clip(recipe: Recipe, model: nn.Module) -> Callable[[], None] | None:
    """Clip the gradients of each part that would be clipped alone; None when nothing is to be clipped."""
    parts = list(model.members) if isinstance(model, Ensemble) and model.trunk is None else [model]
    groups = [[p for p in part.parameters() if p.requires_grad] for part in parts]
    by_norm, by_value = recipe.clip_norm, recipe.clip_value
    if by_norm is None and by_value is None:
        return None

    def clip() -> None:
        for parameters in groups:
            if by_norm is not None:
                clip_norm_(parameters, by_norm)
            elif by_value is not None:
                clip_value_(parameters, by_value)

    return clip
