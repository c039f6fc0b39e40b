"""Samples of a generator, pictures of them, and `etude sample` of the GAN files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from etude.blocks.pictures import plots
from etude.core.config import Count, Whole
from etude.core.run import Loaded
from etude.gans.parts.judge import judgement
from etude.gans.parts.ring import MODES, ring, ring_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 25
"""Images in a grid: in five columns each stays legible when the grid is a thumbnail in the report."""


@torch.no_grad()
def drawn(generator: nn.Module, z: Tensor) -> Tensor:
    """Samples (N, …) of noise (N, latent), on the CPU, by the running batch statistics; then training mode again."""
    generator.eval()
    samples = torch.cat([generator(part) for part in z.split(500)]).cpu()
    generator.train()
    return samples


def unit(images: Tensor) -> Tensor:
    """[−1, 1] → [0, 1]."""
    return (images + 1) / 2


def scatter(samples: Tensor) -> Figure:
    """Generated points (N, 2), orange, over as many real ones, grey, in a window that holds the ring.

    It has no legend, which a thumbnail could not show: the caption names the two colours.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.6), dpi=100, facecolor=plots.PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    real = ring(len(samples), torch.Generator().manual_seed(0))
    for points, colour in ((real, plots.PALETTE[7]), (samples, plots.PALETTE[1])):
        axes.plot(*points.T.cpu().numpy(), ".", color=colour, markersize=6, markeredgewidth=0, alpha=0.5)
    axes.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
    axes.set_axis_off()
    return figure


@dataclass(frozen=True)
class Sample:
    """Settings of `etude sample`."""

    count: Count = 64
    """Samples to draw."""
    seed: Whole = 0
    """Seed of the noise."""


@torch.no_grad()
def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Draw from the generator: a grid of images, or points over the ring, in ``samples.png``; say what is on it."""
    noise = torch.Generator().manual_seed(options.seed)
    samples = drawn(loaded.modules["generator"], torch.randn(options.count, loaded.config.latent, generator=noise))
    said = f"{options.count} samples after {loaded.step} steps: "
    if loaded.spec.shape == (2,):
        scatter(samples).savefig(folder / "samples.png", dpi=144)
        scores = ring_scores(samples)
        said += f"{scores['modes']:.0f} of {MODES} modes covered, {scores['share']:.1%} within 3σ"
        return f"{said}\n{folder}/samples.png"
    images = unit(samples)
    plots.grid(images).save(folder / "samples.png")
    _, classes = judgement(loaded.modules["judge"], images)
    names = loaded.spec.classes
    counts = torch.bincount(classes, minlength=len(names)).tolist()
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    return f"{said}our LeNet takes them for {shown}\n{folder}/samples.png"
