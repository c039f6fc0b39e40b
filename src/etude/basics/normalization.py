"""Twenty sigmoid layers learn with batch normalisation and do not without

Paper: Ioffe & Szegedy, Batch Normalization, 2015, arXiv:1502.03167; Glorot & Bengio, Understanding the Difficulty of
Training Deep Feedforward Neural Networks, 2010 (why deep sigmoid networks do not train).

Equation: with    aˡ = σ(BN(Wˡ aˡ⁻¹)),  BN(z) = γ (z − μ_B)/√(σ²_B + ε) + β   per unit, over the batch
          without aˡ = σ(Wˡ aˡ⁻¹ + b)
σ' ≤ ¼, so without it each layer passes at most ¼‖W‖ of the gradient, and of the differences between two inputs: after
twenty layers all images look the same. BN gives every unit spread 1 over the batch, whatever its depth.

Algorithm:
1. two networks of equal depth and width, Glorot's draw; with BN the layers have no bias of their own (β is one)
2. every step, for both: the same mini-batch, cross-entropy, one step of Adam with a rate that falls to 0
3. validate, and test after the last step, in evaluation mode: running mean and variance in place of the batch's
4. before and after: spread of each unit over 500 validation images, and the rms of ∂L/∂a, layer by layer

Differences:
- E15: the notes give no ε, no axes and no rule for the statistics at test. Here ε = 1e-5 inside the root, one mean and
  variance per unit over the batch, biased to normalise and unbiased in the running estimate that evaluation uses.
- BN stands before σ, as in the paper (its section 3.2).

Expect: one core, 8 s → digits: 0.965 with, 0.10 without; MNIST (10,000 images), 10 s: 0.93 with, 0.11 without.
Command: `etude run basics/normalization`, or on MNIST `etude run basics/normalization --preset mnist`
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import data as room
from etude.blocks.classifying.scores import evaluate
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Positive, Range, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.optim import Adam, set_lr
from etude.optim.schedules import linear


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Images (digits, mnist, … or a folder of class-named image folders)."""
    examples: Whole = 10_000
    """The first so many training images are used (0: all)."""
    layers: Few = 20
    """Hidden layers."""
    width: Count = 128
    """Sigmoid units in each."""
    steps: Count = 300
    """Updates of both networks."""
    batch: Annotated[int, Range(2)] = 128
    """Images in a mini-batch; batch normalisation needs at least two."""
    learning_rate: Positive = 3e-3
    """Adam's α at the start, for both; it falls to 0 in a straight line."""
    evaluate_every: Whole = 25
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(layers=8, width=24, steps=20, batch=64, evaluate_every=10),  # 1 s
    "default": Config(),  # 8 s → 0.965 with, 0.10 without
    "mnist": Config(data="mnist", steps=400, evaluate_every=100),  # 10 s → 0.93 with, 0.11 without
}

METRICS = {
    "test_accuracy_*": "accuracy on the test split with and without batch normalisation",
    "spread_*": "standard deviation of the last hidden layer over inputs, before training; 0: it answers all inputs alike",
    "slope_*": "rms of the loss's gradient at the first hidden layer over that at the last, before training; near 0: it vanishes",
}

EXPERIMENTS = (
    Experiment(
        "digits_with", preset="default", metric="test_accuracy_with", bar=0.954,
        controls=(Control("the network without", metric="test_accuracy_without"),),
    ),
    Experiment(
        "digits_without", preset="default", metric="test_accuracy_without", bar=0.12, better="lower",
        notes="always one digit: 0.10",
        controls=(Control("two layers", {"layers": 2}),),
    ),
    Experiment(
        "mnist_with", preset="mnist", metric="test_accuracy_with", bar=0.918,
        controls=(Control("the network without", metric="test_accuracy_without"),),
    ),
    Experiment(
        "mnist_without", preset="mnist", metric="test_accuracy_without", bar=0.12, better="lower",
        notes="always the commonest digit: 0.1135",
        controls=(Control("two layers", {"layers": 2}),),
    ),
)  # fmt: skip

SETTINGS = {"data": "mnist", "examples": 100}

NAMES = ("with", "without")
INKS = {"with": PALETTE[0], "without": PALETTE[1]}
BINS = 50


class Sigmoids(nn.Module):
    """Images (N, …) uint8 → logits (N, classes), through `layers` layers of `width` sigmoids, normalised or not."""

    def __init__(self, spec: Spec, layers: int, width: int, normalised: bool) -> None:
        super().__init__()
        self.standardise = Standardise(spec.mean, spec.std)
        widths = (prod(spec.shape), *[width] * layers)
        linear = [nn.Linear(before, after, bias=not normalised) for before, after in pairwise(widths)]
        self.hidden = nn.ModuleList(
            nn.Sequential(layer, BatchNorm(width) if normalised else nn.Identity(), nn.Sigmoid()) for layer in linear
        )
        self.output = nn.Linear(width, len(spec.classes))

    def activations(self, x: Tensor) -> list[Tensor]:
        """a¹ … aᴸ, each (N, width)."""
        found, a = [], self.standardise(x).flatten(1)
        for layer in self.hidden:
            a = layer(a)
            found.append(a)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activations(x)[-1])


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network with batch normalisation and the one without."""
    return {name: initialise(Sigmoids(spec, config.layers, config.width, name == "with"), "glorot") for name in NAMES}


def probe(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Line 4, on one batch in training mode: by layer, the mean over units of the spread of a over the images, the rms of
    ∂L/∂a, and the histogram (BINS,) of a over [0, 1]. Running statistics and gradients of the model are left alone."""
    training, kept = model.training, {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    layers: list[Tensor] = model.activations(x)  # type: ignore[operator]
    slopes = torch.autograd.grad(F.cross_entropy(model.output(layers[-1]), y), layers)  # type: ignore[operator]
    model.load_state_dict(kept)
    model.train(training)
    return {
        "spread": np.array([a.detach().std(0).mean().item() for a in layers]),
        "slope": np.array([slope.square().mean().sqrt().item() * len(x) for slope in slopes]),
        "histogram": np.stack([torch.histc(a.detach().cpu(), BINS, 0.0, 1.0).numpy() for a in layers]),
    }


@method("basics/normalization", paper="arXiv:1502.03167", section="4.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = room.images(config.data)
    if len(data.validation) < 2:
        raise UserError(f"--data {config.data} has 1 image for validation; the spread over images needs two or more")
    run.describe(data.spec, data)
    models = {name: run.place(model) for name, model in build(config, data.spec).items()}  # line 1
    optimizers = {name: Adam(model.parameters(), lr=config.learning_rate) for name, model in models.items()}
    x, y = (part[: config.examples or None] for part in (data.train.x, data.train.y))
    sample = tuple(part[:500].to(run.device) for part in (data.validation.x, data.validation.y))
    seen = Box(curve=[], before={name: probe(model, *sample) for name, model in models.items()})
    run.track(**models, **{f"optimizer_{name}": optimizer for name, optimizer in optimizers.items()}, seen=seen)
    stream = Stream(len(y), config.batch, run.seed, run.rank, run.world)
    for step in run.steps(config.steps):  # line 2
        rows = stream.indices(step)
        images, truth = x[rows].to(run.device), y[rows].to(run.device)
        losses = {}
        for name, model in models.items():
            optimizers[name].zero_grad()
            with run.autocast():
                losses[f"loss_{name}"] = loss = F.cross_entropy(model(images), truth)
            loss.backward()
        run.average(*models.values(), **losses)
        for optimizer in optimizers.values():
            set_lr(optimizer, linear(step, config.learning_rate, config.steps))
            optimizer.step()
        run.log(**losses)
        if run.every(config.evaluate_every):  # line 3
            right = scores(run, models, data, "validation")
            seen.curve = [*seen.curve, [step + 1, *right.values()]]
            run.log(**{f"validation_accuracy_{name}": value for name, value in right.items()})
    after = {name: probe(model, *sample) for name, model in models.items()}
    run.artifact(
        "learning",
        learning_figure(seen, after),
        "What batch normalisation does to deep sigmoid networks. A spread below 1e-7 is float32's rounding.",
    )
    run.artifact("activations", histogram_figure(seen.before), "Activations in five layers, before training.")
    first = seen.before
    return {
        **{f"test_accuracy_{name}": value for name, value in scores(run, models, data, "test").items()},
        **{f"spread_{name}": float(first[name]["spread"][-1]) for name in NAMES},
        **{f"slope_{name}": float(first[name]["slope"][0] / first[name]["slope"][-1]) for name in NAMES},
    }


def scores(
    run: Run, models: dict[str, nn.Module], data: room.Images, split: Literal["validation", "test"]
) -> dict[str, float]:
    """The accuracy of each network on a split, in evaluation mode."""
    return {name: evaluate(run, model, data, split)[f"{split}_accuracy"] for name, model in models.items()}


# ----------------------------------------------------------------------------------------------------------- pictures


def learning_figure(seen: Box, after: dict[str, dict[str, np.ndarray]]) -> Any:
    """Validation accuracy by step; spread of the activations and rms of the gradient by layer, before and after training."""
    figure, (left, middle, right) = panels(3, width=10, height=3.5)
    steps, *scores = np.array(seen.curve).T
    for name, score in zip(NAMES, scores):
        left.plot(steps, 100 * score, color=INKS[name], linewidth=1.8, label=f"{name} batch norm")
        layers = np.arange(1, len(after[name]["spread"]) + 1)
        for axes, what in ((middle, "spread"), (right, "slope")):
            first, last = (np.maximum(values[name][what], 1e-30) for values in (seen.before, after))
            axes.semilogy(layers, first, color=INKS[name], linewidth=1.8, label=f"{name}, before")
            axes.semilogy(layers, last, color=INKS[name], linewidth=1.2, linestyle="--", label=f"{name}, after")
            axes.set_xticks([1, *range(5, len(layers) + 1, 5)])
    left.set_ylim(0, 100)
    left.set_xlim(0, None)
    label(left, "validation accuracy", "step", "%")
    label(middle, "spread of a over the images", "layer", "standard deviation")
    label(right, "gradient of each image's loss", "layer", "rms of ∂L/∂a")
    legend(left, loc="center right")
    legend(right, loc="best", fontsize=7.5)
    return figure


def histogram_figure(before: dict[str, dict[str, np.ndarray]]) -> Any:
    """Histograms of the activations, a row for each network and a column for each of five layers."""
    depth = len(before["with"]["histogram"])
    layers = sorted({round(t) for t in np.linspace(1, depth, 5)})
    figure, (axes,) = panels(width=10, height=3.4)
    for row, name in enumerate(NAMES):
        for column, layer in enumerate(layers):
            counts = before[name]["histogram"][layer - 1]
            edges = column + np.linspace(0.04, 0.96, BINS + 1)
            axes.stairs(0.68 * counts / counts.max() - row, edges, baseline=-row, fill=True, color=INKS[name])
            axes.plot(edges[[0, -1]], [-row, -row], color=SOFT, linewidth=0.6)
            spread = f"spread over images {before[name]['spread'][layer - 1]:.1g}"
            axes.text(column + 0.96, 0.74 - row, spread, ha="right", fontsize=7.5, color=SOFT)
    axes.set_xticks(np.arange(len(layers)) + 0.5, [f"layer {layer}" for layer in layers])
    axes.set_yticks(0.3 - np.arange(len(NAMES)), [f"{name} batch norm" for name in NAMES])
    axes.set_ylim(0.98 - len(NAMES), 0.95)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    label(axes, "activations a, from 0 to 1")
    return figure
