"""Pictures of boxes: drawn on photographs and in grids, and curves of precision over recall"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from etude.blocks.pictures.boxes import SHOWN, drawn
from etude.blocks.pictures.plots import PALETTE
from etude.detection.parts.average_precision import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from etude.detection.parts.scenes import Scene


def boxes_drawn(
    part: Scene, found: tuple[Tensor, Tensor, Tensor], classes: Sequence[str], columns: int = 4, side: int = 240
) -> Image.Image:
    """A grid of the pictures, each `side` pixels wide, objects pale and detections in the colour of their class."""
    count = len(part)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    page = Image.new("RGB", (columns * (side + 4) - 4, rows * (side + 4) - 4), "white")
    times = side / part.x.shape[-1]
    for n in range(count):
        pixels = part.x[n].cpu().numpy().transpose(1, 2, 0)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
        image = image.resize((side, side), Image.Resampling.NEAREST if times > 2 else Image.Resampling.BICUBIC)
        truth = [
            ("", None, [times * v for v in box], 0) for box, k in zip(part.boxes[n].tolist(), part.labels[n]) if k >= 0
        ]
        answers = [
            (classes[int(kind)], float(score), [times * v for v in box], int(kind))
            for box, score, kind in zip(found[0][n].tolist(), found[1][n], found[2][n])
            if kind >= 0 and score >= SHOWN
        ]
        page.paste(drawn(image, [*truth, *reversed(answers)]), (n % columns * (side + 4), n // columns * (side + 4)))
    return page


def precision_curves(found: tuple[Tensor, Tensor, Tensor], part: Scene, classes: Sequence[str]) -> Figure:
    """Precision over recall at IoU 0.5 for each class."""
    from etude.blocks.pictures.panels import label, legend, panels

    figure, (axes,) = panels()
    lines = curves(found, part.boxes, part.labels, part.difficult)
    for kind, (recall, precision) in lines.items():
        style = ("-", "--", ":")[kind // len(PALETTE) % 3]
        axes.plot(
            recall, precision, color=PALETTE[kind % len(PALETTE)], linewidth=1.3, label=classes[kind], linestyle=style
        )
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.03)
    label(axes, "", "recall", "precision")
    if lines and len(lines) <= 20:
        legend(axes, "lower left", ncols=2 if len(lines) > 5 else 1)
    return figure


def upright(pixels: np.ndarray) -> Image.Image:
    """uint8 (C, H, W) as a picture."""
    rows = pixels.transpose(1, 2, 0)
    return Image.fromarray(rows[..., 0] if rows.shape[2] == 1 else rows)
