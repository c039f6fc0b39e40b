"""Pictures of what is worth how much, and of what is done, in worlds that are grids."""

from __future__ import annotations

from collections.abc import Callable
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


def landscape(
    q_of: Callable[[NDArray[Any]], NDArray[np.float64]], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> Any:
    """max Q and argmax Q over the last two observed numbers, three deviations (D,) about the mean (D,), the others at it.

    `q_of` takes states (N, D) float32 to action values (N, A).
    """
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    from etude.blocks.pictures.panels import label, panels
    from etude.blocks.pictures.plots import PALETTE, PAPER

    side = np.linspace(-3, 3, 61)
    state = np.tile(mean, (61 * 61, 1))
    across, up = np.meshgrid(side, side)
    state[:, -2] += deviation[-2] * across.ravel()
    state[:, -1] += deviation[-1] * up.ravel()
    q = q_of(state.astype(np.float32))
    (low_x, low_y), (high_x, high_y) = (mean[-2:] + sign * 3 * deviation[-2:] for sign in (-1, 1))
    ends = (float(low_x), float(high_x), float(low_y), float(high_y))
    picture, (left, right) = panels(2, width=7.4, height=3.2)
    shades = LinearSegmentedColormap.from_list("etude", (PAPER, PALETTE[0]))
    drawn = left.imshow(q.max(1).reshape(61, 61), origin="lower", extent=ends, aspect="auto", cmap=shades)
    picture.colorbar(drawn, ax=left)
    colours = ListedColormap([PALETTE[i % len(PALETTE)] for i in range(q.shape[1])])
    best = q.argmax(1).reshape(61, 61)
    chosen = right.imshow(
        best, origin="lower", extent=ends, aspect="auto", cmap=colours, vmin=-0.5, vmax=q.shape[1] - 0.5
    )
    picture.colorbar(chosen, ax=right, ticks=range(q.shape[1]))
    names = [f"observed number {len(mean) - 1}", f"observed number {len(mean)}"]
    left.grid(False)
    right.grid(False)
    label(left, "max Q", *names)
    label(right, "the best action", *names)
    return picture
