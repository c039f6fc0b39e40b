"""Read CIFAR-10: the official binary archive, unpacked batches (whole or cut short), and a lossy JPEG copy.

Binary format (Krizhevsky, cs.toronto.edu/~kriz/cifar.html): records of 3,073 bytes, one label and then 1,024 red,
1,024 green and 1,024 blue values in rows. The number of records follows from the size.

The archive is read in one streaming pass and never unpacked to disk; images and labels are split from a buffer of
256 records, so the arrays exist once.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import IO

import numpy as np

from etude.core.errors import UserError
from etude.data.archives import tar_files
from etude.data.registry import CIFAR
from etude.data.stream import Reader

RECORD = 3073
"""Bytes of one record."""
PER_BATCH = 10000
"""Records of one official batch."""
ARCHIVE, FOLDER, JPEG = "cifar-10-binary.tar.gz", "cifar-10-batches-bin", "cifar-10-images-jpeg-q75.tar.gz"
BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6)) + ("test_batch.bin",)
_CHUNK = 256

Arrays = tuple[np.ndarray, np.ndarray]
"""uint8 images (N, 3, 32, 32) and uint8 labels (N,)."""


def unpacked(folder: Path) -> dict[str, Path]:
    """Return which of the six batches lie unpacked (or each gzipped by itself) below `folder`: name → path."""
    found = {}
    for name in BATCHES:
        for path in (folder / FOLDER / name, folder / FOLDER / f"{name}.gz"):
            if path.exists() and name not in found:
                found[name] = path
    return found


def batch(path: Path, x: np.ndarray, y: np.ndarray, remedy: str) -> int:
    """Read one `.bin` or `.bin.gz` file into the front of x and y; return the number of records it holds.

    Raises `UserError` when the file is empty, breaks off inside a record, holds more records than x has room for, or a
    label above 9.
    """
    with Reader(path, remedy) as reader:
        count = _records(reader, reader, x, y)
        reader.finish()
    if not count:
        raise reader.fail("is empty")
    return count


def _records(source: Reader | IO[bytes], reader: Reader, x: np.ndarray, y: np.ndarray) -> int:
    """Fill x and y with consecutive records until `source` ends or they are full; return how many."""
    filled = 0
    while filled < len(y):
        content = source.read(min(_CHUNK, len(y) - filled) * RECORD)
        count, rest = divmod(len(content), RECORD)
        if rest:
            raise reader.fail(f"is truncated, it breaks off inside record {filled + count:,}")
        if not count:
            break
        rows = np.frombuffer(content, np.uint8).reshape(count, RECORD)
        if rows[:, 0].max() >= len(CIFAR):
            raise reader.fail(f"holds the label {rows[:, 0].max()} near record {filled:,}, only 0 to 9 exist")
        y[filled : filled + count] = rows[:, 0]
        x[filled : filled + count] = rows[:, 1:].reshape(count, 3, 32, 32)
        filled += count
    return filled


def _space(count: int) -> Arrays:
    return np.empty((count, 3, 32, 32), np.uint8), np.empty(count, np.uint8)


def archive(path: Path, sha256: str, remedy: str) -> tuple[Arrays, Arrays]:
    """Read (train, test) from the official archive in one pass, checksum included.

    Raises `UserError` when a batch is missing or not 10,000 records long, on a wrong checksum, on a damaged archive,
    and on members that point outside their folder.
    """
    x, y = _space(60000)
    seen = set()
    with Reader(path, remedy) as reader:
        for name, size, member in tar_files(reader):
            stem = name.removeprefix("./").removeprefix(f"{FOLDER}/")
            if stem not in BATCHES:
                continue
            if size != PER_BATCH * RECORD or stem in seen:
                raise reader.fail(f"holds {name} of {size:,} bytes, expected one of {PER_BATCH * RECORD:,}")
            seen.add(stem)
            at = slice(BATCHES.index(stem) * PER_BATCH, (BATCHES.index(stem) + 1) * PER_BATCH)
            if _records(member, reader, x[at], y[at]) != PER_BATCH:
                raise reader.fail(f"is truncated inside {name}")
        digest = reader.finish(exact=False)
        if digest != sha256:
            raise reader.fail(f"has the wrong checksum (SHA-256 {digest[:12]}…, expected {sha256[:12]}…)")
        if missing := [name for name in BATCHES if name not in seen]:
            raise reader.fail(f"does not hold {missing[0]}")
    return (x[:50000], y[:50000]), (x[50000:], y[50000:])


def official(folder: Path, sha256: str, remedy: str) -> tuple[Arrays, Arrays, str]:
    """Read the whole official set, (train, test, source): from the archive, else from six whole unpacked batches.

    Raises `UserError` that lists what is missing, and points to the lossy or partial copy when one is there.
    """
    if (folder / ARCHIVE).exists():
        return *archive(folder / ARCHIVE, sha256, remedy), str(folder / ARCHIVE)
    found = unpacked(folder)
    instead = ""
    if found:
        instead = "; what is there can be used as --data cifar10_partial"
    if (folder / JPEG).exists():
        instead += f"{' or' if instead else ';'} the lossy copy {JPEG} as --data cifar10_jpeg"
    if missing := [name for name in BATCHES if name not in found]:
        raise UserError(
            f"cifar10 needs {ARCHIVE} in {folder}, or all six unpacked batches in its {FOLDER}, "
            f"where {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {remedy}{instead}."
        )
    x, y = _space(60000)
    for position, name in enumerate(BATCHES):
        at = slice(position * PER_BATCH, (position + 1) * PER_BATCH)
        count = batch(found[name], x[at], y[at], remedy)
        if count != PER_BATCH:
            raise UserError(f"{found[name]} holds {count:,} of {PER_BATCH:,} records: {remedy}{instead}.")
    source = f"{folder / FOLDER} (unpacked; no checksum is published for single batches)"
    return (x[:50000], y[:50000]), (x[50000:], y[50000:]), source


def partial(folder: Path, remedy: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Read every unpacked training batch that is there, however short: images, labels, source.

    Raises `UserError` when there is none.
    """
    found = {name: path for name, path in unpacked(folder).items() if name != "test_batch.bin"}
    if not found:
        raise UserError(f"cifar10_partial needs at least one unpacked data_batch_N.bin in {folder / FOLDER}: {remedy}.")
    x, y = _space(PER_BATCH * len(found))  # memory that stays unused is never touched, and given back below
    total, parts = 0, []
    for path in found.values():
        count = batch(path, x[total : total + PER_BATCH], y[total : total + PER_BATCH], remedy)
        parts.append(f"{path.name} ({count:,} of {PER_BATCH:,} records)")
        total += count
    x.resize((total, 3, 32, 32), refcheck=False)
    y.resize(total, refcheck=False)
    return x, y, f"{folder / FOLDER}: {', '.join(parts)}"


def jpeg(path: Path, remedy: str) -> tuple[Arrays, Arrays]:
    """Read the lossy archive, members `train/<class>/NNNN.jpg` and `test/<class>/NNNN.jpg`: (train, test).

    The result is ordered by number and then class, so every prefix is balanced. Raises `UserError` when an image is
    broken (it is named) or not 32×32, or when the archive does not hold 5,000 + 1,000 images of each class.
    """
    from PIL import Image

    if not path.exists():
        raise UserError(f"cifar10_jpeg needs {path.name} in {path.parent}, which is not there: {remedy}.")
    splits = {
        "train": (np.empty((50000, 3, 32, 32), np.uint8), 5000),
        "test": (np.empty((10000, 3, 32, 32), np.uint8), 1000),
    }
    filled = {name: np.zeros(count * len(CIFAR), bool) for name, (_, count) in splits.items()}
    with Reader(path, remedy) as reader:
        for name, _, member in tar_files(reader):
            match = re.fullmatch(r"(?:\./)?(train|test)/([a-z]+)/(\d{4})\.jpe?g", name)
            if match is None or match[2] not in CIFAR or int(match[3]) >= splits[match[1]][1]:
                raise reader.fail(f"holds '{name}', which is no image of CIFAR-10")
            try:
                with Image.open(io.BytesIO(member.read()), formats=("JPEG",)) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise reader.fail(f"holds '{name}', which cannot be decoded ({error})") from error
            if pixels.shape != (32, 32, 3):
                raise reader.fail(f"holds '{name}' of {pixels.shape[1]}×{pixels.shape[0]} pixels, not 32×32")
            place = int(match[3]) * len(CIFAR) + CIFAR.index(match[2])
            splits[match[1]][0][place] = pixels.transpose(2, 0, 1)
            filled[match[1]][place] = True
        reader.finish(exact=False)
    for name, done in filled.items():
        if not done.all():
            raise UserError(f"{path} lacks {int((~done).sum()):,} of {len(done):,} {name} images: {remedy}.")
    labels = {name: np.tile(np.arange(len(CIFAR), dtype=np.uint8), count) for name, (_, count) in splits.items()}
    return (splits["train"][0], labels["train"]), (splits["test"][0], labels["test"])
