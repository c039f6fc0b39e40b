"""Guided backpropagation: only positive evidence passes each ReLU on the way back

Paper: Springenberg, Dosovitskiy, Brox, Riedmiller, Striving for Simplicity: The All Convolutional Net, 2014,
    arXiv:1412.6806. The critique: Adebayo et al., Sanity Checks for Saliency Maps, 2018, arXiv:1810.03292.

Equation: at a ReLU with input u and gradient δ arriving from above, what goes on downwards is δ · 1[u > 0] · 1[δ > 0].
    Everything else is backpropagation of the logit z_c to the pixels, as in insight/saliency.

Algorithm:
1. z ← model(x) in eval mode, parameters held still; c ← the predicted class, or the one asked for
2. M ← backpropagation of 1 at z_c to the pixels, with the rule above at every ReLU
3. M′ ← the same with the last layer's weights shuffled, then with all weights shuffled: Spearman's correlation of
   |M| and |M′|, beside the same numbers of the plain gradient
4. faithfulness of M and of the plain gradient, as in insight/saliency, line 3

Differences:
- E44[B]: negative gradients are zeroed *in addition* to the ReLU's own gate, 1[u > 0]; the notes name only the former
  (which alone is the "deconvnet").
- E44[B]: a sharp map is no proof of understanding. Line 3 is reported with every run: where `sanity_last` stays high,
  the map hardly depends on what the network has learnt in its last layer: it resembles an edge detector. `sanity_gap` is
  the finding of Adebayo et al. in one number: by how much more a guided map survives than the plain gradient does.
- Line 4 is ours: of what happens when pixels are erased a guided map says about half as much as the plain gradient.
- The rule holds for every ReLU that a module calls (nn.ReLU, also one used many times, F.relu, torch.relu, x.relu(), in
  place or not), found while the model runs; nothing is hooked onto it. Other activations pass their plain gradient. A
  model in which no ReLU is seen is refused, for there the map is just the gradient.
- Weights are shuffled (each parameter's entries permuted) instead of drawn anew, since that works for every module.

Expect: LeNet on the bundled digits, seeds 0-2, 9 s: likeness of guided maps 0.72 to 0.78 with the last layer shuffled (the
    plain gradient: 0.22 to 0.36), 0.23 to 0.27 with all weights shuffled (0.13 to 0.19); faithfulness 0.15 to 0.29 (0.33
    to 0.48).
Command: `etude run insight/guided_backprop --source vision/lenet` after `etude run vision/lenet`; alone:
    `etude run insight/guided_backprop`. In Python, any module: `guided_backprop(model, x, target)`, and
    `explain(model, x)` for the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
from etude.blocks.looking.sources import rounds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.networks import examined
from etude.insight.parts.worth import faithfulness
from etude.insight.saliency import saliency


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
    data: str = ""
    """Dataset or folder to look at; empty takes what the network was trained on (digits for a fresh one)."""
    network: Literal["lenet", "mlp"] = "lenet"
    """Kind of a fresh network."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    target: Whole | None = None
    """Class whose logit is explained; none takes the predicted class of each image."""
    erased: Probability = 0.1
    """Share of the pixels that is erased: in the picture those of the largest |map|, in line 4 at random."""
    subsets: Count = 32
    """Random sets of pixels erased from each image."""
    images: Count = 360
    """Test images to look at, drawn by the seed (all, where there are fewer)."""
    batch: Count = 60
    """Images in a round; the weights are shuffled anew in each."""
    shown: Whole = 8
    """Images in the pictures."""


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
    "faithfulness": "correlation of the guided map's sum over random sets of pixels with what erasing them changes",
    "plain_faithfulness": "the same of the plain gradient",
    "sanity_last": "rank correlation of the guided map with that of the network whose last layer is shuffled",
    "sanity_all": "rank correlation of the guided map with that of the network whose weights are all shuffled",
    "plain_sanity_*": "the same of the plain gradient",
    "sanity_gap": "by how much the guided map looks more alike than the plain gradient after the last layer is shuffled",
    "sanity_all_gap": "the same after all weights are shuffled",
}

EXPERIMENTS = (
    Experiment(
        "the finding of Adebayo et al.",
        preset="default",
        metric="sanity_gap",
        bar=0.35,
        published="guided maps are insensitive to the higher layers' weights, the gradient is not (arXiv:1810.03292)",
        notes="High is not a merit: it shows that the map does not depend on what the last layer has learnt.",
        controls=(
            Control("the plain gradient in its place", swap={"guided_backprop": "etude.insight.saliency.saliency"}),
            Control("maps compared with themselves", swap={"shuffled": "etude.insight.parts.nulls.not_shuffled"}),
            Control("all weights shuffled", metric="sanity_all_gap"),
        ),
    ),
)


def guided_backprop(model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
    """The guided map of class `target`, signed, shape and dtype of x, detached (lines 1-2).

    x is floating (N, …) in the units the model takes; `target` int64 (N,), one class number, or None for the predicted
    classes. The model returns logits (N, K ≥ 2) and is left as it was: nothing is hooked, no flag changes, no gradient
    of its parameters is computed. Raises ValueError if it uses no ReLU.
    """
    return input_gradient(model, x, lambda z: unit(z, target), guided=True)[0]


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, names: Sequence[str] = (), erased: float = 0.1
) -> Figure:
    """A picture for any module: image, guided map, plain gradient, image without its top pixels, predictions.

    x (N, C, H, W) with C = 1 or 3, in [0, 1]; `names` of the classes (their numbers otherwise). Erased pixels become
    the mean of their channel over x.
    """
    return _picture(model, x, target, names, erased, x.mean((0, 2, 3), keepdim=True))


def _picture(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None,
    names: Sequence[str],
    erased: float,
    fill: Tensor,
    truth: Tensor | None = None,
) -> Figure:
    guided = guided_backprop(model, x, target)
    without = erase(x, heat(guided), erased, fill)
    before, after = probabilities(model, x), probabilities(model, without)
    said = verdicts(before, after, names or [str(k) for k in range(before.shape[1])], truth)
    plain = one_plane(saliency(model, x, target))
    return panel({"image": x, "guided": one_plane(guided), "plain": plain, "erased": without}, said)


@method("insight/guided_backprop", paper="arXiv:1412.6806", section="5.3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    names, model = source.spec.classes, source.model
    if config.target is not None and config.target >= len(names):
        raise UserError(f"--target {config.target} is no class; {source.label} has 0 to {len(names) - 1}")
    run.describe(source.spec, source)
    mean = torch.tensor(source.spec.mean, device=run.device).view(1, -1, 1, 1)
    x, y = source.choose(config.images, run.seed)
    if not source.steps:
        try:
            guided_backprop(model, x[:1].to(run.device), config.target)
        except ValueError as error:
            raise UserError(f"--source {config.source}: {error}") from error
    for step in run.steps(source.steps):  # a fresh network learns first
        run.log(loss=source.learn(step))
    rules = {"": guided_backprop, "plain_": saliency}
    total: Counter[str] = Counter()
    for number, image, true in rounds(run, x, y, config.batch):
        before = probabilities(model, image)
        aim = chosen(before, config.target)
        total["test_accuracy"] += int((before.argmax(1) == true).sum())
        maps = {rule: of(model, image, aim) for rule, of in rules.items()}  # lines 1-2
        for name in ("last", "all"):  # line 3
            blind = shuffled(model, run.generator(f"shuffle {name}", number), last_only=name == "last")
            for rule, of in rules.items():
                alike = rank_correlation(heat(maps[rule]), heat(of(blind, image, aim)))
                total[f"{rule}sanity_{name}"] += float(alike.sum())
        draw = run.generator("subsets", number)
        worth = faithfulness(model, image, aim, maps, config.erased, config.subsets, mean, draw)  # line 4
        for rule, values in worth.items():
            total[f"{rule}faithfulness"] += float(values.sum())
    if config.shown:
        image, true = x[: config.shown].to(run.device), y[: config.shown].to(run.device)
        figure = _picture(model, image, config.target, names, config.erased, mean, true)
        caption = (
            f"{source.label}: image, guided map, plain gradient (red raises the logit, blue lowers it), the image with "
            f"the {config.erased:.0%} largest pixels of the guided map erased, and what is seen before and after."
        )
        run.artifact("maps", figure, caption)
        aim = chosen(probabilities(model, image), config.target)
        columns, said = {"image": image, "trained": one_plane(guided_backprop(model, image, aim))}, [[] for _ in image]
        for name in ("last", "all"):
            blind = shuffled(model, run.generator(f"picture {name}"), last_only=name == "last")
            columns[f"{name} shuffled"] = one_plane(guided_backprop(blind, image, aim))
            alike = rank_correlation(heat(columns["trained"][:, None]), heat(columns[f"{name} shuffled"][:, None]))
            for lines, value in zip(said, alike.tolist()):
                lines.append(f"{name}: ρ = {value:.2f}")
        caption = (
            "The check: guided maps of the network, of one with its last layer shuffled, and with all weights shuffled."
        )
        run.artifact("sanity", panel(columns, said), caption)
    found = {name: value / len(y) for name, value in total.items()}
    gaps = {"sanity_gap": "sanity_last", "sanity_all_gap": "sanity_all"}
    return found | {gap: found[name] - found[f"plain_{name}"] for gap, name in gaps.items()}
