"""Class images: what a class's logit prefers, kept smooth and sparse on the way up

Paper: Yosinski, Clune, Nguyen, Fuchs, Lipson, Understanding Neural Networks Through Deep Visualization, 2015,
    arXiv:1506.06579, section 3.

Equation: x ← r(x + α ∇ₓ S_c(x)), with S_c the logit of class c before the softmax, x measured from the mean colour μ, and r
    decay             x ← (1 − θ) x
    blur              x ← G_σ * x, every n-th step
    small pixels      x ← 0 where the norm over channels |x_p| lies below its q-th quantile
    contributions     x ← 0 where |Σ_channels x · ∇S_c| lies below its q-th quantile

Algorithm:
1. x ← noise round μ, one picture for each class
2. g ← ∇ₓ S_c, the network held still in eval mode
3. x ← x + α g / mean |g|
4. x ← r(x), pixels clipped to their range
5. of which class is the picture by the network, and by the mean images of the classes?

Differences:
- The gradient is divided by its mean size, so that α is in pixels and one value serves every network.
- The gradient is that of the logit. Behind the softmax it is p_c (1 − p_c) times what sets a class apart from the others, and
  fades as p_c comes near 1; the notes say so.
- Line 5 is ours. The mean images of the classes, by the examined pictures, know nothing of the network: `likeness` is the share
  of the class images that correlate most with the mean image of their own class.

Expect: LeNet on the bundled digits, seed 0, 11 s of CPU time: all ten pictures are seen as their classes, nine correlate most
    with the mean image of their own (correlation 0.39); without the priors 0.13, of an untrained network −0.07. One sees
    strokes of 0, 1 and 6, hardly more: this network has learnt from 1,293 digits.
Command: `etude run insight/class_images --source vision/lenet` after `etude run vision/lenet`; alone:
    `etude run insight/class_images`. In Python, any module: `etude.run("insight/class_images", source=model, data="digits")`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.blocks.looking.attribution import panel, probabilities
from etude.blocks.looking.sources import Network
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Fraction, NonNegative, Positive
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.ascent import ascend, blurred, even, unit_score, within
from etude.insight.parts.networks import examined


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
    data: str = ""
    """Dataset or folder to compare with; empty takes what the network was trained on (digits for a fresh one)."""
    network: Network = "lenet"
    """Kind of a fresh network; softmax is linear."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    classes: Count = 10
    """How many of its classes, from the first."""
    steps: Count = 100
    """Steps of the ascent."""
    learning_rate: Positive = 0.02
    """α: by how much a step moves a pixel on average, of [0, 1]."""
    shrink: Fraction = 0.02
    """θ: share of a pixel's distance from the mean colour that a step takes away."""
    blur: NonNegative = 0.7
    """σ in pixels."""
    blur_every: Count = 4
    """n: steps from one blur to the next."""
    small_pixels: Fraction = 0.3
    """q: share of the pixels, those of the smallest norm, that return to the mean colour."""
    small_contributions: Fraction = 0.0
    """q: the same of those that contribute least to the logit."""
    images: Count = 360
    """Test images to compare with, drawn by the seed (all, where there are fewer)."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, steps=10, images=40),
    "default": Config(),
    "mnist": Config(data="mnist", train_steps=938, images=2000),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/blocks/test_sources.py examines several"),
    "data": "mnist",
    "classes": 4,
    "blur_every": 2,
    "small_contributions": 0.6,
}

METRICS = {
    "score": "mean over the classes of the logit that was reached",
    "confidence": "mean probability that the network gives the class of its picture",
    "likeness": "share of the pictures that correlate most with the mean image of their own class",
    "correlation": "mean correlation of a picture with the mean image of its own class",
    "roughness": "mean difference of neighbouring pixels over the mean distance from the mean colour",
}

EXPERIMENTS = (
    Experiment(
        "digits", preset="default", metric="correlation", bar=0.33,
        controls=(
            Control("no prior", flags={"shrink": 0.0, "blur": 0.0, "small_pixels": 0.0}),
            Control("an untrained network", flags={"train_steps": 1}),
        ),
    ),
)  # fmt: skip


def kept(x: Tensor, weight: Tensor, share: float) -> Tensor:
    """x (N, C, H, W), 0 at the ⌊share · H · W⌋ pixels of the smallest `weight` (N, H, W) in each picture."""
    count = int(share * weight[0].numel())
    order = weight.flatten(1).argsort(dim=1, stable=True)[:, :count]
    mask = torch.ones_like(weight.flatten(1)).scatter_(1, order, 0.0)
    return x * mask.view(len(x), 1, *x.shape[2:])


def regularised(x: Tensor, gradient: Tensor, config: Config, step: int) -> Tensor:
    """r(x) of the equation, in its order; x (N, C, H, W) measured from the mean colour, `gradient` of its shape."""
    x = (1 - config.shrink) * x
    if config.blur and (step + 1) % config.blur_every == 0:
        x = blurred(x, config.blur)
    if config.small_pixels:
        x = kept(x, x.norm(dim=1), config.small_pixels)
    if config.small_contributions:
        x = kept(x, (x * gradient).sum(1).abs(), config.small_contributions)
    return x


@method("insight/class_images", paper="arXiv:1506.06579", section="5.3.5", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    run.describe(source.spec, source)
    model, names = source.model, source.spec.classes
    mean = torch.tensor(source.spec.mean, device=run.device).view(1, -1, 1, 1)
    classes = torch.arange(min(config.classes, len(names)), device=run.device)
    begin = mean.expand(1, *source.spec.shape).repeat(len(classes), 1, 1, 1)  # line 1
    begin += 0.1 * torch.randn(begin.shape, generator=run.generator("start")).to(begin)
    pictures = Box(x=begin)
    run.track(pictures=pictures)
    score, rule, onto = unit_score(model, "", classes), even(config.learning_rate), within(begin)
    for step in run.steps(source.steps + config.steps):
        if step < source.steps:  # a fresh network learns first
            run.log(loss=source.learn(step))
            continue
        slope = []

        def climb(gradient: Tensor, slope: list[Tensor] = slope) -> Tensor:
            slope.append(gradient)
            return rule(gradient)

        x, height = ascend(pictures.x, score, climb)  # lines 2-3
        pictures.x = onto(mean + regularised(x - mean, slope[0], config, step - source.steps))  # line 4
        run.log(score=height.mean())
    x = pictures.x
    said = probabilities(model, x)  # line 5
    own = said.gather(1, classes[:, None])[:, 0]
    likeness = alike(x, *source.choose(config.images, run.seed), len(names))
    rows = [[names[k], f"is {names[int(row.argmax())]} {100 * float(row.max()):.0f}%"] for k, row in enumerate(said)]
    caption = f"{source.label}: for each class a picture that its logit prefers, kept smooth and sparse, and what is seen in it."
    run.artifact("pictures", panel({"picture": x}, rows), caption)
    with torch.no_grad():
        reached = float(score(x).mean())
    return {
        "score": reached,
        "confidence": float(own.mean()),
        "likeness": float((likeness.argmax(1) == classes.cpu()).double().mean()),
        "correlation": float(likeness.diagonal().mean()),
        "roughness": roughness(x, mean),
    }


def alike(x: Tensor, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Correlation of each picture with the mean image of each class: (N, C, H, W), (M, C, H, W), (M,) → (N, classes) on the CPU.

    0 where a class has no image. Raises UserError where no image has a label.
    """
    if not len(labels):
        raise UserError("no labelled image is left to compare with; take more --images")
    one_hot = torch.nn.functional.one_hot(labels, classes).to(images)
    means = (one_hot.T @ images.flatten(1)) / one_hot.sum(0).clamp(min=1)[:, None]

    def centred(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(1, keepdim=True)
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)

    return centred(x.flatten(1).to(images)) @ centred(means).T


def roughness(x: Tensor, mean: Tensor) -> float:
    """Mean |difference| of pixels side by side and one above the other, over the mean |distance| from the mean colour."""
    steps = torch.cat([(x[..., 1:] - x[..., :-1]).abs().flatten(), (x[..., 1:, :] - x[..., :-1, :]).abs().flatten()])
    return float(steps.mean() / (x - mean).abs().mean().clamp(min=1e-12))
