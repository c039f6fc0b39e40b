"""Filters: the weights that read the pixels, drawn as the pictures that they are

Paper: Krizhevsky, Sutskever, Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012, figure 3; Moran,
    Notes on Continuous Stochastic Phenomena, 1950 (the measure of smoothness).

Equation: tile_o = ½ + ½ w_o / max |w_o|,    w_o the weights (C, h, w) of unit o of the first layer, zero in mid-grey
    smoothness(w) = mean over channels and neighbours p, q of w_p w_q / mean over channels and places of w_p²
    which is 0 on average for weights drawn independently around 0, 1 for equal ones, −1 for a chequerboard.

Algorithm:
1. find the layer that reads the pixels: the first convolution or linear layer that the image meets
2. its weights as pictures: (units, C, h, w), of a linear layer the whole image
3. each is scaled by its own largest weight, or all by the largest of all, and set into a grid
4. their smoothness, beside that of the same weights in other places

Differences:
- The notes show the filters and nothing more. Line 4 is ours: smoothness tells structure from chance without a look.
- The network subtracts a mean and divides by a deviation first: w is what multiplies the standardised pixels.
- A grey grid for one channel and a coloured one for three; of other numbers every channel gets a grid of its own.

Expect: softmax regression on the bundled digits, seeds 0 to 2, 3 s of CPU time: smoothness 0.18 to 0.24, of the same weights in
    other places -0.05 to 0.01. MNIST 0.39. A network with hidden layers keeps most of the noise that it begins with: 0.02.
Command: `etude run insight/filters --source vision/lenet` after `etude run vision/lenet`; alone: `etude run insight/filters`. In
    Python, any module: `etude.run("insight/filters", source=model, data="digits")`, or `tiles(weight)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from etude.blocks.looking.attribution import probabilities
from etude.blocks.looking.sources import Network
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.ascent import layer
from etude.insight.parts.networks import examined

Scale = Literal["each", "all"]


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
    data: str = ""
    """Dataset or folder of the network's images; empty takes what it was trained on (digits for a fresh one)."""
    network: Network = "softmax"
    """Kind of a fresh network; softmax is linear."""
    train_steps: Count = 600
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    layer: str = ""
    """Layer whose weights are drawn, by its name in the network; empty for the one that reads the pixels."""
    scale: Scale = "each"
    """Each filter by its own largest weight, or all by the largest of all."""
    shown: Count = 96
    """Filters in the picture, from the first."""
    draw_every: Whole = 200
    """Training steps between pictures of a fresh network's filters (0: only at the end)."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, draw_every=10),
    "default": Config(),
    "mnist": Config(data="mnist", train_steps=938),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/blocks/test_sources.py examines several"),
    "data": "mnist",
    "layer": {"layer": "features.3", "network": "lenet"},
    "train_batch": 16,
    "shown": 5,
}

METRICS = {
    "smoothness": "mean product of neighbouring weights over the mean square; 0 by chance, 1 for equal weights",
    "shuffled_smoothness": "the same after the weights of each filter were put into other places",
    "dead": "share of the filters whose largest weight is under a hundredth of the largest of all",
    "filters": "how many there are",
}

EXPERIMENTS = (
    Experiment(
        "digits", preset="default", metric="smoothness", bar=0.15,
        controls=(
            Control("the same weights in other places", metric="shuffled_smoothness"),
            Control("an untrained network", flags={"train_steps": 1}),
        ),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- pure functions


def first_layer(model: nn.Module, x: Tensor) -> str:
    """The name of the first convolution or linear layer that images x (N, C, H, W) meet (line 1).

    Raises UserError where they meet none.
    """
    met: list[str] = []
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: met.append(name))
        for name, part in model.named_modules()
        if isinstance(part, (nn.Conv2d, nn.Linear))
    ]
    try:
        probabilities(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if not met:
        raise UserError(f"{type(model).__name__} has no convolution or linear layer that reads the image")
    return met[0]


def weights(model: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights of this layer as pictures (units, C, h, w), for a network that takes images `shape` (C, H, W) (line 2).

    Of a linear layer, which reads the image flat, (units, C, H, W). Raises UserError where the layer has no such weights.
    """
    weight = getattr(dict(model.named_modules())[name], "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 4:
        return weight.detach()
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == math.prod(shape):
        return weight.detach().reshape(-1, *shape)
    raise UserError(
        f"--layer {name} has no weights that are pictures; take a convolution, or the layer that reads the image"
    )


def tiles(weight: Tensor, scale: Scale = "each") -> Tensor:
    """½ + ½ w / max |w| in [0, 1], zero in mid-grey: (units, C, h, w) → the same shape (line 3); all zeros give mid-grey."""
    top = weight.abs().amax((1, 2, 3), keepdim=True) if scale == "each" else weight.abs().amax()
    return 0.5 + 0.5 * weight / top.clamp(min=torch.finfo(weight.dtype).tiny)


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (n, C, h, w) row by row, a white pixel around each: (C, 1 + rows · (h + 1), 1 + columns · (w + 1))."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    whole = pictures.new_ones(rows * columns, channels, height + 1, width + 1)
    whole[:count, :, 1:, 1:] = pictures
    set_in = whole.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    flat = set_in.reshape(channels, rows * (height + 1), columns * (width + 1))
    return nn.functional.pad(flat, (0, 1, 0, 1), value=1.0)


def smoothness(weight: Tensor) -> Tensor:
    """Mean product of weights side by side and one above the other over their mean square: (units, C, h, w) → (units,).

    0 where all weights are zero, or a filter is a single pixel.
    """
    across, down = weight[..., 1:] * weight[..., :-1], weight[..., 1:, :] * weight[..., :-1, :]
    pairs = torch.cat([across.flatten(1), down.flatten(1)], 1)
    if not pairs.shape[1]:
        return weight.new_zeros(len(weight))
    return pairs.mean(1) / weight.pow(2).flatten(1).mean(1).clamp(min=torch.finfo(weight.dtype).tiny)


def shuffled(weight: Tensor, draw: torch.Generator) -> Tensor:
    """The weights of each filter in other places of their channel: (units, C, h, w) → the same shape."""
    units, channels, height, width = weight.shape
    order = torch.rand(units, channels, height * width, generator=draw).argsort(-1).to(weight.device)
    return weight.flatten(2).gather(2, order).view(units, channels, height, width)


def drawn(weight: Tensor, scale: Scale, shown: int) -> Image.Image:
    """The grid of the first `shown` filters (units, C, h, w), some 700 pixels wide; coloured where C = 3, else grey."""
    pictures = tiles(weight.cpu().float(), scale)[:shown]
    if pictures.shape[1] != 3:  # every channel is a picture
        pictures = pictures.flatten(0, 1)[:shown, None]
    _, _, height, width = pictures.shape
    columns = min(len(pictures), max(1, round(math.sqrt(1.6 * len(pictures) * height / width))))
    whole = (255 * grid(pictures, columns)).round().byte().permute(1, 2, 0)
    zoom = max(1, 700 // whole.shape[1])
    return Image.fromarray(whole.squeeze(-1).numpy()).resize(
        (whole.shape[1] * zoom, whole.shape[0] * zoom), Image.Resampling.NEAREST
    )


# ------------------------------------------------------------------------------------------------------- the run


@method("insight/filters", paper="Krizhevsky et al. 2012", section="5.3.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    run.describe(source.spec, source)
    model, shape = source.model, source.spec.shape
    one = torch.zeros(1, *shape, device=run.device)
    name = layer(model, config.layer) if config.layer else first_layer(model, one)  # line 1
    units = len(weights(model, name, shape))
    many = f"{min(config.shown, units)} of the {units}" if config.shown < units else f"the {units}"
    caption = f"{source.label}: {many} filters of {name}; zero is mid-grey, each by its own largest weight."
    if config.scale == "all":
        caption = caption.replace("each by its own largest weight", "all by the largest of all")

    for step in run.steps(source.steps):
        if config.draw_every and step % config.draw_every == 0:
            run.artifact("filters", drawn(weights(model, name, shape), config.scale, config.shown), caption, step)
        run.log(loss=source.learn(step), smoothness=smoothness(weights(model, name, shape)).mean())

    weight = weights(model, name, shape)  # line 2
    run.artifact("filters", drawn(weight, config.scale, config.shown), caption, source.steps)  # line 3
    top = weight.abs().amax((1, 2, 3))
    return {
        "smoothness": float(smoothness(weight).mean()),  # line 4
        "shuffled_smoothness": float(smoothness(shuffled(weight, run.generator("other places"))).mean()),
        "dead": float((top < 0.01 * top.max()).double().mean()),
        "filters": float(units),
    }
