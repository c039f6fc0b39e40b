"""Boxes drawn on a picture, with the class and the score of each"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from etude.blocks.pictures.plots import PALETTE

SHOWN = 0.2
"""Detections of a lower score are not drawn."""


def drawn(
    image: Image.Image, rows: Iterable[tuple[str, float | None, Sequence[float], int]], thick: int = 0
) -> Image.Image:
    """The picture with boxes: rows of (name, score or None, (x1, y1, x2, y2), colour number). Without a score it is pale."""
    canvas = image.convert("RGB")
    pen = ImageDraw.Draw(canvas)
    wide = thick or max(2, round(max(canvas.size) / 300))
    font: Any = ImageFont.load_default(size=max(11, round(max(canvas.size) / 36)))
    for name, score, (x1, y1, x2, y2), colour in rows:
        tint = "#b9b4a8" if score is None else PALETTE[colour % len(PALETTE)]
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=tint, width=wide)
        if score is not None:
            text = f"{name}  {score:.2f}"
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            x = min(max(0, x1), canvas.width - (right - left) - 4)
            y = y1 - (bottom - top) - 5 if y1 - (bottom - top) - 5 >= 0 else y1 + wide
            pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=tint)
            pen.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
    return canvas
