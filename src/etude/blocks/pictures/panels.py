"""Several plots in one picture, and smooth animations of a plot, in the style of `etude.blocks.pictures.plots`.

`panels` gives styled axes to draw on; `film` redraws only what moves, so a hundred frames take about a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from etude.blocks.pictures.plots import INK, PAPER, RULE, SOFT, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(
    columns: int = 1, rows: int = 1, width: float = WIDTH, height: float | None = None, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` × `columns` plots, row by row; `width` and `height` in inches.

    `shared` goes to `Figure.subplots` (sharex, sharey, height_ratios).
    """
    from matplotlib.figure import Figure

    tall = 0.62 * width / columns * rows if height is None else height
    figure = Figure(figsize=(width, tall), dpi=144, facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.08)  # type: ignore[union-attr]
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat:
        axes.set_facecolor(PAPER)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color("#a8a39a")
        axes.tick_params(which="both", colors=SOFT, labelsize=8, length=3)
        axes.xaxis.label.set(color=SOFT, fontsize=9)
        axes.yaxis.label.set(color=SOFT, fontsize=9)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def label(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title on the left, names with units on the axes (those that are given); ``$…$`` is mathematics."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    if x:
        axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)


def legend(axes: Axes, loc: Any = "best", **settings: Any) -> None:
    """A small legend without a frame, which hides what lies under it."""
    style = {"fontsize": 8, "labelcolor": INK, "facecolor": PAPER, "edgecolor": "none", "framealpha": 0.85}
    axes.legend(loc=loc, **(style | settings))


def film(
    figure: Figure, moving: Sequence[Any], times: Iterable[Any], show: Callable[[Any], None], colours: int = 160
) -> list[Image.Image]:
    """One frame for each of `times`: `show(time)` sets the data of the `moving` artists, and only those are redrawn.

    Frames have one palette of `colours` colours, taken from three of them, without dithering: what a GIF stores compactly.
    Raises ValueError for no frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    for artist in moving:
        artist.set_animated(True)
    for _ in range(2):  # a legend outside the axes takes its place in the second layout
        canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    drawn = []
    for time in times:
        show(time)
        canvas.restore_region(still)
        for artist in moving:
            artist.axes.draw_artist(artist)
        drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    if not drawn:
        raise ValueError("a film needs at least one frame")
    chosen = np.hstack([np.asarray(drawn[place]) for place in (len(drawn) // 8, len(drawn) // 2, -1)])
    palette = Image.fromarray(chosen).quantize(colours, dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
