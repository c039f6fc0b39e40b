"""The masks of the user's own pictures: what `etude predict RUN FILE…` does with a segmentation run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.core.loaded import Loaded
from etude.core.predict import Pictures, listed
from etude.segmentation.parts.looks import mask_image, overlaid
from etude.segmentation.parts.scenes import load
from etude.segmentation.parts.tiles import PixelNetwork, logits

TILE = 512
"""Pictures are predicted in tiles of this side, so that any size fits into memory; the answer is that of one pass."""


def predict(loaded: Loaded, pictures: Pictures) -> list[dict[str, Any]]:
    """A mask for each picture: rows {file, mask, overlay, shares}.

    Files are written to ``predictions/`` of the run folder: ``NAME-mask.png`` (a palette picture of class numbers) and
    ``NAME-overlay.png``. Pixels, uint8 (C, H, W), are answered with the mask as an array, uint8 (H, W), and no files.
    """
    channels = loaded.spec.shape[0]
    net = loaded.model
    assert isinstance(net, PixelNetwork)
    if isinstance(pictures, (np.ndarray, torch.Tensor)):
        x = torch.as_tensor(pictures)
        if x.dtype != torch.uint8 or x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise UserError(
                f"this network takes uint8 pixels (C, H, W) or (N, C, H, W) with {channels} channels, not {x.dtype} "
                f"{tuple(x.shape)}"
            )
        found = masks(net, x.reshape(-1, *x.shape[-3:]))
        return [row(loaded, mask) | {"file": None, "mask": mask, "overlay": None} for mask in found]
    paths = listed([pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures))
    read = [load(path, channels) for path in paths]  # all of them, before anything is written
    folder = loaded.folder / "predictions"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    for path, x in zip(paths, read):
        name = path.stem
        while name in taken:
            name += "_"
        taken.add(name)
        (mask,) = masks(net, torch.tensor(x)[None])
        files = {what: folder / f"{name}-{what}.png" for what in ("mask", "overlay")}
        save(mask_image(mask), files["mask"])
        save(Image.fromarray(overlaid(x, mask)), files["overlay"])
        rows.append({"file": str(path)} | {what: str(file) for what, file in files.items()} | row(loaded, mask))
    return rows


def masks(net: PixelNetwork, x: torch.Tensor) -> list[np.ndarray]:
    """The likeliest class of every pixel of pictures (N, C, H, W): uint8 (H, W) each."""
    net.eval()
    return [logits(net, picture[None], TILE)[0].argmax(0).byte().numpy() for picture in x]


def row(loaded: Loaded, mask: np.ndarray) -> dict[str, Any]:
    """The classes found, the largest first, with their share of the pixels."""
    counts = np.bincount(mask.ravel(), minlength=len(loaded.spec.classes))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    return {"shares": {loaded.spec.classes[i]: counts[i] / mask.size for i in order}}


def save(image: Image.Image, path: Path) -> None:
    """Written whole or not at all."""
    part = path.with_suffix(".part")
    image.save(part, "PNG")
    part.replace(path)
