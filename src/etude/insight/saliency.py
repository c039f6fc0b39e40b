"""Saliency: the gradient of one class's logit shows which pixels it depends on

Paper: Simonyan, Vedaldi, Zisserman, Deep Inside Convolutional Networks, 2013, arXiv:1312.6034. Randomised weights as a
    check: Adebayo et al., Sanity Checks for Saliency Maps, 2018, arXiv:1810.03292.

Equation: M = ∂z_c(x) / ∂x, with z_c the logit (before the softmax) of class c; as a heat map, max over channels of |M|.
    Of a linear classifier z = Wx + b it is the row W_c, whatever the image.

Algorithm:
1. z ← model(x) in eval mode, parameters held still; c ← the predicted class, or the one asked for
2. M ← backpropagation of 1 at z_c (0 at every other unit) down to the pixels, for each image its own
3. erase the k % of pixels with the largest |M|, and k % at random: how far does the probability of c fall?
4. M′ ← the same with the last layer's weights shuffled, then all weights; Spearman's correlation of |M| and |M′|

Differences:
- Lines 3 and 4 are not in Simonyan et al. A map that shows what the network uses makes the probability fall faster than
  chance does (`drop_salient` against `drop_random`), and does not survive the loss of the weights (`sanity_last`,
  `sanity_all` near 0). Weights are shuffled (each parameter's entries permuted) instead of drawn anew, since that works
  for every module. Erased pixels become the mean of the training set.
- The gradient is with respect to pixels in [0, 1]; the network's own standardisation is a part of it.
- Maps keep their sign (blue: a brighter pixel lowers the logit; red: raises it); colour images show the heat map.

Expect: LeNet on the bundled digits, seeds 0-2: erasing the 10 % most salient pixels lowers the probability of the
    predicted class by 0.04 to 0.11, erasing 10 % at random by 0.00 to 0.04; likeness 0.24 to 0.35 with the last layer
    shuffled, 0.12 to 0.19 with all weights. MNIST, seed 0: 0.174 and 0.017, likeness 0.29 and 0.20.
Command: `etude run insight/saliency --source vision/lenet` after `etude run vision/lenet`;
    alone: `etude run insight/saliency`. In Python, any module: `saliency(model, x, target)`;
    `explain(model, x)` for the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude.blocks.attribution import (
    chosen,
    erase,
    heat,
    input_gradient,
    one_plane,
    panel,
    probabilities,
    rank_correlation,
    shuffled,
    unit,
    verdicts,
)
from etude.blocks.sources import Network, resolve
from etude.catalog import Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name (its latest run), or fresh: train a network first. In Python also a model object."""
    data: str = ""
    """Dataset or folder to look at; empty takes what the network was trained on (digits for a fresh one)."""
    network: Network = "lenet"
    """Kind of a fresh network; softmax is linear."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    target: Whole | None = None
    """Class whose logit is explained; none takes the predicted class of each image."""
    erased: Probability = 0.1
    """Share of the pixels that is erased to see what the map is worth."""
    images: Count = 360
    """Test images to look at, drawn by the seed (all, where there are fewer)."""
    batch: Count = 60
    """Images in a step."""
    shown: Whole = 8
    """Images in the picture."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, images=40, batch=20),
    "default": Config(),
    "mnist": Config(data="mnist", train_steps=938, images=2000, batch=250),
}

EXPERIMENTS = (Experiment("digits", preset="default", metric="drop_gain", bar=0.01),)


def saliency(model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
    """∂z_target / ∂x, signed, shape and dtype of x, detached (lines 1-2).

    x is floating (N, …) in the units the model takes; `target` int64 (N,), one class number, or None for the predicted
    classes. The model returns logits (N, K ≥ 2), not probabilities: behind a softmax the map would also show how the
    other classes fall. It is left as it was, and no gradient of its parameters is computed.
    """
    return input_gradient(model, x, lambda z: unit(z, target))[0]


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, names: Sequence[str] = (), erased: float = 0.1
) -> Figure:
    """A picture for any module: image, map, image without its most salient pixels, predictions before and after.

    x (N, C, H, W) with C = 1 or 3, in [0, 1]; `names` of the classes (their numbers otherwise). Erased pixels become
    the mean of their channel over x.
    """
    maps = saliency(model, x, target)
    without = erase(x, heat(maps), erased, x.mean((0, 2, 3), keepdim=True))
    before, after = probabilities(model, x), probabilities(model, without)
    names = names or [str(k) for k in range(before.shape[1])]
    return panel({"image": x, "saliency": one_plane(maps), "erased": without}, verdicts(before, after, names))


@method("insight/saliency", paper="arXiv:1312.6034", section="5.3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = resolve(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    names, model = source.data.spec.classes, source.model
    if config.target is not None and config.target >= len(names):
        raise UserError(f"--target {config.target} is no class; {source.label} has 0 to {len(names) - 1}")
    run.describe(source.data.spec)
    x, y = source.choose(config.images, run.seed)
    mean = torch.tensor(source.data.spec.mean, device=run.device).view(1, -1, 1, 1)
    seen = Box(images=0, right=0, salient=0.0, random=0.0, last=0.0, all=0.0)
    run.track(seen=seen)
    batches = -(-len(y) // config.batch)
    for step in run.steps(source.steps + batches):
        if step < source.steps:  # a fresh network learns first
            run.log(loss=source.learn(step))
            continue
        part = slice((step - source.steps) * config.batch, (step - source.steps + 1) * config.batch)
        image, true = x[part].to(run.device), y[part].to(run.device)
        before = probabilities(model, image)
        aim = chosen(before, config.target)
        maps = heat(saliency(model, image, aim))  # lines 1-2
        chance = torch.rand(maps.shape, generator=run.generator("erased", step)).to(run.device)
        held = before.gather(1, aim[:, None])
        for name, rank in (("salient", maps), ("random", chance)):  # line 3
            after = probabilities(model, erase(image, rank, config.erased, mean)).gather(1, aim[:, None])
            setattr(seen, name, getattr(seen, name) + float((held - after).sum()))
        for name in ("last", "all"):  # line 4
            blind = shuffled(model, run.generator(f"shuffle {name}", step), last_only=name == "last")
            alike = rank_correlation(maps, heat(saliency(blind, image, aim)))
            setattr(seen, name, getattr(seen, name) + float(alike.sum()))
        seen.images += len(true)
        seen.right += int((before.argmax(1) == true).sum())
        run.log(drop_salient=seen.salient / seen.images, drop_random=seen.random / seen.images)
    if config.shown:
        image, true = x[: config.shown].to(run.device), y[: config.shown].to(run.device)
        maps = saliency(model, image, config.target)
        without = erase(image, heat(maps), config.erased, mean)
        said = verdicts(probabilities(model, image), probabilities(model, without), names, true)
        asked = "predicted class" if config.target is None else f"class {names[config.target]}"
        caption = (
            f"{source.label}: the image, the gradient of the logit of the {asked} (red raises it, blue lowers it), the "
            f"image with its {config.erased:.0%} most salient pixels erased, and what is seen before and after."
        )
        run.artifact("maps", panel({"image": image, "saliency": one_plane(maps), "erased": without}, said), caption)
    return {
        "accuracy": seen.right / seen.images,
        "drop_salient": seen.salient / seen.images,
        "drop_random": seen.random / seen.images,
        "drop_gain": (seen.salient - seen.random) / seen.images,
        "sanity_last": seen.last / seen.images,
        "sanity_all": seen.all / seen.images,
    }
