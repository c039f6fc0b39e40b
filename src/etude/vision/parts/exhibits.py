"""What a convolution does to images, in numbers and in pictures: movement, borders, windows, pooling, a film of the sum"""

from __future__ import annotations

from typing import Any, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude.blocks.nn.norm import Standardise
from etude.blocks.nn.windows import (
    Window,
    convolve,
    convolve_transposed,
    fold,
    max_pool,
    max_pool_backward,
    mean_pool,
    unfold,
)
from etude.blocks.pictures.panels import label, panels
from etude.blocks.pictures.plots import INK, PALETTE, PAPER
from etude.core.run import Run

KERNELS = {
    "blur": ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "sharpen": ((0, -1, 0), (-1, 5, -1), (0, -1, 0)),
    "vertical edges": ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)),
    "horizontal edges": ((-1, -2, -1), (0, 0, 0), (1, 2, 1)),
    "all edges": ((-1, -1, -1), (-1, 8, -1), (-1, -1, -1)),
}
"""Kernels that people wrote before networks learnt theirs: the mean, a Laplacian added, Sobel's two, and a Laplacian."""
WINDOWS = {
    "kernel 3": Window.of(3),
    "padding 1": Window.of(3, padding=1),
    "stride 2": Window.of(3, 2),
    "stride 3": Window.of(3, 3),
    "dilation 2": Window.of(3, dilation=2),
    "pooling 2": Window.of(2, 2),
}


# ------------------------------------------------------------------------------------------------------------ numbers


@torch.no_grad()
def moved_gap(chain: nn.Module, x: Tensor, pixels: int, step: int) -> float:
    """‖f(S x) − S f(x)‖ / ‖f(x)‖ for S that moves images (N, C, H, W) by `pixels` and maps by ⌊pixels/step⌋ places across.

    The images lie in the middle of a wide canvas of zeros whose frame is left out, so nothing meets a border. What the maps
    say of nothing (their biases) does not count to ‖f(x)‖.
    """
    wide = 4 * step * -(-2 * max(x.shape[2:]) // (4 * step))
    canvas, frame = F.pad(x, (wide,) * 4), wide // (2 * step)
    inside = (..., slice(frame, -frame), slice(frame, -frame))
    maps = chain(canvas).roll(pixels // step, 3)[inside]
    change = chain(canvas.roll(pixels, 3))[inside] - maps
    return float(change.norm() / (maps - maps[..., :1, :1]).norm())


@torch.no_grad()
def border_error(x: Tensor) -> float:
    """A photograph (1, C, H, W), blurred 3 × 3: zeros outside against its mirror image, rms over the outermost pixels.

    In units of the photograph's deviation.
    """
    channels, blur = x.transpose(0, 1), x.new_full((1, 1, 3, 3), 1 / 9)
    wrong = convolve(channels, blur, padding=1) - convolve(F.pad(channels, (1,) * 4, mode="reflect"), blur)
    frame = torch.ones_like(wrong, dtype=torch.bool)
    frame[..., 1:-1, 1:-1] = False
    return float(wrong[frame].square().mean().sqrt() / x.std())


@torch.no_grad()
def turned(model: nn.Module) -> nn.Module:
    """The model, each of its kernels turned by half a turn: what mathematics calls a convolution."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.copy_(part.weight.flip(2, 3))
    return model


def looked_at(name: str, subtract: bool) -> tuple[Tensor, Tensor]:
    """A photograph, (1, 3, 104, 160) in [0, 1], and as a network sees it: less its mean, over its deviation."""
    pixels = torch.from_numpy(room.photographs()[name].copy()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels[:, :, 5:-6], size=(104, 160), mode="bilinear", antialias=True).clamp(0, 1)
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return pixels, Standardise(mean if subtract else torch.zeros(3), std)(pixels)


def seen(window: Window, height: int, width: int) -> Tensor:
    """How many windows see each pixel, (height, width): UᵀU 1, the adjoint of the windows on the windows of ones."""
    ones = torch.ones(1, 1, height, width)
    return fold(unfold(ones, window), window, height, width)[0, 0]


# ----------------------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def show(
    run: Run, layers: list[dict[str, Any]], before: nn.Module, features: nn.Sequential, x: Tensor, photograph: Tensor
) -> None:
    """All pictures of a run: `x` (N, C, H, W) uint8 images, `photograph` (1, 3, H, W) in [0, 1]."""
    run.artifact(
        "layers", {row["layer"]: {k: v for k, v in row.items() if k != "layer"} for row in layers}, "The layers."
    )
    run.artifact(
        "kernels", kernels(photograph), "Six kernels of 3 × 3 on one photograph; in the middle of the grey is zero."
    )
    run.artifact("windows", windows(), "How many windows see each of 7 × 7 pixels. Right: one window in red.")
    run.artifact(
        "overlaps", overlaps(), "A transposed convolution, ones on 3 × 3 places: where windows overlap, they add up."
    )
    run.artifact("border", border(photograph), "A photograph, blurred seven times: what zeros outside it do.")
    run.artifact("pooling", pooling(photograph), "A photograph at an eighth of its size, and where its maxima stood.")
    image, first = x[:1].to(run.device), cast(Tensor, features[0].weight)
    run.artifact(
        "maps", maps(before, features, image), "A test image on its way through the network; each map on its own scale."
    )
    run.artifact("film", film(before(image)[0, 0].cpu(), first[0, 0].cpu()), "A learned kernel goes over an image.")


def kernels(photograph: Tensor) -> Image.Image:
    """The photograph and what each of KERNELS makes of its grey."""
    grey = photograph.mean(1, keepdim=True)
    shown = [("as it is", photograph[0])]
    for name, kernel in KERNELS.items():
        weight = torch.tensor(kernel, dtype=torch.float32)[None, None]
        total = float(weight.sum())
        y = convolve(grey, weight / max(1.0, total))[0]
        shown.append((name, y if total else 0.5 + 0.5 * y / float(y.abs().quantile(0.995))))
    return _sheet(shown, columns=3)


def windows() -> Any:
    """For each of WINDOWS: how many of them see a pixel, and one of them."""
    from matplotlib.patches import Rectangle

    figure, axes = panels(3, 2, height=3.6)
    for place, (name, window) in zip(axes, WINDOWS.items()):
        counts = seen(window, 7, 7)
        _numbers(place, counts, most=9)
        (k, _), (s, _), (p, _), (d, _) = window
        for u in range(k):
            for v in range(k):
                corner = (s - p + d * v - 0.5, -p + d * u - 0.5)  # the second window of the first row
                place.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=1.3, clip_on=False))
        down, across = window.places(7, 7)
        place.set(xlim=(-1.6, 6.6), ylim=(6.6, -1.6))  # the padding is shown too
        label(place, f"{name}: {down}×{across}")
    return figure


def overlaps() -> Any:
    """Ones on 3 × 3 places, a kernel of ones: strides of 1 to 3 (E41: sums, not means)."""
    figure, axes = panels(3, 1, height=1.9)
    for place, stride in zip(axes, (1, 2, 3)):
        y = convolve_transposed(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), stride=stride)[0, 0]
        _numbers(place, y, most=9)
        label(place, f"stride {stride}: {len(y)}×{len(y)}")
    return figure


def border(photograph: Tensor) -> Image.Image:
    """The photograph after seven blurs with zeros outside: its pixels as they are, and without their mean."""
    mean = photograph.mean((0, 2, 3), keepdim=True)
    blur = torch.full((1, 1, 3, 3), 1 / 9)
    shown = [("as it is", photograph[0])]
    for name, less in (("zeros outside", torch.zeros_like(mean)), ("mean subtracted", mean)):
        y = (photograph - less).transpose(0, 1)
        for _ in range(7):
            y = convolve(y, blur, padding=1)
        shown.append((name, (y.transpose(0, 1) + less)[0]))
    return _sheet(shown, columns=3)


def pooling(photograph: Tensor) -> Image.Image:
    """One pixel in eight, means and maxima of 8 × 8 pixels, and the gradient of the maxima's sum."""
    largest, places = max_pool(photograph, 8)
    sources = max_pool_backward(torch.ones_like(largest), places, *photograph.shape[2:])
    shown = (
        ("every eighth pixel", photograph[:, :, ::8, ::8]), ("means", mean_pool(photograph, 8)), ("maxima", largest),
        ("their places", 1 - sources.amax(1, keepdim=True)),
    )  # fmt: skip
    return _sheet([(name, y[0]) for name, y in shown], columns=2)


def maps(before: nn.Module, features: nn.Module, image: Tensor) -> Image.Image:
    """The first eight maps behind every layer that is no ReLU, from the image down, one row a layer."""
    y = before(image)
    rows = [("image", y)]
    for part in features.children():
        y = part(y)
        if not isinstance(part, (nn.ReLU, nn.Identity)):
            rows.append(("convolution" if isinstance(part, nn.Conv2d) else "pooling", y))
    shown: list[tuple[str, Tensor | None]] = []
    for name, y in rows:
        low, high = (f(y[0].flatten(1), 1).values[:, None, None] for f in (torch.min, torch.max))
        tiles: list[Tensor | None] = list(((y[0] - low) / (high - low).clamp(min=1e-9))[:, None].cpu()[:8])
        names = [f"{name}, {y.shape[2]} by {y.shape[3]}", *[""] * 7]
        shown += zip(names, tiles + [None] * (8 - len(tiles)))
    return _sheet(shown, columns=8, width=96)


def film(image: Tensor, kernel: Tensor, scale: int = 20) -> list[Image.Image]:
    """A kernel (k, k) goes over an image (H, W) padded with zeros, place after place; right, the sums so far."""
    k = len(kernel)
    p = k // 2
    wide = F.pad(image, (p,) * 4)
    y = convolve(image[None, None], kernel[None, None], padding=p)[0, 0]
    low, high = float(wide.min()), float(wide.max())
    most = max(float(y.abs().max()), 1e-9)
    left = _tiles((wide - low) / max(high - low, 1e-9), scale)
    right = _tiles(0.5 + 0.5 * y / most, scale)
    gap, tall = 2 * scale, left.height
    stride = max(1, y.shape[0] // 8)  # of a large image some rows are left out
    frames = []
    for i in range(0, y.shape[0], stride):
        for j in range(0, y.shape[1], stride):
            frame = Image.new("RGB", (left.width + gap + right.width, tall), PAPER)
            frame.paste(left, (0, 0))
            done = _tiles(torch.full_like(y, 0.94), scale)
            done.paste(right.crop((0, 0, right.width, i * scale)), (0, 0))
            done.paste(right.crop((0, i * scale, (j + 1) * scale, (i + 1) * scale)), (0, i * scale))
            frame.paste(done, (left.width + gap, (tall - right.height) // 2))
            _box(frame, j * scale, i * scale, k * scale)
            _box(frame, left.width + gap + j * scale, (tall - right.height) // 2 + i * scale, scale)
            frames.append(frame)
    return frames


def _tiles(x: Tensor, scale: int) -> Image.Image:
    """(H, W) in [0, 1] as a grey picture of squares."""
    pixels = x.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return (
        Image.fromarray(pixels)
        .resize((x.shape[1] * scale, x.shape[0] * scale), Image.Resampling.NEAREST)
        .convert("RGB")
    )


def _box(frame: Image.Image, left: int, top: int, side: int) -> None:
    ImageDraw.Draw(frame).rectangle((left, top, left + side - 1, top + side - 1), outline=PALETTE[1], width=2)


def _sheet(shown: Any, columns: int, width: int = 256) -> Image.Image:
    """Pairs of a name and a picture, (C, H, W) in [0, 1] or None, as tiles that are `width` pixels wide, names above."""
    font, gap = ImageFont.load_default(size=13), 8
    tiles = [(name, None if y is None else _tile(y, width)) for name, y in shown]
    tall = max(tile.height for _, tile in tiles if tile) + 22
    sheet = Image.new("RGB", (columns * (width + gap) + gap, -(-len(tiles) // columns) * (tall + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (name, tile) in enumerate(tiles):
        left, top = gap + place % columns * (width + gap), place // columns * (tall + gap)
        pen.text((left, top + 3), name, fill=INK, font=font)
        if tile:
            sheet.paste(tile, (left, top + 22))
    return sheet


def _tile(y: Tensor, width: int) -> Image.Image:
    pixels = y.clamp(0, 1).mul(255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    height = round(width * y.shape[1] / y.shape[2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def _numbers(place: Any, counts: Tensor, most: int) -> None:
    """Whole numbers (H, W), written into their squares."""
    place.imshow(counts.numpy(), cmap="Blues", vmin=0, vmax=1.6 * most, interpolation="nearest")
    for i, row in enumerate(counts.int().tolist()):
        for j, number in enumerate(row):
            place.text(j, i, str(number), ha="center", va="center", fontsize=7, color=INK)
    place.grid(False)
    place.set_xticks([])
    place.set_yticks([])
    place.spines[:].set_visible(False)
