"""What a reader returns: images or characters as tensors, a text, or pairs of sentences, with what a network must know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.core.errors import UserError
from etude.core.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VALIDATION = 0.1
"""Share of the training images that is held back for validation where the data bring no validation split."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a labelled set."""

    x: Tensor
    """Images, uint8 (N, C, H, W), 0 to 255."""
    y: Tensor
    """Labels, int64 (N,), indices into the class names."""

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled set of images. `spec` holds the shape, class names and the training split's mean and deviation."""

    name: str
    train: Split
    validation: Split
    """For curves, early stopping and every other choice; cut from the training images unless the data bring their own."""
    test: Split
    """Scored once, at the end; no choice looks at it."""
    spec: Spec
    source: str
    """Where it was read from and, when it is not the official set, in what it differs."""

    def about(self) -> dict[str, Any]:
        """What a report says of it: name, source, and the images of each split, in all and by class."""
        splits = {}
        for name in ("train", "validation", "test"):
            y = getattr(self, name).y
            counts = y.bincount(minlength=len(self.spec.classes)).tolist()
            splits[name] = {"images": len(y), "by class": dict(zip(self.spec.classes, counts))}
        return {"name": self.name, "source": self.source, "splits": splits}


@dataclass(frozen=True)
class Text:
    """A text and where it was read from."""

    text: str
    name: str
    source: str = ""

    def about(self) -> dict[str, Any]:
        """What a report says of it: name, source and length."""
        return {"name": self.name, "source": self.source, "characters": len(self.text)}


@dataclass(frozen=True)
class Parallel:
    """Sentences and their translations, (source, target), in three parts, and where they were read from."""

    name: str
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    test: list[tuple[str, str]]
    languages: tuple[str, str]
    source: str = ""

    def about(self) -> dict[str, Any]:
        """What a report says of it: name, source, languages, and the pairs of each part."""
        counts = {part: len(getattr(self, part)) for part in ("train", "validation", "test")}
        return {"name": self.name, "source": self.source, "languages": list(self.languages), "pairs": counts}


@dataclass(frozen=True, eq=False)
class CharacterSet:
    """Drawings of characters by class."""

    x: Tensor
    """uint8 (classes, 20, H, W), ink 255 on 0."""
    alphabets: tuple[str, ...]
    """The alphabet of every class, (classes,)."""
    names: tuple[str, ...]
    """`alphabet/characterNN` of every class, (classes,)."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Characters:
    """A few-shot set: `background` classes to learn from, `evaluation` classes (other alphabets) to be tested on."""

    name: str
    background: CharacterSet
    evaluation: CharacterSet
    source: str


def assemble(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    size: int | None,
    source: str,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> Images:
    """Wrap uint8 arrays (N, C, H, W) and integer labels (N,) as tensors; mean and deviation are the training split's.

    Without `validation`, a tenth of the training images is cut off for it by `held_back`: the same images in every run,
    whatever its seed.
    """
    import numpy as np
    import torch

    if validation is None:
        if len(train[1]) < 2:
            raise UserError(f"{source} has one training image: at least two are needed, one of them for validation.")
        (x, y), (kept, held) = train, held_back(train[1])
        train, validation = (x[kept], y[kept]), (x[held], y[held])
    if size is not None:
        train, validation, test = ((resized(x, size), y) for x, y in (train, validation, test))
    mean, std = moments(train[0])
    parts = (
        Split(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64, copy=False)))
        for x, y in (train, validation, test)
    )
    return Images(name, *parts, Spec(tuple(train[0].shape[1:]), classes, mean, std), source)


def held_back(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices of training labels as (training, validation): a stratified tenth, at least one, validates."""
    return stratified(labels, max(1, round(VALIDATION * len(labels))), seed=1)


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices of `labels` in two, sorted, `count` of them in the second part, classes in proportion.

    Each class gives floor(count · share) and the classes with the largest remainders give one more, so the total is
    exact. Within a class the members with the smallest keys of a Philox stream are chosen: equal on every machine.
    """
    import numpy as np

    keys = np.random.Philox(key=seed).random_raw(len(labels))
    kinds, counts = np.unique(labels, return_counts=True)
    exact = counts * (count / len(labels))
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: count - quota.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for kind, share in zip(kinds, quota):
        members = np.flatnonzero(labels == kind)
        chosen[members[np.argsort(keys[members], kind="stable")[:share]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def moments(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W) in [0, 1] units, to six decimals.

    A constant channel gets the deviation 1, so that dividing by it is harmless. Works in blocks of a few MiB.
    """
    import numpy as np

    count, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
    total, square = np.zeros(channels), np.zeros(channels)
    block = max(1, (1 << 16) // math.prod(x.shape[1:]))
    for start in range(0, len(x), block):
        for channel in range(channels):
            values = x[start : start + block, channel].astype(np.float32).reshape(-1)
            total[channel] += values.sum(dtype=np.float64)
            square[channel] += float(np.dot(values, values))
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
    return (
        tuple(round(float(value) / 255, 6) for value in mean),
        tuple(round(float(value) / 255, 6) if value > 1e-3 else 1.0 for value in deviation),
    )


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, C, H, W) to (N, C, size, size): bilinear, averaging when it shrinks, rounded; x itself if it fits."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    if size < 1:
        raise UserError(f"The image size must be at least 1 pixel, not {size}.")
    if x.shape[2:] == (size, size):
        return x
    out = np.empty((*x.shape[:2], size, size), np.uint8)
    for start in range(0, len(x), 512):
        block = torch.from_numpy(x[start : start + 512]).float()
        block = F.interpolate(block, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out[start : start + 512] = block.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out
