"""Maximally activating patches: what a unit answers most strongly

Paper: Girshick, Donahue, Darrell, Malik, Rich Feature Hierarchies, 2013, arXiv:1311.2524, section 3.1; Zeiler, Fergus,
    Visualizing and Understanding Convolutional Networks, 2013, arXiv:1311.2901, section 4.

Equation: of map m, the K largest a_m(x_n, p) over images n and places p, each shown as the receptive field of p in x_n:
    pixels first + jump·p … last + jump·p of each axis (insight/parts/fields has the arithmetic).

Algorithm:
1. a batch of images → a, the maps of the layer, the network held still in eval mode
2. the K strongest so far and the strongest of the batch → the K strongest of both
3. crop the receptive field of each of the K; what lies outside the image has the mean colour
4. are the patches of a map of one class, and alike? The same of images and places drawn at random

Differences:
- Girshick et al. suppress overlapping regions; here an image shows its strongest place alone (`--once`), or all of them.
- Of equally strong places the first counts, in the order of images and places: a run can be repeated.
- Line 4 is ours. A class is that of the image's label, a likeness the correlation of the pixels of two patches.
- The receptive field is what a place can see; what it does look at is mostly the middle of it.

Expect: LeNet on the bundled digits, seeds 0-2, 10 s of CPU time: the nine patches of a map of its second convolution correlate by
    0.76, 0.71, 0.67 (at random 0.02, 0.00, −0.01), and 46 % to 58 % are of one class (26 % to 30 %): corners, arcs, ends of
    strokes. MNIST, seed 0, 17 s: all nine images of each of the ten logits are of its class (`own_class` 1).
Command: `etude run insight/max_patches --source vision/lenet` after `etude run vision/lenet`; alone:
    `etude run insight/max_patches`; a published network: `etude run insight/max_patches --preset photographs`. In Python, any
    module: `etude.run("insight/max_patches", source=model, data="digits")`; `strongest(model, images, layer)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etude.blocks.looking.sources import Network, rounds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.ascent import layer, seen
from etude.insight.parts.fields import Field, field
from etude.insight.parts.grids import grid
from etude.insight.parts.networks import examined, middle


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
    data: str = ""
    """Dataset or folder whose images are shown; empty takes what the network was trained on (digits for a fresh one)."""
    network: Network = "lenet"
    """Kind of a fresh network; softmax is linear."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    layer: str = "middle"
    """Layer whose maps are shown, by its name; middle: the convolution half way up; logits: what the network answers."""
    pictures: Count = 10
    """How many of its maps get a row, from the first."""
    strongest: Count = 9
    """K: patches of each map."""
    once: bool = True
    """An image shows the strongest of its places alone."""
    images: Count = 360
    """Test images that are looked through, drawn by the seed (all, where there are fewer)."""
    batch: Count = 120
    """Of these at once."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, strongest=4, images=40, batch=20),
    "default": Config(),
    "mnist": Config(data="mnist", train_steps=938, layer="logits", images=10_000, batch=500),
    "photographs": Config(source="resnet20-cifar10", layer="layer3.0.conv1", images=2000, batch=250),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/insight/test_networks.py examines several"),
    "data": "mnist",
    "layer": "logits",
    "pictures": 4,
    "batch": Idle("each image is scored by itself; a larger batch only takes more memory"),
}

METRICS = {
    "score": "mean over the maps of their K strongest answers",
    "purity": "share of the K images of a map that are of their commonest class; mean over the maps",
    "random_purity": "the same of K images drawn at random",
    "own_class": "share of the K images of a logit that are of its class; mean over the logits (of other layers 0)",
    "alikeness": "mean correlation of the patches of a map",
    "random_alikeness": "the same of as many patches at random places of random images",
}

EXPERIMENTS = (
    Experiment(
        "patches alike", preset="default", metric="alikeness", bar=0.61,
        controls=(Control("patches at random", metric="random_alikeness"),),
    ),
    Experiment(
        "digits of a logit", preset="mnist", metric="own_class", bar=0.97,
        controls=(
            Control("images at random", metric="random_purity"),
            Control("an untrained network", flags={"train_steps": 1}),
        ),
    ),
)  # fmt: skip


class Strongest(NamedTuple):
    """Of each map the K strongest answers, falling: values (M, K), images (M, K) int64, places (M, K) int64 in a flat map."""

    value: Tensor
    image: Tensor
    place: Tensor


def merged(held: Strongest | None, a: Tensor, begin: int, count: int, once: bool) -> Strongest:
    """The strongest of those held and of a batch's maps a (N, M, P), whose images have the numbers begin, begin + 1, …

    Of equal values the earlier image, then the earlier place, comes first.
    """
    n, maps, places = a.shape
    if once:
        top = a.amax(2, keepdim=True)
        where = (a == top).to(torch.uint8).argmax(2)  # (N, M): the first of equal ones
        value, image = top[..., 0].T, torch.arange(begin, begin + n, device=a.device).expand(maps, n)
        place = where.T
    else:
        value = a.movedim(1, 0).reshape(maps, n * places)
        index = torch.arange(n * places, device=a.device).expand(maps, -1)
        image, place = begin + index // places, index % places
    if held is not None:
        value, image, place = (torch.cat(pair, 1) for pair in zip(held, (value, image, place)))
    order = value.argsort(dim=1, descending=True, stable=True)[:, :count]
    return Strongest(value.gather(1, order), image.gather(1, order), place.gather(1, order))


@torch.no_grad()
def strongest(
    model: nn.Module, batches: Iterable[Tensor], name: str, count: int, maps: int | None = None, once: bool = False
) -> tuple[Strongest, tuple[int, int]]:
    """Lines 1 and 2: the `count` strongest places of each map of layer `name` ("": the logits) over all batches (N, C, H, W).

    Also the shape (h, w) of a map; (1, 1) of a layer without places. Raises ValueError where there is no batch.
    """
    held, begin, shape = None, 0, (1, 1)
    for x in batches:
        (a,) = seen(model, x, [name])  # line 1
        shape = (a.shape[2], a.shape[3]) if a.ndim == 4 else (1, 1)
        held = merged(held, a.reshape(len(a), a.shape[1], -1)[:, :maps], begin, count, once)  # line 2
        begin += len(x)
    if held is None:
        raise ValueError("no image to look at")
    return held, shape


def patches(x: Tensor, found: Strongest, shape: tuple[int, int], of: Field, fill: Tensor) -> Tensor:
    """Line 3: the crops (M, K, C, h, w) of images x (N, C, H, W)."""
    rows = [
        torch.stack([of.crop(x[n], p // shape[1], p % shape[1], fill) for n, p in zip(images, places)])
        for images, places in zip(found.image.tolist(), found.place.tolist())
    ]
    return torch.stack(rows)


def alikeness(crops: Tensor) -> float:
    """Mean correlation of two different patches of a row, over the rows (M, K, C, h, w); a constant patch counts 0."""
    flat = crops.flatten(2).double()
    flat = flat - flat.mean(2, keepdim=True)
    flat = flat / flat.norm(dim=2, keepdim=True).clamp(min=1e-12)
    count = flat.shape[1]
    both = flat @ flat.transpose(1, 2)
    own = both.diagonal(dim1=1, dim2=2).sum(1)
    return float(((both.sum((1, 2)) - own) / max(count * (count - 1), 1)).mean())


def purity(labels: Tensor, classes: int) -> float:
    """Share of the commonest label in a row of (M, K), mean over the rows."""
    counts = torch.nn.functional.one_hot(labels, classes).sum(1)
    return float(counts.amax(1).double().mean()) / labels.shape[1]


@method("insight/max_patches", paper="arXiv:1311.2524", section="5.3.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    run.describe(source.spec, source)
    model, classes = source.model, source.spec.classes
    name = "" if config.layer == "logits" else middle(model) if config.layer == "middle" else layer(model, config.layer)
    for step in run.steps(source.steps):  # a fresh network learns first
        run.log(loss=source.learn(step))
    x, y = source.choose(config.images, run.seed)
    if len(x) < config.strongest:
        raise UserError(f"--strongest {config.strongest} needs as many images, and there are {len(x)}")
    found, shape = strongest(
        model,
        (image for _, image, _ in rounds(run, x, y, config.batch)),
        name,
        config.strongest,
        config.pictures,
        config.once,
    )
    found = Strongest(*(one.cpu() for one in found))
    of = field(model, x[:1].to(run.device), name)
    mean = torch.tensor(source.spec.mean)
    crops = patches(x, found, shape, of, mean)  # line 3
    maps, count = found.value.shape
    draw = run.generator("random patches")
    chance = Strongest(
        found.value,
        torch.stack([torch.randperm(len(x), generator=draw)[:count] for _ in range(maps)]),
        torch.randint(shape[0] * shape[1], (maps, count), generator=draw),
    )
    labels = y[found.image]  # line 4
    own = float((labels == torch.arange(maps)[:, None]).double().mean()) if not name else 0.0
    shown = name or "the logits"
    words = [
        [f"{classes[k] if not name else f'map {k}'}", f"{row[0]:.1f} … {row[-1]:.1f}"]
        for k, row in enumerate(found.value.tolist())
    ]
    caption = (
        f"{source.label}: the {count} strongest patches of each map of {shown}, strongest first, and their answers. "
        f"A place sees {crops.shape[3]} × {crops.shape[4]} pixels."
    )
    run.artifact("patches", grid(crops, words), caption)
    return {
        "score": float(found.value.double().mean()),
        "purity": purity(labels, len(classes)),
        "random_purity": purity(y[chance.image], len(classes)),
        "own_class": own,
        "alikeness": alikeness(crops),
        "random_alikeness": alikeness(patches(x, chance, shape, of, mean)),
    }
