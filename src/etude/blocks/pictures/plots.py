"""Pictures for the report: matplotlib figures through the object API, and pixel grids straight from arrays.

No function touches pyplot, so nothing is kept in a global registry and nothing has to be closed. Arrays may be numpy
arrays or torch tensors (any device). A figure is about 4.8 inches wide at 160 dots an inch, a size that stays legible
in one column of the report and on a telephone; `PALETTE`, paper and ink are those of the report's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from etude.blocks.metrics import confusion_matrix

if TYPE_CHECKING:  # matplotlib takes most of a second to import: the first picture pays, not the first step
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#24588f", "#c2502d", "#4b7a3f", "#80589b", "#b08a1e", "#3d8c8c", "#a3486f", "#6a665f")
PAPER, INK, SOFT, RULE = "#fcfbf8", "#1d1c1a", "#6a665f", "#e5e1d8"
WIDTH = 4.8  # inches
_DPI = 160
_BLUES = (PAPER, "#c9d8e8", "#6f9bc8", PALETTE[0], "#12304f")

Arrayish = Any  # numpy array or torch tensor


class _Run(Protocol):
    device: torch.device

    def artifact(self, name: str, value: Any, /, *, caption: str = ...) -> Any: ...


# ------------------------------------------------------------------------------------------------------------ pixels


def grid(images: Arrayish, columns: int | None = None, padding: int = 1, background: float = 1.0) -> Image.Image:
    """Tile images (N, C, H, W) or (N, H, W), floats in [0, 1] or uint8, C = 1 or 3, into one picture row by row.

    ``columns`` defaults to the smallest square that holds all. Floats are clipped to [0, 1] and rounded (NaN becomes
    0); ``padding`` pixels of ``background`` grey lie between tiles and round them. Raises ValueError for other shapes.
    """
    pixels = _pixels(images)
    count, height, width, channels = pixels.shape
    if count == 0:
        raise ValueError("grid needs at least one image")
    across: int = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    rows = math.ceil(count / across)
    shade = round(255 * background)
    canvas = np.full((rows * across, height + padding, width + padding, channels), shade, np.uint8)
    canvas[:count, padding:, padding:] = pixels
    canvas = canvas.reshape(rows, across, height + padding, width + padding, channels).swapaxes(1, 2)
    canvas = canvas.reshape(rows * (height + padding), across * (width + padding), channels)
    canvas = np.pad(canvas, ((0, padding), (0, padding), (0, 0)), constant_values=shade)
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def filters(weight: Arrayish, columns: int | None = None) -> Image.Image:
    """The filters of a first layer, weight (O, I, kh, kw), as tiles: mid-grey is 0, each filter is scaled by its own
    largest absolute weight. One or three inputs give grey or colour tiles; otherwise rows are filters, columns inputs.
    """
    weights = _array(weight).astype(np.float64)
    if weights.ndim != 4:
        raise ValueError(f"weight has shape {weights.shape}; it must be (filters, inputs, height, width)")
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + 0.5 * weights / np.where(largest > 0, largest, 1)
    inputs = weights.shape[1]
    if inputs not in (1, 3):
        return grid(tiles.reshape(-1, 1, *tiles.shape[2:]), inputs)
    return grid(tiles, columns or _even_columns(len(tiles)))


def picture(figure: Figure) -> Image.Image:
    """Draw a figure into an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def animation(frames: Sequence[Any], least: int = 240) -> list[Image.Image]:
    """Frames (figures, PIL images, or arrays as `grid` takes one image: (C, H, W) or (H, W)) as RGB images of one size.

    Images whose longer side is below ``least`` pixels are enlarged by a whole factor with sharp pixels. A run writes
    the list as a GIF. Raises ValueError if the sizes differ.
    """
    drawn: list[Image.Image] = []
    for frame in frames:
        if hasattr(frame, "savefig"):
            image = picture(frame)
        elif isinstance(frame, Image.Image):
            image = frame.convert("RGB")
        else:
            array = _array(frame)
            pixels = _pixels(array[None])[0]
            image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        if drawn and image.size != drawn[0].size:
            raise ValueError(f"frame {len(drawn)} is {image.size}, the first {drawn[0].size}; all must be of one size")
        drawn.append(image)
    if not drawn:
        raise ValueError("animation needs at least one frame")
    times = max(1, math.ceil(least / max(drawn[0].size)))
    size = (drawn[0].width * times, drawn[0].height * times)
    return [image.resize(size, Image.Resampling.NEAREST) if times > 1 else image for image in drawn]


def write_gif(frames: Sequence[Image.Image], file: str | PathLike[str] | IO[bytes], milliseconds: int = 120) -> None:
    """Write frames as an endless GIF; the last one stays ten times as long so that the end can be seen."""
    times = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    frames[0].save(file, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0, optimize=False)


# ----------------------------------------------------------------------------------------------------------- figures


def confusion(matrix: Arrayish, names: Sequence[str]) -> Figure:
    """Confusion matrix (C, C) of counts, rows truth, columns prediction: shaded by the share of each row, so that rare
    classes are as visible as common ones; counts are written in while there is room (C ≤ 20)."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = _array(matrix)
    classes = len(counts)
    if counts.shape != (classes, classes) or len(names) != classes:
        raise ValueError(f"matrix has shape {counts.shape} and there are {len(names)} names; they must agree")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _figure(WIDTH, WIDTH)
    axes.imshow(share, cmap=LinearSegmentedColormap.from_list("etude", _BLUES), vmin=0, vmax=1, interpolation="nearest")
    size = float(np.clip(90 / classes, 4, 9))
    if classes <= 20:
        for i in range(classes):
            for j in range(classes):
                if counts[i, j]:
                    colour = PAPER if share[i, j] > 0.5 else INK
                    axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=size, color=colour)
    step = math.ceil(classes / 40)
    shown = range(0, classes, step)
    long = max((len(name) for name in names), default=0) > 3
    labels = [_short(names[i], 14) for i in shown]
    slant: dict[str, Any] = {"rotation": 45, "ha": "right"} if long else {}
    axes.set_xticks(shown, labels, fontsize=size, parse_math=False, **slant)
    axes.set_yticks(shown, labels, fontsize=size, parse_math=False)
    if long:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    edges = np.arange(classes + 1) - 0.5
    if classes <= 40:
        axes.vlines(edges, -0.5, classes - 0.5, color=RULE, linewidth=0.6)
        axes.hlines(edges, -0.5, classes - 0.5, color=RULE, linewidth=0.6)
    axes.set_xlim(-0.52, classes - 0.48)
    axes.set_ylim(classes - 0.48, -0.52)
    return figure


def mistakes(
    images: Arrayish,
    truth: Arrayish,
    predicted: Arrayish,
    confidence: Arrayish,
    names: Sequence[str],
    count: int = 24,
    columns: int = 4,
) -> Figure:
    """The ``count`` most confident mistakes as a grid of pictures, surest first, each with what it was taken for and
    what it is. images (N, C, H, W) uint8 or floats in [0, 1]; truth, predicted (N,) ints; confidence (N,) in [0, 1]."""
    truth, predicted, confidence = _array(truth), _array(predicted), _array(confidence)
    wrong = np.flatnonzero(truth != predicted)
    if not len(wrong):
        figure, axes = _figure(WIDTH, 0.9)
        axes.set_axis_off()
        axes.text(0, 0.5, f"No mistake among {len(truth):,}.", fontsize=11, va="center", transform=axes.transAxes)
        return figure
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    pixels = _pixels(_take(images, order))
    rows = math.ceil(len(order) / columns)
    tile = WIDTH / columns
    caption = 0.46
    height = rows * (tile * 0.9 * pixels.shape[1] / pixels.shape[2] + caption)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, facecolor=PAPER)
    smooth = "nearest" if max(pixels.shape[1:3]) <= 64 else "antialiased"
    wide = 0.9 / columns
    tall = tile * 0.9 * pixels.shape[1] / pixels.shape[2] / height
    for place, (index, image) in enumerate(zip(order, pixels)):
        row, column = divmod(place, columns)
        left, top = (column + 0.05) / columns, 1 - row / rows
        axes = figure.add_axes((left, top - tall, wide, tall))
        shown = image[..., 0] if image.shape[-1] == 1 else image
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
        axes.set_axis_off()
        taken, is_ = _short(names[int(predicted[index])], 11), _short(names[int(truth[index])], 11)
        line = top - tall - 0.04 / height
        style: dict[str, Any] = {"va": "top", "fontsize": 8.5, "parse_math": False}
        figure.text(left, line, f"{taken} {_percent(confidence[index])}", color=PALETTE[1], **style)
        figure.text(left, line - 0.155 / height, f"is {is_}", color=SOFT, **style)
    return figure


def curves(series: Mapping[str, tuple[Arrayish, Arrayish]], x: str = "step", y: str = "", log: bool = False) -> Figure:
    """Lines by name, each a pair of equally long arrays; ``log`` makes the vertical axis logarithmic."""
    figure, axes = _figure(WIDTH, WIDTH * 0.62)
    for i, (name, (across, up)) in enumerate(series.items()):
        axes.plot(_array(across), _array(up), color=PALETTE[i % len(PALETTE)], linewidth=1.5, label=_plain(name))
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def bars(
    names: Sequence[str], values: Arrayish, spread: Arrayish | None = None, bar: float | None = None, x: str = ""
) -> Figure:
    """Horizontal bars, one a name, with their values; ``spread`` adds error whiskers, ``bar`` a line to reach."""
    numbers = _array(values).astype(np.float64)
    figure, axes = _figure(WIDTH, 0.7 + 0.28 * len(names))
    whiskers = None if spread is None else _array(spread)
    place = np.arange(len(names))
    axes.barh(place, numbers, height=0.62, color=PALETTE[0], xerr=whiskers, error_kw={"ecolor": INK, "elinewidth": 1})
    for i, number in enumerate(numbers):
        reach = abs(float(whiskers[i])) if whiskers is not None else 0.0
        edge = max(number, 0.0) + (reach if number >= 0 else 0.0)
        axes.annotate(f"{number:.4g}", (edge, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(place, [_short(name, 28) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(_plain(x))
    axes.margins(x=0.14)
    if (numbers >= 0).all():
        axes.set_xlim(left=0)
    if bar is not None:
        axes.axvline(bar, color=PALETTE[2], linewidth=1.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def paths(
    points: Mapping[str, Arrayish],
    background: Arrayish | None = None,
    extent: tuple[float, float, float, float] | None = None,
) -> Figure:
    """Paths in the plane by name, each (T, 2): a line from an open circle (start) to a full one (end). ``background``
    (H, W), row 0 at the bottom, is drawn as level lines over ``extent`` (x0, x1, y0, y1)."""
    figure, axes = _figure(WIDTH, WIDTH * 0.82)
    if background is not None:
        heights = _array(background).astype(np.float64)
        if extent is None:
            raise ValueError("a background needs its extent (x0, x1, y0, y1)")
        across = np.linspace(extent[0], extent[1], heights.shape[1])
        up = np.linspace(extent[2], extent[3], heights.shape[0])
        axes.contour(across, up, heights, levels=14, colors="#bdb7aa", linewidths=0.8)
    for i, (name, path) in enumerate(points.items()):
        line, colour = _array(path).astype(np.float64), PALETTE[i % len(PALETTE)]
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.4, label=_plain(name))
        axes.plot(line[0, 0], line[0, 1], "o", color=colour, markerfacecolor=PAPER, markersize=5)
        axes.plot(line[-1, 0], line[-1, 1], "o", color=colour, markersize=5)
    if len(points) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def classifier_pictures(
    run: _Run,
    model: nn.Module,
    test_x: Tensor,
    test_y: Tensor,
    names: Sequence[str],
    first_layer_weight: Tensor | None = None,
    batch: int = 500,
) -> None:
    """Evaluate a classifier and hand its confusion matrix, surest mistakes and first-layer filters to ``run.artifact``.

    test_x (N, C, H, W) in the form the model takes, test_y (N,) int64, first_layer_weight (O, I, kh, kw) or None.
    The model's training mode is as before when it returns.
    """
    training = model.training
    model.eval()
    taken, sure = [], []
    try:
        with torch.no_grad():
            for part in test_x.split(batch):
                top = model(part.to(run.device)).float().softmax(-1).max(-1)
                taken.append(top.indices.cpu())
                sure.append(top.values.cpu())
    finally:
        model.train(training)
    truth, predicted, confidence = test_y.cpu(), torch.cat(taken), torch.cat(sure)
    wrong = int((truth != predicted).sum())
    matrix = confusion_matrix(truth, predicted, len(names))
    caption = f"Test items by class; {wrong:,} of {len(truth):,} wrong."
    run.artifact("confusion", confusion(matrix, names), caption=caption)
    if wrong:
        caption = "The surest mistakes: what the picture was taken for, how surely, and what it is."
        run.artifact("mistakes", mistakes(test_x, truth, predicted, confidence, names), caption=caption)
    if first_layer_weight is not None:
        caption = "First-layer filters, each scaled to its own largest weight; mid-grey is zero."
        run.artifact("filters", filters(first_layer_weight), caption=caption)


# ----------------------------------------------------------------------------------------------------------- helpers


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color("#a8a39a")
    axes.tick_params(colors=SOFT, labelsize=8, length=3)
    axes.xaxis.label.set(color=SOFT, fontsize=9)
    axes.yaxis.label.set(color=SOFT, fontsize=9)
    return figure, axes


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _take(images: Any, order: np.ndarray) -> np.ndarray:
    """Only the wanted images leave the device."""
    return _array(images[torch.from_numpy(order)] if isinstance(images, Tensor) else np.asarray(images)[order])


def _pixels(images: Any) -> np.ndarray:
    """(N, C, H, W) or (N, H, W) as uint8 (N, H, W, C)."""
    array = _array(images)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {array.shape}; they must be (N, H, W) or (N, C, H, W) with C = 1 or 3")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = (np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)
    return array.transpose(0, 2, 3, 1)


def _even_columns(count: int) -> int:
    """A number of columns near the square root (up to twice) that leaves no ragged last row, if there is one."""
    root = math.ceil(math.sqrt(count))
    return next((n for n in range(root, 2 * root + 1) if count % n == 0), root)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _plain(text: str) -> str:
    """Text that matplotlib will not read as mathematics."""
    return text.replace("$", r"\$")


def _percent(share: float) -> str:
    """Whole per cents, but never 100 % for a probability below one half of a per cent from it."""
    percent = 100 * float(share)
    return f"{percent:.0f}%" if percent < 99.5 else (">99%" if percent < 100 else "100%")
