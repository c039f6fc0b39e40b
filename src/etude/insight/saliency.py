"""Saliency: the gradient of one class's logit shows which pixels it depends on

Paper: Simonyan, Vedaldi, Zisserman, Deep Inside Convolutional Networks, 2013, arXiv:1312.6034. Randomised weights as a
    check: Adebayo et al., Sanity Checks for Saliency Maps, 2018, arXiv:1810.03292. Faithfulness: Bhatt, Weller, Moura,
    2020, arXiv:2005.00631.

Equation: M = ∂z_c(x) / ∂x, with z_c the logit (before the softmax) of class c; as a heat map, max over channels of |M|.
    Of a linear classifier z = Wx + b it is the row W_c, whatever the image.

Algorithm:
1. z ← model(x) in eval mode, parameters held still; c ← the predicted class, or the one asked for
2. M ← backpropagation of 1 at z_c (0 at every other unit) down to the pixels, for each image its own
3. erase random sets S of k % of the pixels (they become μ, the mean of the training images): the map expects z_c to fall
   by Σ_{i∈S} M_i (x_i − μ_i). Faithfulness is Spearman's correlation of the expected and the true falls
4. erase the k % of the pixels with the largest expected fall M_i (x_i − μ_i): how far does the probability of c fall?
5. M′ ← the same with the last layer's weights shuffled, then all weights; Spearman's correlation of |M| and |M′|

Differences:
- Lines 3 to 5 are not in Simonyan et al. What they measure is returned beside the same of nulls in M's place: a blob in the
  centre, the image itself, a random map, the map of the network with all its weights shuffled.
- A heat map |M| says how much a pixel matters, not in which direction, and is a poor guide for erasing: without the pixels
  of the largest |M| (`drop_absolute`) the probability of MNIST's digits falls by 0.15 to 0.17, without a blob in the centre
  by 0.26 to 0.29. With its sign the gradient is a good one: line 4 lowers it by 0.64 to 0.67, and a blob that is told where
  the ink is (pixels ranked by blob · (x − μ), `drop_inked_centre`) by 0.45 to 0.54. On the small bundled digits that blob
  comes nearer (0.15 to 0.25, line 4: 0.27 to 0.32).
- Faithfulness by Spearman's correlation over sets of k % of the pixels; Bhatt et al. take Pearson's.
- Weights are shuffled (each parameter's entries permuted) instead of drawn anew, since that works for every module.
- The gradient is with respect to pixels in [0, 1]; the network's own standardisation is a part of it.
- Maps keep their sign (blue: a brighter pixel lowers the logit; red: raises it); colour images show the heat map.

Expect: LeNet, seeds 0-2. Bundled digits, 10 s: faithfulness 0.33 to 0.48, of the nulls at most 0.14; likeness 0.22 to 0.36
    with the last layer shuffled, 0.13 to 0.19 with all weights. MNIST, 2 min: 0.49 to 0.61, of the nulls at most 0.33.
Command: `etude run insight/saliency --source vision/lenet` after `etude run vision/lenet`;
    alone: `etude run insight/saliency`. In Python, any module: `saliency(model, x, target)`;
    `explain(model, x)` for the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude.blocks.looking.attribution import (
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
from etude.blocks.looking.sources import Network, rounds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.networks import examined
from etude.insight.parts.nulls import centre_blob
from etude.insight.parts.worth import expected_falls, faithfulness


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
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
    subsets: Count = 32
    """Random sets of pixels erased from each image."""
    images: Count = 360
    """Test images to look at, drawn by the seed (all, where there are fewer)."""
    batch: Count = 60
    """Images in a round; the weights are shuffled anew in each."""
    shown: Whole = 8
    """Images in the picture."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, subsets=8, images=40, batch=20),
    "default": Config(),
    "mnist": Config(data="mnist", train_steps=938, images=2000, batch=250),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/blocks/test_sources.py examines several"),
    "data": "mnist",
}

METRICS = {
    "test_accuracy": "accuracy of the examined network on the examined images",
    "faithfulness": "correlation of the map's sum over random sets of pixels with what erasing them changes; 1 is best",
    "faithfulness_*": "the same of a map that knows less: a blob, the image, chance, shuffled weights",
    "drop_*": "what erasing the pixels that this map ranks first takes from the probability of the class",
    "sanity_*": "rank correlation with the map after the last layer (all layers) was shuffled; near 0 is best",
}

NULLS = (
    Control("a blob in the centre", metric="faithfulness_centre"),
    Control("the image itself", metric="faithfulness_image"),
    Control("a random map", metric="faithfulness_random"),
    Control("the map of the network with its weights shuffled", metric="faithfulness_shuffled"),
)

EXPERIMENTS = (
    Experiment("digits", preset="default", metric="faithfulness", bar=0.28, controls=NULLS),
    Experiment("mnist", preset="mnist", metric="faithfulness", bar=0.42, controls=NULLS),
    Experiment(
        "erasing what it points at",
        preset="mnist",
        metric="drop_salient",
        bar=0.58,
        controls=(
            Control("the map without its sign", metric="drop_absolute"),
            Control("a blob in the centre", metric="drop_centre"),
            Control("a blob in the centre that knows the ink", metric="drop_inked_centre"),
            Control("the brightest pixels", metric="drop_image"),
            Control("pixels at random", metric="drop_random"),
        ),
    ),
)


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
    """A picture for any module: image, map, image without the pixels that count most for the class, predictions.

    x (N, C, H, W) with C = 1 or 3, in [0, 1]; `names` of the classes (their numbers otherwise). Erased pixels become
    the mean of their channel over x.
    """
    maps, fill = saliency(model, x, target), x.mean((0, 2, 3), keepdim=True)
    without = erase(x, expected_falls(maps, x, fill), erased, fill)
    before, after = probabilities(model, x), probabilities(model, without)
    names = names or [str(k) for k in range(before.shape[1])]
    return panel({"image": x, "saliency": one_plane(maps), "erased": without}, verdicts(before, after, names))


@method("insight/saliency", paper="arXiv:1312.6034", section="5.3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    names, model = source.spec.classes, source.model
    if config.target is not None and config.target >= len(names):
        raise UserError(f"--target {config.target} is no class; {source.label} has 0 to {len(names) - 1}")
    run.describe(source.spec, source)
    mean = torch.tensor(source.spec.mean, device=run.device).view(1, -1, 1, 1)
    x, y = source.choose(config.images, run.seed)
    for step in run.steps(source.steps):  # a fresh network learns first
        run.log(loss=source.learn(step))
    total: Counter[str] = Counter()
    for number, image, true in rounds(run, x, y, config.batch):
        before = probabilities(model, image)
        aim = chosen(before, config.target)
        total["test_accuracy"] += int((before.argmax(1) == true).sum())
        maps = saliency(model, image, aim)  # lines 1-2
        blind = {
            name: shuffled(model, run.generator(f"shuffle {name}", number), last_only=name == "last")
            for name in ("last", "all")
        }
        others = {name: saliency(network, image, aim) for name, network in blind.items()}
        chance = torch.randn(maps.shape, generator=run.generator("random map", number)).to(run.device)
        nulls = {"centre": centre_blob(image), "image": image, "random": chance, "shuffled": others["all"]}
        draw = run.generator("subsets", number)
        worth = faithfulness(
            model, image, aim, {"": maps, **nulls}, config.erased, config.subsets, mean, draw
        )  # line 3
        for name, values in worth.items():
            total[f"faithfulness_{name}".strip("_")] += float(values.sum())
        ranks = {
            "salient": expected_falls(maps, image, mean),
            "absolute": heat(maps),
            **{name: nulls[name].amax(1) for name in ("centre", "image", "random")},
            "inked_centre": expected_falls(nulls["centre"], image, mean),
        }
        for name, rank in ranks.items():  # line 4
            after = probabilities(model, erase(image, rank, config.erased, mean))
            total[f"drop_{name}"] += float((before - after).gather(1, aim[:, None]).sum())
        for name, other in others.items():  # line 5
            total[f"sanity_{name}"] += float(rank_correlation(heat(maps), heat(other)).sum())
    if config.shown:
        image, true = x[: config.shown].to(run.device), y[: config.shown].to(run.device)
        maps = saliency(model, image, config.target)
        without = erase(image, expected_falls(maps, image, mean), config.erased, mean)
        said = verdicts(probabilities(model, image), probabilities(model, without), names, true)
        asked = "predicted class" if config.target is None else f"class {names[config.target]}"
        caption = (
            f"{source.label}: the image, the gradient of the logit of the {asked} (red raises it, blue lowers it), the "
            f"image without the {config.erased:.0%} of its pixels that count most for it, and what is seen before and after."
        )
        run.artifact("maps", panel({"image": image, "saliency": one_plane(maps), "erased": without}, said), caption)
    return {name: value / len(y) for name, value in total.items()}
