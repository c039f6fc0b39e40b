"""Read Omniglot's two zip archives: members `<set>/<alphabet>/characterNN/XXXX_DD.png`, DD the drawer 01 to 20.

Each archive is read whole (9 MB), hashed, and its images are decoded in memory; nothing is unpacked to disk. Archives
whose checksum is not the official one are read when all characters and drawers are there (every zip member carries a
CRC-32), and the result says that they differ.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etude.core.errors import UserError
from etude.data.archives import zip_files
from etude.data.stream import Reader

DRAWERS = 20
"""Drawings of every character, one by each of twenty people."""
SIDE = 105
"""Height and width of the original drawings."""


@dataclass(frozen=True, eq=False)
class Archive:
    """One decoded archive: `x` (characters, 20, side, side) uint8 with ink 255, the alphabet and name of each."""

    x: np.ndarray
    alphabets: tuple[str, ...]
    names: tuple[str, ...]
    official: bool


def validating(alphabets: tuple[str, ...]) -> list[bool]:
    """Which of the background characters validate: those of every sixth alphabet in alphabetical order.

    These are 158 of the 964 characters, of 5 of the 30 alphabets; so training, validation and test share no alphabet.
    """
    chosen = sorted(set(alphabets))[5::6]
    return [alphabet in chosen for alphabet in alphabets]


def read(path: Path, characters: int, sha256: str, size: int | None, remedy: str) -> Archive:
    """Decode the archive at `path`, which must hold exactly `characters` characters × 20 drawings.

    With `size`, each drawing is reduced to size × size (area-weighted bilinear). Raises `UserError` when the archive is
    missing, damaged, holds a broken or wrongly sized image (named), members that point outside, or another set.
    """
    from PIL import Image

    with Reader(path, remedy) as reader:
        content = reader.read(1 << 30)
        digest = reader.finish()
    side = size or SIDE
    names, files = zip_files(path, content, remedy)
    places: dict[str, tuple[tuple[str, str], int]] = {}
    for name in names:
        match = re.fullmatch(r"[^/]+/([^/]+)/(character\d\d)/\d{4}_(\d\d)\.png", name)
        if match is None or not 1 <= int(match[3]) <= DRAWERS:
            raise UserError(f"{path} holds '{name}', which is no Omniglot drawing: {remedy}.")
        places[name] = (match[1], match[2]), int(match[3]) - 1
    drawn = Counter(key for key, _ in set(places.values()))
    keys = {key: row for row, key in enumerate(sorted(drawn))}
    if len(keys) != characters:
        raise UserError(f"{path} holds {len(keys):,} characters, not {characters:,}: {remedy}.")
    if short := [key for key in keys if drawn[key] != DRAWERS]:
        raise UserError(f"{path} holds {drawn[short[0]]} of {DRAWERS} drawings of {'/'.join(short[0])}: {remedy}.")
    x = np.empty((characters, DRAWERS, side, side), np.uint8)
    for name, data in files:
        key, drawer = places[name]
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                grey = image.convert("L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} holds '{name}', which cannot be decoded ({error}): {remedy}.") from error
        if grey.size != (SIDE, SIDE):
            raise UserError(f"{path} holds '{name}' of {grey.width}×{grey.height} pixels: {remedy}.")
        if side != SIDE:
            grey = grey.resize((side, side), Image.Resampling.BILINEAR)
        np.bitwise_not(np.asarray(grey), out=x[keys[key], drawer])
    return Archive(x, tuple(key[0] for key in keys), tuple("/".join(key) for key in keys), digest == sha256)
