"""Images with captions: the spelled names of their classes, or a folder of images with a file of captions; captions as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from etude import data
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data import folders, texts
from etude.data.sets import moments

__all__ = ["IGNORED", "Captioned", "Part", "Units", "Vocabulary", "read", "spelled"]

Units = Literal["characters", "words"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILES = ("captions.tsv", "captions.txt", "captions.csv")
IGNORED = -100
"""The target behind the end of a caption."""


class Part(NamedTuple):
    """Images uint8 (N, C, H, W), and the captions of each."""

    x: Tensor
    captions: list[tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Captioned:
    """Images with captions in three parts; `spec` holds shape, mean and deviation of the training images."""

    name: str
    train: Part
    validation: Part
    test: Part
    spec: Spec
    source: str

    def about(self) -> dict[str, Any]:
        """What the report says of the data."""
        parts = {name: len(getattr(self, name).x) for name in ("train", "validation", "test")}
        return {"name": self.name, "source": self.source, **parts}


def spelled(name: str) -> str:
    """The caption of a class: a digit in letters, any other name in small letters with spaces for underscores."""
    return DIGITS[int(name)] if name in map(str, range(10)) else name.lower().replace("_", " ")


def read(name: str, size: int) -> Captioned:
    """Images of size × size with captions.

    Args:
        name: a dataset of `etude.data.images` or a folder of class folders, whose classes' names are the captions; or a folder
            of images with captions.tsv, captions.txt or captions.csv: on each line a file name, then a tab or the first comma,
            then a caption. An image may have several lines. Of every ten images, in the order of their names, the ninth
            validates and the tenth is the test.
    """
    folder = Path(name).expanduser()
    file = next((folder / file for file in FILES if (folder / file).is_file()), None)
    if file is not None:
        return _own(folder, file, size)
    images = data.images(name, size)
    names = [(spelled(label),) for label in images.spec.classes]
    train, validation, test = (
        Part(part.x, [names[label] for label in part.y.tolist()])
        for part in (images.train, images.validation, images.test)
    )
    spec = Spec(images.spec.shape, (), images.spec.mean, images.spec.std)
    return Captioned(images.name, train, validation, test, spec, images.source)


def _own(folder: Path, file: Path, size: int) -> Captioned:
    found: dict[str, list[str]] = {}
    for place, line in enumerate(texts.read(file, "put the captions there").split("\n"), 1):
        mark = "\t" if "\t" in line else ","
        image, _, caption = (part.strip().strip('"') for part in line.partition(mark))
        image = image.split("#")[0]
        if not line.strip() or (place == 1 and not (folder / image).is_file()):  # a head line
            continue
        if not caption:
            raise UserError(
                f"{file}, line {place}, has no image and caption, parted by a tab or a comma: {line[:60]!r}"
            )
        if not (folder / image).is_file():
            raise UserError(f"{file}, line {place}, names the image {image}, which is not in {folder}")
        found.setdefault(image, []).append(" ".join(caption.split()))
    if len(found) < 10:
        raise UserError(f"{file} describes {len(found)} images; three parts need at least ten")
    names = sorted(found)
    x = folders._decoded([folder / image for image in names], size, folder)
    places = [[i for i in range(len(names)) if low <= i % 10 < high] for low, high in ((0, 8), (8, 9), (9, 10))]
    train, validation, test = (
        Part(torch.from_numpy(x[chosen]), [tuple(found[names[i]]) for i in chosen]) for chosen in places
    )
    mean, std = moments(x[places[0]])
    spec = Spec(tuple(x.shape[1:]), (), mean, std)
    return Captioned(folder.name, train, validation, test, spec, f"{folder} ({file.name})")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of captions; number 0 begins one, 1 ends it, 2 is any that the training part does not show."""

    tokens: tuple[str, ...]
    units: Units
    longest: int
    """Tokens of the longest training caption."""

    START, END, UNKNOWN = 0, 1, 2

    @classmethod
    def of(cls, captions: Iterable[str], units: Units) -> Vocabulary:
        parts = [cut(caption, units) for caption in captions]
        return cls(tuple(sorted({token for part in parts for token in part})), units, max(map(len, parts)))

    @property
    def size(self) -> int:
        return 3 + len(self.tokens)

    def state(self) -> dict[str, Any]:
        """JSON values from which `Vocabulary(**state)` comes back."""
        return {"tokens": list(self.tokens), "units": self.units, "longest": self.longest}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) int64: START c_1 … c_n against c_1 … c_n END, then END against IGNORED."""
        number = {token: place for place, token in enumerate(self.tokens, 3)}
        rows = [[number.get(token, self.UNKNOWN) for token in cut(caption, self.units)] for caption in captions]
        longest = max(map(len, rows))
        x = [[self.START, *row] + [self.END] * (longest - len(row)) for row in rows]
        y = [[*row, self.END] + [IGNORED] * (longest - len(row)) for row in rows]
        return torch.tensor(x), torch.tensor(y)

    def decode(self, ids: Iterable[int]) -> str:
        """The caption up to END."""
        said = []
        for number in ids:
            if number == self.END:
                break
            said.append(self.tokens[number - 3] if number > 2 else "\ufffd")
        return ("" if self.units == "characters" else " ").join(said)


def cut(caption: str, units: Units) -> list[str]:
    """Its characters, or its words."""
    return list(caption) if units == "characters" else caption.split()
