"""Pictures of what is worth how much, and of what is done, in worlds that are grids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.environments import Environment

ARROWS = {"FrozenLakeEnv": "←↓→↑", "CliffWalkingEnv": "↑→↓←"}
"""By class: what the actions 0, 1, … mean in the grid worlds of Gymnasium."""


def grid(env: Environment, states: int) -> tuple[tuple[int, int], str] | None:
    """((rows, columns), arrows of the actions or "") where the states are the cells of a grid, row by row; else None."""
    inner = env.make().unwrapped
    shape = getattr(inner, "shape", getattr(getattr(inner, "desc", None), "shape", ()))
    if len(shape) != 2 or int(np.prod(shape)) != states:
        return None
    return (int(shape[0]), int(shape[1])), ARROWS.get(type(inner).__name__, "")


def value_map(
    value: NDArray[np.float64],
    shape: tuple[int, int],
    signs: list[str] | None = None,
    known: NDArray[np.bool_] | None = None,
) -> Any:
    """A grid world's values (S,), one cell a state; cells not `known` are blank. `signs` (S,) stand under the values."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from etude.blocks.pictures.plots import INK, PALETTE, PAPER

    side = 0.52 if signs is None else 0.66  # inches
    figure = Figure(figsize=(side * shape[1], side * shape[0]), layout="tight", facecolor=PAPER)
    axes = figure.subplots()
    seen = np.ones(len(value), bool) if known is None else known
    shades = LinearSegmentedColormap.from_list("etude", (PAPER, PALETTE[0]))
    axes.imshow(np.where(seen, value, np.nan).reshape(shape), cmap=shades)
    low, high = (float(value[seen].min()), float(value[seen].max())) if seen.any() else (0.0, 0.0)
    for cell in map(int, np.flatnonzero(seen)):
        text = f"{value[cell]:.2g}" + (f"\n{signs[cell]}" if signs else "")
        colour = PAPER if float(value[cell]) - low > (high - low) / 2 else INK  # what can be read on this cell
        axes.text(cell % shape[1], cell // shape[1], text, ha="center", va="center", color=colour, fontsize=9)
    axes.set(xticks=[], yticks=[], facecolor=PAPER)
    return figure
