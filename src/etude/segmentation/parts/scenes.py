"""Pictures with a class for every pixel: digits on a canvas, ISBI-2012 membranes, CamVid streets, the user's own folders

A mask holds class numbers 0 … K−1, and 255 where nobody can say (void); void pixels count in no loss and no score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude import data as room
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data import texts
from etude.data.folders import ENDINGS, FORMATS, picture
from etude.data.sets import moments

VOID = 255
"""The label of pixels that count nowhere."""
CANVAS, CELL, SIDE = 64, 21, 16
"""Canvas of digits: its side, the side of the nine cells that may hold a digit, and a digit's side (pixels)."""
SCENES = (400, 50, 100)
"""Canvases for training, validation and testing."""
STREETS = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
"""Classes of CamVid as SegNet's authors number them; their 11 is void."""


@dataclass(frozen=True, eq=False)
class Part:
    """One split: pictures uint8 (C, H, W) and masks uint8 (H, W), each pair of one size."""

    x: list[Tensor]
    y: list[Tensor]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Scenes:
    """Pictures with masks in three splits. `spec.extra["segments"]`: class 0 is what parts one segment from another."""

    name: str
    train: Part
    validation: Part
    """For curves and choices."""
    test: Part
    """Scored once, at the end."""
    spec: Spec
    source: str

    def about(self) -> dict[str, Any]:
        """What a report says: name, source, and for each split the pictures and the share of every class."""
        splits = {}
        for name in ("train", "validation", "test"):
            part: Part = getattr(self, name)
            counts = frequencies(part, len(self.spec.classes))
            shares = (counts / counts.sum().clamp(min=1)).tolist()
            splits[name] = {"images": len(part), "share of pixels": dict(zip(self.spec.classes, shares))}
        return {"name": self.name, "source": self.source, "splits": splits}


def frequencies(part: Part, classes: int) -> Tensor:
    """How many pixels of each class a split has, void left out: (classes,) float64."""
    counts = sum((mask.flatten().bincount(minlength=256) for mask in part.y), torch.zeros(256, dtype=torch.int64))
    return counts[:classes].double()


def read(name: str) -> Scenes:
    """The pictures and masks of that name.

    digits, mnist, … (any data set of images): its images on canvases, a class for every pixel; isbi2012; camvid; or a
    folder with ``images/NAME.*`` and ``masks/NAME.*``. Raises UserError naming the file and what to do.
    """
    if name in ("isbi2012", "camvid"):
        return (_membranes if name == "isbi2012" else _streets)()
    if name in room.names("images"):
        return _canvases(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        known = ", ".join(["isbi2012", "camvid", *room.names("images")])
        raise UserError(
            f"There is no data '{name}': name {known}, or a folder that holds the folders images and masks."
        )
    return _own(folder)


# ------------------------------------------------------------------------------------------------------------ canvases


def _canvases(name: str) -> Scenes:
    """Nine cells of a canvas, each with a digit or none, at a random place of its cell; always the same ones."""
    images = room.images(name, SIDE)
    if len(images.spec.mean) != 1:
        raise UserError(
            f"--data {name} is in colour; canvases are made of grey images: digits, mnist, fashion_mnist, kmnist"
        )
    splits = (images.train, images.validation, images.test)
    parts = [draw(split.x, split.y, count, seed) for seed, (split, count) in enumerate(zip(splits, SCENES))]
    return _assembled(
        name, parts, ("background", *images.spec.classes), f"{images.source}; on canvases drawn by etude", segments=True
    )


def draw(x: Tensor, y: Tensor, count: int, seed: int) -> Part:
    """`count` canvases (1, 64, 64) from images (N, 1, 16, 16) with labels (N,): ink ≥ 128 has class 1 + label.

    Ink below 64 is background, class 0, and the rim between is void. Three of four cells hold an image.
    """
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.zeros(count, CANVAS, CANVAS, dtype=torch.uint8)
    mask = torch.zeros(count, CANVAS, CANVAS, dtype=torch.uint8)
    chosen = torch.randint(len(y), (count, 9), generator=generator)
    places = torch.randint(CELL - SIDE + 1, (count, 9, 2), generator=generator).tolist()
    held = (torch.rand(count, 9, generator=generator) < 0.75).tolist()
    ink = x[:, 0]
    labels = torch.where(ink >= 128, 1 + y[:, None, None], torch.where(ink < 64, 0, VOID)).to(torch.uint8)
    for scene in range(count):
        for cell, index in enumerate(chosen[scene].tolist()):
            if held[scene][cell]:
                down, across = places[scene][cell]
                top, left = 1 + CELL * (cell // 3) + down, 1 + CELL * (cell % 3) + across
                canvas[scene, top : top + SIDE, left : left + SIDE] = ink[index]
                mask[scene, top : top + SIDE, left : left + SIDE] = labels[index]
    return Part(list(canvas[:, None]), list(mask))


# --------------------------------------------------------------------------------------------------------- known sets


def _membranes() -> Scenes:
    """The 30 labelled slices: 0-19 train, 20-23 validate, 24-29 test (neighbouring slices look alike, so in blocks)."""
    folder = _known("isbi2012", "train/image/0.png")
    pairs = [_pair(folder / f"train/image/{i}.png", folder / f"train/label/{i}.png", 1) for i in range(30)]
    pairs = [(x, (y > 127).astype(np.uint8)) for x, y in pairs]
    parts = [_part(pairs[start:end]) for start, end in ((0, 20), (20, 24), (24, 30))]
    source = f"{folder} (slices 0-19, 20-23, 24-29: the challenge's own test labels are not public)"
    return _assembled("isbi2012", parts, ("membrane", "cell"), source, segments=True)


def _streets() -> Scenes:
    folder = _known("camvid", "CamVid/train.txt") / "CamVid"
    parts = []
    for split in ("train", "val", "test"):
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").split("\n")
        rows = [[word.split("CamVid/")[-1] for word in line.split()] for line in lines if line.strip()]
        pairs = [_pair(folder / image, folder / mask, 3) for image, mask in rows]
        parts.append(_part([(x, np.where(y < len(STREETS), y, VOID).astype(np.uint8)) for x, y in pairs]))
    return _assembled("camvid", parts, STREETS, str(folder), segments=False)


def _known(name: str, file: str) -> Path:
    folder = room.home() / name
    if not (folder / file).is_file():
        raise UserError(
            f"The data {name} are not here ({folder / file} is missing): put them there, or set ETUDE_DATA to the folder "
            f"that holds {name}/."
        )
    return folder


# ------------------------------------------------------------------------------------------------------------- folders


def _own(folder: Path) -> Scenes:
    """FOLDER/images and FOLDER/masks, paired by the file name's stem; FOLDER/classes.txt may name the classes.

    A fifth of the pictures test, a tenth validate, those whose hashed names come first. A mask is grey or has a
    palette; masks that hold only 0 and 255 (or are of one bit) have the classes background and object.
    """
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder} has no folder {part}: it takes images/NAME.png and masks/NAME.png for every picture."
            )
    images, masks = (
        {path.stem: path for path in sorted((folder / part).iterdir()) if path.suffix.lower() in ENDINGS}
        for part in ("images", "masks")
    )
    if lonely := sorted(images.keys() ^ masks.keys()):
        here, there = ("images", "masks") if lonely[0] in images else ("masks", "images")
        raise UserError(
            f"{folder / here} has '{lonely[0]}', and {folder / there} has not: every picture needs one mask."
        )
    if len(images) < 3:
        raise UserError(
            f"{folder} has {len(images)} pictures: at least three are needed, to learn, to validate and to test."
        )
    grey = all(_grey(path) for path in images.values())
    pairs = {name: _pair(path, masks[name], 1 if grey else 3) for name, path in images.items()}
    found = sorted(set().union(*(np.unique(mask).tolist() for _, mask in pairs.values())))
    if len(set(found) - {VOID}) < 2 and set(found) != {0, VOID}:
        raise UserError(
            f"{folder / 'masks'} holds the number {found[0]} alone: with one class there is nothing to learn."
        )
    if set(found) == {0, VOID}:
        pairs = {name: (x, (y == VOID).astype(np.uint8)) for name, (x, y) in pairs.items()}
        found = [0, 1]
    count = max(2, max((label for label in found if label != VOID), default=0) + 1)
    names = tuple(f"class {label}" for label in range(count)) if count > 2 else ("background", "object")
    if (folder / "classes.txt").is_file():
        lines = texts.read(folder / "classes.txt", "name a class on each line").split("\n")
        names = tuple(name.strip() for name in lines if name.strip())
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{folder / 'classes.txt'} names '{twice[0]}' twice: give each class a name of its own.")
        if len(names) < count:
            raise UserError(
                f"{folder / 'classes.txt'} names {len(names)} classes, and the masks hold {count - 1}: name each."
            )
    ranked = sorted(pairs, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest())
    tests, held = max(1, len(ranked) // 5), max(1, len(ranked) // 10)
    order = (ranked[tests + held :], ranked[tests : tests + held], ranked[:tests])
    source = f"{folder} ({tests} of {len(ranked)} pictures for testing, {held} for validation)"
    parts = [_part([pairs[name] for name in sorted(names_)]) for names_ in order]
    return _assembled(str(folder), parts, names, source, segments=len(names) == 2)


def load(path: Path, channels: int) -> np.ndarray:
    """A picture of any size, upright, grey or RGB: uint8 (C, H, W). Raises UserError naming the file."""
    return picture(path, (channels, *_size(path)))


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    if not path.is_file():
        raise UserError(f"The image {path} {'is no file' if path.exists() else 'does not exist'}: name a picture.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
            width, height = image.size[::-1] if turned else image.size
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"The image {path} cannot be read ({error}): repair or remove it.") from error
    return height, width


def _grey(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in ("1", "L", "LA", "I", "F", "I;16")
    except Exception as error:
        raise UserError(f"The image {path} cannot be read ({error}): repair or remove it.") from error


def _pair(image: Path, mask: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (C, H, W) and its mask uint8 (H, W), the numbers as they are stored."""
    from PIL import Image

    x = load(image, channels)
    _size(mask)
    with Image.open(mask, formats=FORMATS) as opened:
        if opened.mode not in ("1", "L", "P"):
            raise UserError(
                f"The mask {mask} is {opened.mode}: a mask has one channel of 8 bits that holds class numbers, 255 for void."
            )
        if opened.format == "JPEG":
            raise UserError(f"The mask {mask} is a JPEG, which does not keep class numbers: save it as PNG.")
        try:
            y = np.asarray(opened).astype(np.uint8) * (VOID if opened.mode == "1" else 1)
        except Exception as error:  # as in _size
            raise UserError(f"The image {mask} cannot be read ({error}): repair or remove it.") from error
    if y.shape != x.shape[1:]:
        raise UserError(
            f"{mask} is {y.shape[1]}×{y.shape[0]} pixels, and its picture {x.shape[2]}×{x.shape[1]}: make them equal."
        )
    return x, y


def _part(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Part:
    return Part([torch.tensor(x) for x, _ in pairs], [torch.tensor(y) for _, y in pairs])


def _assembled(name: str, parts: Sequence[Part], classes: tuple[str, ...], source: str, segments: bool) -> Scenes:
    """Mean and deviation are those of the training pictures, every pixel alike."""
    strip = torch.cat([x.flatten(1) for x in parts[0].x], 1)[None, :, None]
    mean, std = moments(strip.numpy())
    spec = Spec((len(mean),), classes, mean, std, {"segments": segments})
    train, validation, test = parts
    return Scenes(name, train, validation, test, spec, source)
