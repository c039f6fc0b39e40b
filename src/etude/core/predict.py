"""A trained classifier on the user's own pictures, prepared as its training images were.

What the network needs to know of a picture travels with the run: grey or colour, height and width in spec.json, the
standardisation inside the network. Files are decoded as `etude.data.folders` decodes a training folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.core.spec import Spec

if TYPE_CHECKING:
    from etude.core.loaded import Loaded

Pictures = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | np.ndarray | Tensor
"""A file, a folder (every image in it), several of them; or pixels: (H, W), (C, H, W), (H, W, C), or N of those."""

Prediction = TypedDict(
    "Prediction",
    {
        "file": str | None,
        "class": str,
        "probability": float,
        "label": int,
        "probabilities": dict[str, float],
        "note": str,
    },
)
"""What a network says of one picture: the most probable class, its probability, and the probabilities of all."""
Box = TypedDict("Box", {"class": str, "probability": float, "label": int, "box": list[float]})
"""One object that a detector found: its class, its score, and (x1, y1, x2, y2) in pixels of the picture."""


class Detected(TypedDict):
    """What a detector found in one picture, best first."""

    file: str | None
    boxes: list[Box]


BATCH = 256


def predict(loaded: Loaded, pictures: Pictures) -> list[Prediction]:
    """The class of each picture. Raises UserError for a run that holds no classifier and for what is no picture."""
    if loaded.detects:
        raise UserError(f"{loaded.name} finds boxes and gives a picture no one class: loaded.detect(pictures)")
    names = classes_of(loaded)
    if isinstance(pictures, (np.ndarray, Tensor)):
        x = pixels(pictures, loaded.spec)
        files: list[str | None] = [None] * len(x)
    else:
        paths = listed([pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures))
        files = [*map(str, paths)]
        x = torch.from_numpy(decoded(paths, loaded.spec))
    rows = torch.cat([_probabilities(loaded, part, len(names)) for part in x.split(BATCH)])
    found: list[Prediction] = []
    for file, picture, row in zip(files, x, rows):
        best = int(row.argmax())
        found.append(
            {
                "file": file,
                "class": names[best],
                "probability": float(row[best]),
                "label": best,
                "probabilities": {name: float(p) for name, p in zip(names, row.tolist())},
                "note": _note(picture, loaded.spec),
            }
        )
    return found


@torch.no_grad()
def detect(loaded: Loaded, pictures: Pictures) -> list[Detected]:
    """The boxes in each picture. Raises UserError for a run that holds no detector and for what is no picture."""
    if not loaded.detects:
        raise UserError(f"{loaded.name} is no detector, so it finds no boxes; {loaded.offers}")
    channels, height, width = loaded.spec.shape
    files: list[str | None] = []
    if isinstance(pictures, (np.ndarray, Tensor)):
        x = pixels(pictures, loaded.spec)
        files += [None] * len(x)
        sides = [(width, height)] * len(x)
    else:
        paths = listed([pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures))
        read = [warped(path, channels == 1, (width, height)) for path in paths]
        files += map(str, paths)
        sides = [side for _, side in read]
        x = torch.from_numpy(np.stack([picture for picture, _ in read]))
    model: Any = loaded.model.eval()
    answers = [loaded.method.detect(loaded.config, model, part) for part in x.split(BATCH)]  # type: ignore[union-attr]
    boxes, scores, labels = (torch.cat([answer[n] for answer in answers]).tolist() for n in range(3))
    found: list[Detected] = []
    for row, (file, (wide, high)) in enumerate(zip(files, sides)):
        across, down = wide / width, high / height
        rows: list[Box] = [
            {
                "class": loaded.spec.classes[label],
                "probability": score,
                "label": label,
                "box": [x1 * across, y1 * down, x2 * across, y2 * down],
            }
            for (x1, y1, x2, y2), score, label in zip(boxes[row], scores[row], labels[row])
            if label >= 0
        ]
        found.append({"file": file, "boxes": rows})
    return found


def warped(path: Path, grey: bool, sides: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """One file, upright, stretched to `sides` (width, height): uint8 (C, height, width); and its own sides."""
    from PIL import Image

    from etude.data import folders

    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"The image {path} {what}: name a picture ({', '.join(sorted(folders.ENDINGS)[:5])}, …).")
    image = folders.plain(folders.opened(path), grey)
    shown = np.asarray(image.resize(sides, Image.Resampling.BILINEAR))
    return shown.reshape(sides[1], sides[0], -1).transpose(2, 0, 1), image.size


def classes_of(loaded: Loaded) -> tuple[str, ...]:
    """The class names of a classifier of images. Raises UserError, saying what else the run offers, for another one."""
    if "model" in loaded.modules and len(loaded.spec.shape) == 3 and len(loaded.spec.classes) > 1:
        return loaded.spec.classes
    raise UserError(f"{loaded.name} is no classifier of images, so it predicts nothing; {loaded.offers}")


def pixels(array: np.ndarray | Tensor, spec: Spec) -> Tensor:
    """Pixels as the network takes them: uint8, or float32 in [0, 1], (N, C, H, W). Raises UserError for any others."""
    x = torch.as_tensor(array).detach().cpu()
    channels, height, width = spec.shape
    wanted = f"this network takes pictures of {channels} × {height} × {width} (channels, height, width)"
    given = tuple(x.shape)
    if x.ndim == 2 and channels == 1:
        x = x[None]
    if x.ndim == 3 and tuple(x.shape) != spec.shape and channels == 1 and tuple(x.shape[1:]) == (height, width):
        x = x[:, None]  # N grey pictures
    if x.ndim in (3, 4) and x.shape[-3] != channels and x.shape[-1] == channels:
        x = x.movedim(-1, -3)
    if x.ndim == 3:
        x = x[None]
    if x.ndim != 4 or tuple(x.shape[1:]) != spec.shape or not len(x):
        raise UserError(f"{wanted}, and the array given has shape {given}; a file is fitted by itself")
    if x.dtype == torch.uint8:
        return x
    if x.is_complex():
        raise UserError(f"pixels are no complex numbers ({x.dtype})")
    low, high = float(x.min()), float(x.max())
    if x.is_floating_point() or x.dtype == torch.bool:
        if not (low >= 0 and high <= 1):  # also where one is NaN
            what = "lie between 0 and 1" if high <= 255 and low >= 0 else "are finite and lie between 0 and 1"
            advice = "; divide them by 255, or give uint8" if 1 < high <= 255 and low >= 0 else ""
            raise UserError(f"floating pixels {what}, and these go from {low:.4g} to {high:.4g}{advice}")
        return x.float()
    if low < 0 or high > 255:
        raise UserError(f"whole pixels lie between 0 and 255, and these go from {low:.0f} to {high:.0f}")
    return x.to(torch.uint8)


def listed(given: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The picture files, those in a folder in the order of their names."""
    from etude.data.folders import ENDINGS

    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
            if not inside:
                raise UserError(f"the folder {path} holds no picture ({', '.join(sorted(ENDINGS)[:5])}, …)")
            found += inside
        else:
            found.append(path)
    if not found:
        raise UserError("name at least one picture")
    return found


def decoded(paths: Sequence[Path], spec: Spec) -> np.ndarray:
    """The files as uint8 (N, C, H, W), decoded as training folders are."""
    from etude.data.folders import picture

    return np.stack([picture(path, spec.shape) for path in paths])


@torch.no_grad()
def _probabilities(loaded: Loaded, x: Tensor, classes: int) -> Tensor:
    logits: Any = loaded.model.eval()(x.float() / 255 if x.dtype == torch.uint8 else x)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(x), classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{loaded.name} answers {shape} where a classifier answers {(len(x), classes)}, so it predicts nothing; "
            f"{loaded.offers}"
        )
    return logits.float().softmax(1)


def _note(picture: Tensor, spec: Spec) -> str:
    """A warning where a grey picture looks like the negative of the training images; else nothing."""
    if len(spec.mean) != 1 or abs(spec.mean[0] - 0.5) < 0.15:
        return ""
    bright = float(picture.float().mean()) / (255 if picture.dtype == torch.uint8 else 1)
    if abs(bright - (1 - spec.mean[0])) >= 0.5 * abs(bright - spec.mean[0]):
        return ""
    kinds = ("light on dark", "dark on light")
    ours, theirs = kinds if spec.mean[0] > 0.5 else kinds[::-1]
    return f"it is {ours}, and the training images were {theirs}; its negative may be what the network knows"
