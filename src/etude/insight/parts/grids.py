"""Rows of small pictures with words at the right, and pictures side by side: what this room shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from etude.blocks.pictures.plots import INK, PAPER, SOFT, WIDTH


def pixels(x: Tensor) -> Tensor:
    """(C, H, W) in [0, 1], C = 1 or 3 → (H, W, 3), clipped."""
    x = x.detach().cpu().float().clamp(0, 1)
    return (x if len(x) == 3 else x[:1].expand(3, -1, -1)).permute(1, 2, 0)


def _draw(figure: Figure, x: Tensor, box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box)
    axes.set_axis_off()
    sharp = "nearest" if max(x.shape[-2:]) <= 64 else "antialiased"
    axes.imshow(pixels(x).numpy(), interpolation=sharp)


def grid(rows: Tensor, said: Sequence[Sequence[str]] = (), columns: Sequence[str] = ()) -> Figure:
    """Pictures (M, K, C, h, w) in [0, 1], a row of K each; `said` has two lines of words a row, `columns` headings."""
    count, across, _, high, wide = rows.shape
    words = 0.9 if said else 0.0
    tile = (WIDTH - words) / across
    tall, top = tile * high / wide, 0.22 if columns else 0.0
    height = count * tall + top
    figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor=PAPER)
    # one image for each row: many axes are slow
    gap = max(1, round(0.06 * wide)) if max(high, wide) <= 64 else max(2, round(0.02 * wide))
    paper = torch.tensor([int(PAPER[k : k + 2], 16) / 255 for k in (1, 3, 5)]).view(3, 1, 1)
    for i, row in enumerate(rows):
        sheet = paper.repeat(1, high + 2 * gap, across * (wide + 2 * gap))
        for j, x in enumerate(row):
            left = j * (wide + 2 * gap) + gap
            sheet[:, gap : gap + high, left : left + wide] = pixels(x).permute(2, 0, 1)
        bottom = (count - 1 - i) * tall / height
        _draw(figure, sheet, (0, bottom, across * tile / WIDTH, tall / height))
        axes = figure.axes[-1]
        axes.images[0].set_interpolation("nearest" if max(high, wide) <= 64 else "antialiased")
        for k, line in enumerate(said[i] if said else ()):
            place = bottom + tall / height * (0.62 - 0.3 * k)
            figure.text(
                (across * tile + 0.06) / WIDTH, place, line, fontsize=7, color=INK if k == 0 else SOFT, va="center",
                parse_math=False,
            )  # fmt: skip
    for j, word in enumerate(columns):
        figure.text(
            (j + 0.05) * tile / WIDTH, 1 - 0.03 / height, word, fontsize=8, color=SOFT, va="top", parse_math=False
        )
    return figure


def picture(x: Tensor) -> Any:
    """(1, C, H, W) or (C, H, W) in [0, 1] → an image of exactly these pixels."""
    from PIL import Image

    values = pixels(x[0] if x.ndim == 4 else x)
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())
