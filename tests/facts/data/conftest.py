"""Shared by the tests of the data room: an empty data folder, the real one, and writers of the official formats."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def write_idx():
    """write(path, array) writes an IDX file, gzip-compressed when the name ends in .gz."""

    def write(path: Path, array: np.ndarray) -> Path:
        content = idx_bytes(array)
        path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
        return path

    return write


@pytest.fixture
def empty_home(tmp_path, monkeypatch) -> Path:
    """An existing, empty ETUDE_DATA."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("ETUDE_DATA", str(folder))
    return folder


@pytest.fixture
def real():
    """real("mnist/train-images-idx3-ubyte.gz") → that path below ETUDE_DATA, or the test is skipped."""

    def find(relative: str) -> Path:
        if not os.environ.get("ETUDE_DATA"):
            pytest.skip("ETUDE_DATA is not set, so the real files cannot be read")
        path = Path(os.environ["ETUDE_DATA"]).expanduser() / relative
        if not path.exists():
            pytest.skip(f"{relative} is not in ETUDE_DATA")
        return path

    return find
