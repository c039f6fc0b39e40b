"""What adaptation does, as pictures: new sinusoids before and after the steps, an episode with its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.pictures.panels import label, panels
from etude.blocks.pictures.plots import INK, PALETTE, PAPER, SOFT
from etude.meta.maml.adaptation import Predict, adapt, batched, plain
from etude.meta.maml.tasks import Task, sinusoids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "episode"]


def curves(nets: dict[str, tuple[nn.Module, float]], most: int, shots: int, dice: torch.Generator) -> Figure:
    """Three new sinusoids of `shots` support points, a row for each named network and the rate at which it adapts.

    Each row has the network's curves after 0, 1 and `most` steps.
    """
    task, amplitude, phase = sinusoids(3, shots, 1, dice)
    line = torch.linspace(-5, 5, 200).view(1, -1, 1).expand(3, -1, -1)
    figure, plots = panels(3, len(nets), width=7.2, height=0.6 + 2.1 * len(nets), sharex=True, sharey=True)
    for row, (title, (model, rate)) in enumerate(nets.items()):
        device = next(model.parameters()).device
        placed, asked, weights = task.to(device), line.to(device), batched(model, 3)
        tiles = plots[3 * row : 3 * row + 3]
        for steps, colour in {0: SOFT, 1: PALETTE[0], most: PALETTE[1]}.items():
            adapted = adapt(plain(model), F.mse_loss, weights, placed, rate, steps, "first")
            found = torch.vmap(plain(model))(adapted, asked, asked).detach().cpu()
            name = "before" if steps == 0 else f"{steps} step{'s'[: steps > 1]}"
            for axes, curve in zip(tiles, found):
                axes.plot(line[0, :, 0], curve[:, 0], color=colour, linewidth=1.5, label=name)
        for i, axes in enumerate(tiles):
            axes.plot(line[0, :, 0], (amplitude * torch.sin(line - phase))[i, :, 0], ":", color=INK, label="the task")
            axes.plot(task.support_x[i, :, 0], task.support_y[i, :, 0], "^", color=INK, markersize=4, label="support")
            label(axes, title if i == 0 else "", "x" if row == len(nets) - 1 else "", "" if i else "y")
            axes.set_ylim(-5.5, 5.5)
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def episode(model: nn.Module, predict: Predict, rate: float, steps: int, ways: int, task: Task) -> Figure:
    """One task (T = 1): of up to 8 characters a support drawing and the answers after `steps` steps, wrong ones red."""
    from matplotlib.figure import Figure

    placed = task.to(next(model.parameters()).device)
    adapted = adapt(predict, F.cross_entropy, batched(model, 1), placed, rate, steps, "first")
    answers = torch.vmap(predict)(adapted, placed.query_x, placed.support_x)[0].argmax(1).cpu()
    shots, asked, rows = task.support_x.shape[1] // ways, task.query_x.shape[1] // ways, min(ways, 8)
    figure = Figure(figsize=(1.0 * (1 + asked), 1.15 * rows), dpi=144, facecolor=PAPER, layout="constrained")

    def draw(axes: object, image: Tensor, text: str, colour: str) -> None:
        axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")  # type: ignore[attr-defined]
        axes.set_title(text, fontsize=8, color=colour)  # type: ignore[attr-defined]
        axes.set_axis_off()  # type: ignore[attr-defined]

    for row, tiles in enumerate(figure.subplots(rows, 1 + asked, squeeze=False)):
        draw(tiles[0], task.support_x[0, row * shots], f"support {row}", SOFT)
        for k, axes in enumerate(tiles[1:], row * asked):
            guess = int(answers[k])
            draw(axes, task.query_x[0, k], f"→ {guess}", INK if guess == row else PALETTE[1])
    return figure
