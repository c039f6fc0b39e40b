"""Read the IDX format of MNIST, Fashion-MNIST and KMNIST: any rank up to 64, any of its six types, plain or gzip.

Format (LeCun, Cortes, Burges, yann.lecun.com/exdb/mnist): two zero bytes, a type code, the rank, one big-endian
uint32 a dimension, then the values in C order, big-endian.

The bytes are unpacked straight into the array that is returned and the checksum is taken of the packed bytes on the
way, so a file is read once and its array exists once.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from etude.core.errors import UserError
from etude.data.stream import Reader

_RANK = 64
"""The most dimensions that a NumPy array can have."""
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path: Path | str, sha256: str | None = None, remedy: str = "put a whole copy of the file there") -> np.ndarray:
    """Return the array in `path` in native byte order.

    With `sha256`, the stored (packed) bytes must have that digest. Raises `UserError` naming the file and `remedy`
    when the file is missing, truncated, too long, has a wrong magic number or a wrong checksum.
    """
    with Reader(path, remedy) as reader:
        magic = reader.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
            raise reader.fail(f"is not an IDX file (magic number 0x{magic.hex()})")
        kind, rank = np.dtype(_TYPES[magic[2]]), magic[3]
        if rank > _RANK:
            raise reader.fail(f"announces {rank} dimensions in its header, more than {_RANK}")
        sizes = reader.read(4 * rank)
        if len(sizes) < 4 * rank:
            raise reader.fail("is truncated inside its header")
        shape = struct.unpack(f">{rank}I", sizes)
        if math.prod(shape) * kind.itemsize > reader.most:  # a lying header must not make us allocate terabytes
            raise reader.fail(f"is truncated, its header announces {' × '.join(map(str, shape))} values")
        array = np.empty(shape, kind)
        reader.readinto(memoryview(array.reshape(-1).view(np.uint8)))
        digest = reader.finish()
        if sha256 is not None and digest != sha256:
            raise reader.fail(f"has the wrong checksum (SHA-256 {digest[:12]}…, expected {sha256[:12]}…)")
    if not kind.isnative and kind.itemsize > 1:
        array.byteswap(inplace=True)
    return array.view(kind.newbyteorder("="))


def labelled(images: Path, labels: Path, classes: int, digests: dict[str, str], remedy: str) -> tuple[np.ndarray, ...]:
    """Read one split: uint8 images (N, H, W) and uint8 labels (N,), checked against each other.

    `digests` maps file names to SHA-256; a name that is not in it is read unchecked. Raises `UserError` when counts
    differ, a label is not below `classes`, or an array has another rank or type than expected.
    """
    x = read(images, digests.get(images.name), remedy)
    y = read(labels, digests.get(labels.name), remedy)
    for path, array, rank in ((images, x, 3), (labels, y, 1)):
        if array.ndim != rank or array.dtype != np.uint8:
            raise UserError(f"{path} holds {array.ndim}-dimensional {array.dtype}, not {rank}-D uint8: {remedy}.")
    if len(x) != len(y):
        raise UserError(f"{images} holds {len(x):,} images but {labels} {len(y):,} labels: {remedy}.")
    if len(y) == 0:
        raise UserError(f"{images} holds no images: {remedy}.")
    if y.max() >= classes:
        raise UserError(f"{labels} holds the label {y.max()}, only 0 to {classes - 1} exist: {remedy}.")
    return x, y
