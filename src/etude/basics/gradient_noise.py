"""How noisy a mini-batch gradient is, and how far off the minimum that keeps θ

Paper: Robbins & Monro, A Stochastic Approximation Method, 1951; Bottou, Stochastic Gradient Descent Tricks, 2012;
Cochran, Sampling Techniques, 1977, chapter 2 (the finite-population factor).

Equation: g_B = (1/B) Σ_{i∈B} ∇ℓ_i for B of N examples; S² = (1/N) Σ_i ‖∇ℓ_i − ∇L‖². E[g_B] = ∇L in every case, and
    drawn with replacement       E‖g_B − ∇L‖² = S² / B
    drawn without (an epoch)     E‖g_B − ∇L‖² = S² / B · (N − B)/(N − 1), which is 0 at B = N
    θ ← θ − α(λθ + ξ), E[ξ²] = σ²     stationary variance  α σ² / (λ (2 − αλ)), proportional to α for small α

Algorithm:
1. softmax regression on images, briefly trained; the gradient ∇ℓ_i of every example by vmap(grad)
2. per step, `draws` batches of one size B with and without replacement: the mean of ‖g_B − ∇L‖² over S²
3. `walkers` iterates of θ ← θ − α(θ + ξ) on θ²/2, ξ ~ N(0, 1): their variance once it no longer changes, for four α
4. linear regression in the plane by batch, mini-batch and single-example descent: where the iterates go, and stay

Differences:
- E12: the notes' mini-batch line averages −log p itself; what is averaged is its gradient (line 2).
- E13: the notes shuffle once "in advance". Every epoch needs a shuffle of its own; within one, drawing is without
  replacement, so the noise carries the factor (N − B)/(N − 1) and vanishes for the whole set.

Expect: one core, 10 s → every measured variance within 4 % of its closed form.
Command: `etude run basics/gradient_noise`, or on MNIST `etude run basics/gradient_noise --preset mnist`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import data as room
from etude.blocks.nn.norm import Standardise
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Positive, Range
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim.sgd import minibatch

FEWEST = 16


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Images (digits, mnist, … or a folder of class-named image folders)."""
    examples: Annotated[int, Range(FEWEST)] = 1024
    """N: the first so many training images are the whole population."""
    draws: Count = 5000
    """Batches drawn of each size, with and without replacement."""
    warmup_steps: Annotated[int, Range(0, 100_000)] = 20
    """Full-batch steps before the gradients are taken."""
    walkers: Annotated[int, Range(2)] = 20000
    """Iterates in the experiment on the stationary variance."""
    learning_rates: tuple[Annotated[float, Range(1e-4, 1.999)], ...] = (0.025, 0.05, 0.1, 0.2)
    """Step sizes α of that experiment: a walk takes 8/α steps to come to rest, and at α = 2 it never does."""
    steps: Count = 300
    """Steps of batch, mini-batch and single-example descent in the plane."""
    learning_rate: Positive = 0.15
    """Their step size."""


PRESETS = {
    "tiny": Config(examples=64, draws=2000, walkers=2000, learning_rates=(0.1, 0.2), steps=60),  # 1 s
    "default": Config(),  # 10 s → within 4 % of 1/B, and of 1/B · (N − B)/(N − 1)
    "mnist": Config(data="mnist", examples=2048, draws=2000),
}

METRICS = {
    "error_with": "largest relative deviation of the gradient's variance from its closed form, drawn with replacement",
    "error_without": "the same drawn without replacement, whose variance is smaller",
    "whole_set_variance": "variance of the gradient of the whole set, as a share of one example's; 0",
    "error_stationary": "largest relative deviation of the iterates' variance from its limit",
}

EXPERIMENTS = (
    Experiment(
        "with_replacement", preset="default", metric="error_with", bar=0.026, better="lower",
        controls=(Control("drawn without", swap={"draw": "etude.basics.parts.training_nulls.always_without"}),),
    ),
    Experiment(
        "without_replacement", preset="default", metric="error_without", bar=0.038, better="lower",
        controls=(Control("drawn with", swap={"draw": "etude.basics.parts.training_nulls.always_with"}),),
    ),
    Experiment(
        "whole_set", preset="default", metric="whole_set_variance", bar=1e-10, better="lower",
        controls=(Control("drawn with", swap={"draw": "etude.basics.parts.training_nulls.always_with"}),),
    ),
    Experiment(
        "stationary_variance", preset="default", metric="error_stationary", bar=0.02, better="lower",
        controls=(Control("held against α/2", swap={"limit": "etude.basics.parts.training_nulls.half_the_rate"}),),
    ),
)  # fmt: skip

SETTINGS = {"data": "mnist"}


def loss(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """−log p(y | x) of softmax regression for one example: x (D,), y () int64; weights (K, D) and (K,)."""
    return F.cross_entropy(weights[0] @ x + weights[1], y)


def per_example(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """∇ℓ_i of every example, (N, K·D + K): `loss` differentiated once for each, all at once."""
    parts = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def gram(gradients: Tensor) -> Tensor:
    """(N, N) inner products of the deviations ∇ℓ_i − ∇L: all that variances of means need."""
    off = gradients - gradients.mean(0)
    return off @ off.T


def deviation(inner: Tensor, batches: Tensor) -> Tensor:
    """‖g_B − ∇L‖² of each row of `batches` (M, B) int64 (an example may be repeated), from the `gram` matrix: (M,)."""
    count = torch.zeros(len(batches), len(inner), dtype=inner.dtype)
    count.scatter_add_(1, batches, torch.ones_like(batches, dtype=inner.dtype))
    share = count / batches.shape[1]
    return ((share @ inner) * share).sum(1)


def closed_form(size: int, total: int, replacement: bool) -> float:
    """E‖g_B − ∇L‖² / S²: 1/B, times (N − B)/(N − 1) without replacement."""
    return 1 / size if replacement else (total - size) / (size * (total - 1))


def draw(total: int, size: int, count: int, replacement: bool, generator: torch.Generator) -> Tensor:
    """`count` batches of `size` of `total` examples: (count, size) int64."""
    if replacement:
        return torch.randint(total, (count, size), generator=generator)
    return torch.stack([torch.randperm(total, generator=generator)[:size] for _ in range(count)])


def limit(learning_rate: float) -> float:
    """The stationary variance α/(2 − α) of θ ← θ − α(θ + ξ)."""
    return learning_rate / (2 - learning_rate)


def error(measured: Any, exact: Any) -> float:
    """The largest relative deviation of what was measured from its closed form."""
    return float(np.abs(measured / exact - 1).max())


def stationary(learning_rate: float, walkers: int, generator: torch.Generator) -> float:
    """Variance of θ ← θ − α(θ + ξ) over `walkers` iterates from 0, when less than e⁻¹⁶ of it is still to come."""
    theta = torch.zeros(walkers, dtype=torch.float64)
    for _ in range(math.ceil(8 / min(learning_rate, 2 - learning_rate))):
        theta -= learning_rate * (theta + torch.randn(walkers, generator=generator, dtype=torch.float64))
    return theta.var().item()


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network is kept: the weights stand still while their gradients are measured."""
    return {}


def population(config: Config) -> Tensor:
    """Line 1: the Gram matrix (N, N), float64, of the examples' gradients."""
    train = room.images(config.data).train
    y = train.y[: config.examples]
    if len(y) < FEWEST:
        raise UserError(f"--data {config.data} has {len(y)} training images; batches are drawn from {FEWEST} or more")
    x = Standardise.fit(train.x[: config.examples].flatten(1))(train.x[: config.examples].flatten(1))
    weights = (torch.zeros(int(y.max()) + 1, x.shape[1]), torch.zeros(int(y.max()) + 1))
    for _ in range(config.warmup_steps):
        slopes = torch.func.grad(lambda pair: F.cross_entropy(x @ pair[0].T + pair[1], y))(weights)
        weights = tuple(weight - 0.2 * slope for weight, slope in zip(weights, slopes))
    return gram(per_example(weights, x, y).double())


@method("basics/gradient_noise", paper="Robbins & Monro 1951; Bottou 2012", section="3.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    rates = config.learning_rates
    if not rates:
        raise UserError("--learning-rates names none; give at least one step size")
    inner = population(config)
    total = len(inner)
    sizes = sorted({2**k for k in range(total.bit_length() - 1)} | {3 * total // 4, total})
    spread = inner.diagonal().mean()  # S²
    forms = np.array([[closed_form(size, total, way) for way in (True, False)] for size in sizes])
    limits = np.array([limit(rate) for rate in rates])
    seen = Box(ratio=np.zeros((len(sizes), 2)), variance=np.zeros(len(rates)))
    run.track(seen=seen)
    for step in run.steps(len(sizes) + len(rates)):
        if step < len(sizes):  # line 2
            found, stream = [], run.generator("batches", step)
            for part in torch.arange(config.draws).split(500):
                batches = [draw(total, sizes[step], len(part), way, stream) for way in (True, False)]
                found.append(torch.stack([deviation(inner, drawn) for drawn in batches], dim=1))
            seen.ratio[step] = torch.cat(found).mean(0) / spread
            run.log(error_with=error(seen.ratio[step, 0], forms[step, 0]))
            if sizes[step] < total:
                run.log(error_without=error(seen.ratio[step, 1], forms[step, 1]))
        else:  # line 3
            which = step - len(sizes)
            seen.variance[which] = stationary(rates[which], config.walkers, run.generator("walk", step))
            run.log(error_stationary=error(seen.variance[which], limits[which]))
    run.artifact("variance", variance_figure(sizes, seen, forms, config), "Noise against batch size and step size.")
    run.artifact(
        "clouds", clouds_figure(config, run), "Where batch, mini-batch and single-example descent go and stay."
    )
    return {
        "error_with": error(seen.ratio[:, 0], forms[:, 0]),
        "error_without": error(seen.ratio[:-1, 1], forms[:-1, 1]),
        "whole_set_variance": float(abs(seen.ratio[-1, 1])),
        "error_stationary": error(seen.variance, limits),
    }


# ----------------------------------------------------------------------------------------------------------- pictures


def plane(run: Run, count: int = 64) -> tuple[Tensor, Tensor]:
    """Noisy linear data with two features: x (64, 2), y (64,)."""
    draw = run.generator("plane", -1)
    x = torch.randn(count, 2, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 0.5], dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.randn(
        count, generator=draw, dtype=torch.float64
    )


def descend(x: Tensor, y: Tensor, size: int, config: Config, seed: int) -> Tensor:
    """Line 4: iterates (steps + 1, 2) on ½(xᵀθ − y)² with reshuffled mini-batches of `size`."""
    theta, path = torch.tensor([-1.5, 1.5], dtype=torch.float64), []
    path.append(theta)
    for step in range(config.steps):
        rows = minibatch(len(y), size, step, seed)
        theta = theta - config.learning_rate * ((x[rows] @ theta - y[rows])[:, None] * x[rows]).mean(0)
        path.append(theta)
    return torch.stack(path)


def variance_figure(sizes: list[int], seen: Box, forms: np.ndarray, config: Config) -> Any:
    """Variance against batch size, and stationary variance against α, each with its closed form."""
    figure, (left, right) = panels(2, width=9.6, height=3.9)
    total = sizes[-1]
    dense = np.unique(np.geomspace(1, total, 200).round(4))
    without = np.maximum((total - dense) / (dense * (total - 1)), 1e-30)
    for i, (ink, name, curve) in enumerate(
        ((PALETTE[1], "with replacement", 1 / dense), (PALETTE[0], "without (an epoch)", without))
    ):
        shown = forms[:, i] > 0
        left.loglog(dense, curve, color=ink, linewidth=1.2)
        left.loglog(np.array(sizes)[shown], seen.ratio[shown, i], "o", color=ink, markersize=5, label=f"drawn {name}")
    left.set_ylim(0.2 / total, 1.6)
    for text, place, ink in (
        ("1/B", (3, 0.42), PALETTE[1]),
        ("1/B · (N − B)/(N − 1)\n0 at B = N", (max(1.1, total / 45), 0.5 / total), PALETTE[0]),
    ):
        left.text(*place, text, color=ink, fontsize=8.5)
    label(left, f"gradient noise, N = {total}", "batch size B", "E‖g_B − ∇L‖² / S²")
    legend(left, loc="upper right")
    rates = np.geomspace(min(config.learning_rates) / 1.3, min(max(config.learning_rates) * 1.3, 1.9995), 50)
    right.loglog(rates, rates / (2 - rates), color=PALETTE[2], linewidth=1.2, label="α / (2 − α)")
    right.loglog(config.learning_rates, seen.variance, "o", color=PALETTE[2], markersize=6, label="measured")
    right.loglog(rates, rates / 2, ":", color=SOFT, linewidth=1.2, label="α / 2")
    right.set_xticks(config.learning_rates, [f"{rate:g}" for rate in config.learning_rates])
    right.minorticks_off()
    label(right, "θ ← θ − α(θ + ξ): stationary variance", "step size α", "variance of θ")
    legend(right, loc="upper left")
    return figure


def clouds_figure(config: Config, run: Run) -> Any:
    """Three kinds of descent on one least-squares problem, with level lines; the cloud is the second half of a path."""
    x, y = plane(run)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    figure, row = panels(3, width=10, height=3.9, sharey=True)
    spots = torch.stack(torch.meshgrid(torch.linspace(-2, 2.6, 120), torch.linspace(-2.2, 2.2, 120), indexing="xy"), -1)
    height = ((spots.double() @ x.T - y) ** 2).mean(-1) / 2
    lowest = float(((x @ best - y) ** 2).mean() / 2)
    for axes, size, ink, name in zip(
        row, (len(y), 8, 1), PALETTE, (f"batch (B = N = {len(y)})", "mini-batch (B = 8)", "single example (B = 1)")
    ):
        axes.contour(*spots.numpy().T.swapaxes(1, 2), height.numpy(), levels=lowest + np.geomspace(0.01, 3, 9),
                     colors="#cfc9bc", linewidths=0.7)  # fmt: skip
        path = descend(x, y, size, config, run.seed).numpy()
        half = len(path) // 2
        axes.plot(*path[: half + 1].T, color=ink, linewidth=0.9)
        axes.plot(*path[half:].T, "o", color=ink, markersize=2.5, alpha=0.5)
        axes.plot(*path[0], "o", color=INK, markersize=5)
        axes.plot(*best, "+", color=INK, markersize=11, markeredgewidth=1.5)
        axes.set(xlim=(-2, 2.6), ylim=(-2.2, 2.2), aspect="equal")
        axes.grid(False)
        label(axes, name, "θ₁", "θ₂" if axes is row[0] else "")
    return figure
