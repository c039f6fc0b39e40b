"""An exploding recurrent network dies unclipped; clipped, it learns

Paper: Pascanu, Mikolov & Bengio, On the Difficulty of Training Recurrent Neural Networks, 2012, arXiv:1211.5063; the
adding problem: Hochreiter & Schmidhuber, Long Short-Term Memory, 1997, experiment 4.

Equation: h_t = tanh(W h_{t−1} + U x_t + b), answer v·h_T + c. ∂h_T/∂h_t is a product of T − t factors diag(1 − h²) W: with
singular values of W above 1 it can grow like their power, and so can the gradient. The step is then θ ← θ − α ḡ with
    nothing      ḡ = g
    by value     ḡ_i = max(min(g_i, c), −c)
    by norm      ḡ = g min(1, c / ‖g‖), one norm over all parameters

Algorithm:
1. three equal networks, W orthogonal times `gain` > 1
2. every step, for all three: the same batch of the adding problem: T numbers in [0, 1] and two marks, one in either half;
   the target is the sum of the two marked numbers, the loss the squared error
3. g by back-propagation through time; clip it in its own way; θ ← θ − α ḡ, with α falling to 0 in a straight line
4. where the unclipped network's loss or gradient is no longer finite, note the step and leave it as it then was

Differences:
- E21: the notes print the norm clip for each g_i. It is one norm over all parameters, or the direction would change;
  ‖g‖ = 0 is safe. c is found by looking at the norms of a few epochs, not of "a new epoch".
- The unclipped network is not guarded against NaN, its end is the result. The two clipped ones are: a NaN there stops
  the run.
- Always answering 1 costs 1/6 = 0.167, the variance of the sum: a loss below that has been learned.
- Where an unclipped network ends is chaotic; *that* it ends is not, at this learning rate: the first explosion saturates
  h, and then the output layer alone multiplies its error by |1 − 2α(‖h‖² + 1)|, up to 19, in every step.

Expect: one core, 4 s → unclipped ends after some 18 steps (16 to 30 of 200 seeds); by norm and by value 0.02-0.03.
Command: `etude run basics/clipping`, or `etude run basics/clipping --gain 1.0 --learning-rate 0.03`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.nn.init import orthogonal
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Positive
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import SGD, set_lr
from etude.optim.clipping import clip_by_norm, clip_by_value, global_norm
from etude.optim.schedules import linear


@dataclass(frozen=True)
class Config:
    length: Count = 20
    """Numbers in a sequence (T)."""
    width: Count = 32
    """Hidden units."""
    gain: Positive = 1.2
    """All singular values of W at the start."""
    steps: Count = 1500
    """Updates of each network."""
    batch: Count = 32
    """Sequences in a batch."""
    learning_rate: Positive = 0.3
    """α of plain gradient descent at the start, for all three; it falls to 0 in a straight line."""
    clip_norm: Positive = 1.0
    """c of clipping by norm."""
    clip_value: Positive = 0.05
    """c of clipping by value."""
    test_examples: Count = 2000
    """Sequences that the networks are tested on."""


PRESETS = {
    "tiny": Config(width=16, gain=1.5, steps=60, batch=8, test_examples=100),  # 1 s
    "default": Config(),  # 4 s → not finite after some 18 steps without clipping; loss 0.03 with
}

METRICS = {
    "diverged": "1 if the unclipped network ended in numbers that are not finite, else 0",
    "unclipped_steps": "steps that the unclipped network survived",
    "test_loss_*": "mean squared error on fresh sequences; always answering 1 has 1/6",
    "largest_gradient_*": "largest Euclidean norm that a gradient had before it was clipped",
}

EXPERIMENTS = (
    Experiment(
        "unclipped_diverges", preset="default", metric="diverged", bar=1.0,
        controls=(
            Control("clipped like the third", {"steps": 300}, swap={"clipped": "etude.basics.parts.training_nulls.clip_all"}),
        ),
    ),
    Experiment(
        "norm_learns", preset="default", metric="test_loss_norm", bar=0.030, better="lower",
        notes="always answering 1 costs 1/6",
        controls=(Control("no clipping by norm", flags={"clip_norm": 1e30}),),
    ),
    Experiment(
        "value_learns", preset="default", metric="test_loss_value", bar=0.036, better="lower",
        notes="always answering 1 costs 1/6",
        controls=(Control("no clipping by value", flags={"clip_value": 1e30}),),
    ),
)  # fmt: skip

NAMES = ("unclipped", "value", "norm")
LABELS = ("unclipped", "clipped by value", "clipped by norm")


class Cells(nn.Module):
    """`runs` equal tanh networks side by side, (N, T, 2) → (runs, N, 1); every parameter's first axis is the run."""

    def __init__(self, runs: int, width: int, gain: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.recurrent = nn.Parameter(orthogonal(torch.empty(width, width), gain).repeat(runs, 1, 1))
        self.input = nn.Parameter(torch.empty(2, width).uniform_(-bound, bound).repeat(runs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(runs, 1, width))
        self.output = nn.Parameter(torch.empty(width, 1).uniform_(-bound, bound).repeat(runs, 1, 1))
        self.shift = nn.Parameter(torch.zeros(runs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        drive = torch.einsum("ntf,rfh->trnh", x, self.input) + self.bias
        h = torch.zeros_like(drive[0])
        for now in drive:
            h = torch.tanh(torch.baddbmm(now, h, self.recurrent))
        return torch.baddbmm(self.shift, h, self.output)


def adding(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem: x (N, T, 2) of numbers in [0, 1] and marks, one in each half, and the marked sum (N, 1)."""
    numbers, marks = torch.rand(count, length, generator=generator), torch.zeros(count, length)
    half = max(1, length // 2)
    for low, high in ((0, half), (half % length, length)):
        marks.scatter_(1, torch.randint(low, high, (count, 1), generator=generator), 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(1, keepdim=True)


def clipped(gradients: list[Tensor], name: str, config: Config) -> list[Tensor]:
    """ḡ of one network, by its name."""
    if name == "value":
        return clip_by_value(gradients, config.clip_value)
    return clip_by_norm(gradients, config.clip_norm) if name == "norm" else gradients


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The three networks, with equal weights."""
    return {"cells": Cells(len(NAMES), config.width, config.gain)}


@method("basics/clipping", paper="arXiv:1211.5063", section="4.5", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    cells = run.place(build(config, Spec())["cells"])  # line 1
    run.describe(Spec())
    optimizer = SGD(cells.parameters(), lr=config.learning_rate)
    seen = Box(loss=np.full((3, config.steps), np.nan), norm=np.full((3, config.steps), np.nan), diverged=-1)
    run.track(cells=cells, optimizer=optimizer, seen=seen)
    parameters = list(cells.parameters())
    for step in run.steps(config.steps):
        x, y = adding(config.batch, config.length, run.generator("batch", step))  # line 2
        losses = (cells(x.to(run.device)) - y.to(run.device)).square().mean((1, 2))
        optimizer.zero_grad()
        losses.sum().backward()  # line 3; each network's gradient is its own slice
        slices = [[parameter.grad[i] for parameter in parameters] for i in range(3)]
        norms = torch.stack([global_norm(gradients) for gradients in slices])
        seen.loss[:, step], seen.norm[:, step] = losses.detach().cpu(), norms.cpu()
        if seen.diverged < 0 and not math.isfinite(seen.loss[0, step] + seen.norm[0, step]):
            seen.diverged = step  # line 4
            run.say(f"the unclipped network diverged at step {step}; it is left there, the clipped ones go on")
        if seen.diverged >= 0:
            for gradient in slices[0]:
                gradient.zero_()
            seen.loss[0, step] = seen.norm[0, step] = np.nan
        run.average(cells, loss_value=losses[1], loss_norm=losses[2])
        for name, gradients in zip(NAMES, slices):
            for gradient, short in zip(gradients, clipped(gradients, name, config)):
                gradient.copy_(short)
        set_lr(optimizer, linear(step, config.learning_rate, config.steps))
        optimizer.step()
        alive = [i for i in range(3) if i or seen.diverged < 0]
        run.log(**{f"loss_{NAMES[i]}": seen.loss[i, step] for i in alive})
        run.log(**{f"gradient_{NAMES[i]}": seen.norm[i, step] for i in alive})
    run.artifact("clipping", figure(seen, config), "Loss and gradient norm of the three networks on the same batches.")
    return scores(cells, seen, config, run)


@torch.no_grad()
def scores(cells: nn.Module, seen: Box, config: Config, run: Run) -> dict[str, float]:
    """Losses on fresh sequences, the largest gradients, and when the unclipped network ended (`steps` if it did not)."""
    x, y = adding(config.test_examples, config.length, run.generator("test", -1))
    losses = (cells(x.to(run.device)) - y.to(run.device)).square().mean((1, 2)).tolist()
    found = {f"test_loss_{name}": losses[i] for i, name in enumerate(NAMES) if i}
    found |= {f"largest_gradient_{name}": float(np.nanmax(seen.norm[i])) for i, name in enumerate(NAMES) if i}
    over = seen.diverged >= 0 or not math.isfinite(losses[0])  # the last update may have been the one too many
    if not over:
        found["test_loss_unclipped"] = losses[0]
    return found | {
        "diverged": float(over),
        "unclipped_steps": float(config.steps if seen.diverged < 0 else seen.diverged),
    }


def figure(seen: Box, config: Config) -> Any:
    """Loss and gradient norm against step, both axes logarithmic, the end of the unclipped network marked."""
    picture, both = panels(2, width=9.6, height=3.9)
    steps = np.arange(1, config.steps + 1)
    for axes, values in zip(both, (seen.loss, seen.norm)):
        top = 100.0 * float(np.nanmax(values[1:]))
        for i, ink in ((1, PALETTE[0]), (2, PALETTE[2]), (0, PALETTE[1])):
            raw = values[i]
            axes.loglog(steps, raw, color=ink, linewidth=0.5, alpha=0.3 if i else 0.0)
            axes.loglog(steps, _smooth(raw) if i else raw, color=ink, linewidth=1.7, label=LABELS[i])
        axes.set_ylim(max(float(np.nanmin(values[1:])) / 2, 1e-30), top)
        if seen.diverged >= 0:
            axes.axvline(seen.diverged + 1, color=PALETTE[1], linewidth=1, linestyle=":")
            axes.annotate(
                f"unclipped: not finite\nat step {seen.diverged}", (seen.diverged + 1, top), (5, -4),
                textcoords="offset points", va="top", fontsize=8, color=PALETTE[1],
            )  # fmt: skip
    both[0].axhline(1 / 6, color=SOFT, linewidth=0.8, linestyle="--")
    both[0].annotate("answering 1", (1, 1 / 6), (2, -9), textcoords="offset points", fontsize=7.5, color=SOFT)
    both[1].axhline(config.clip_norm, color=SOFT, linewidth=0.8, linestyle="--")
    both[1].annotate("clip norm", (1, config.clip_norm), (2, 3), textcoords="offset points", fontsize=7.5, color=SOFT)
    label(both[0], f"adding problem, T = {config.length}: loss", "step", "squared error")
    label(both[1], "gradient before clipping", "step", "‖g‖")
    legend(both[0], loc="center right")
    return picture


def _smooth(values: np.ndarray) -> np.ndarray:
    """Geometric moving mean whose window grows with the step: a twelfth of it to either side, as far as there are any."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(values, 1e-30)))])
    place = np.arange(len(values))
    first, last = place - place // 12, np.minimum(place + place // 12 + 1, len(values))
    return np.exp((logs[last] - logs[first]) / (last - first))
