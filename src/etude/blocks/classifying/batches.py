"""The images of every step: a function of (seed, step), with a stream of its own for each member of an ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from etude.blocks.classifying.ensembles import Ensemble, apart, bootstrap, member_seed
from etude.blocks.classifying.recipe import Recipe
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.data.batches import Stream
from etude.data.sets import Images, Split, moments
from etude.data.streamed import reader

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Training images (B, C, H, W) uint8 and a generator → images of the same shape and dtype."""


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


def batches(
    run: Run, recipe: Recipe, model: nn.Module, data: Images, augment: Augment | None = None
) -> Callable[[int], tuple[Any, Any]]:
    """The mini-batch of a step as a function of the step: images (B, C, H, W) and labels (B,) on the run's device.

    Of an ensemble it is a tuple of such images and one of such labels, a batch for each member; members on one trunk
    share one. Every epoch has a permutation of its own.
    """
    if not isinstance(model, Ensemble):
        return _member(run, recipe, data, augment, 0)
    members = [_member(run, recipe, data, augment, member) for member in range(len(model) if apart(model) else 1)]

    def batch(step: int) -> tuple[Any, Any]:
        images, labels = zip(*(member(step) for member in members))
        return images, labels

    return batch


def training_images(run: Run, data: Images, batch: int = 1000) -> Iterator[Tensor]:
    """The training images in order, on the run's device, for statistics; equal on every rank.

    In the fewest batches of at most `batch`, of sizes that differ by one: statistics are averaged over batches, so a
    short last one would weigh too much, and one of a single image has none.
    """
    for x in data.train.x.tensor_split(-(-len(data.train) // batch)):
        yield x.to(run.device)


def _member(
    run: Run, recipe: Recipe, data: Images, augment: Augment | None, member: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The mini-batches of one member; those of member 0 (unless it is bagged) are the single network's."""
    count = len(data.train.y)
    stream = Stream(count, recipe.batch, member_seed(run.seed, member), run.rank, run.world)
    drawn = bootstrap(count, run.seed, member) if recipe.ensemble == "bagging" else None
    purpose = f"shift {member}" if member else "shift"

    def chosen(step: int) -> Tensor:
        index = stream.indices(step)
        return index if drawn is None else drawn[index]

    images = reader(data.train.x, chosen)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index, x = chosen(step), images(step)
        if augment is not None:
            x = augment(x, run.generator(purpose, step))
        return x.to(run.device), data.train.y[index].to(run.device)

    return batch
