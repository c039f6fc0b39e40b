"""Word vectors in the two file formats of word2vec, which gensim and others read and write.

Text: a line "V D", then one line a word: the word and D numbers. Binary: the line "V D", then a word after the other: the word in
UTF-8, a space, D little-endian float32, a newline.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError

__all__ = ["read_vectors", "write_vectors"]


def write_vectors(path: Path, words: list[str], vectors: Tensor, binary: bool = False) -> None:
    """Write vectors (V, D) float32 of words without spaces; text keeps every bit of them (the shortest decimal form)."""
    values = np.ascontiguousarray(vectors.detach().cpu().numpy(), dtype="<f4")
    with path.open("wb") as file:
        file.write(f"{values.shape[0]} {values.shape[1]}\n".encode())
        for word, row in zip(words, values, strict=True):
            numbers = (
                row.tobytes() if binary else " ".join(np.format_float_positional(x, trim="0") for x in row).encode()
            )
            file.write(word.encode() + b" " + numbers + b"\n")


def read_vectors(path: Path | str, binary: bool = False) -> tuple[list[str], Tensor]:
    """(words, vectors (V, D) float32) of a file in word2vec's text or binary format. Raises UserError for any other."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    first, _, rest = content.partition(b"\n")
    try:
        count, width = (int(number) for number in first.split())
        if count < 0 or width < 1:
            raise ValueError(first)
        words, rows = (_binary if binary else _text)(rest, count, width)
        vectors = np.array(rows, np.float32).reshape(count, width)
        return words, torch.from_numpy(vectors)
    except (ValueError, IndexError) as error:
        other = "text" if binary else "binary"
        raise UserError(
            f"{path} is no whole file of word vectors in word2vec's {'binary' if binary else 'text'} format ({error}); "
            f"is it {other}?"
        ) from error


def _text(rest: bytes, count: int, width: int) -> tuple[list[str], list[list[float]]]:
    lines = [line.rstrip().split(" ") for line in rest.decode("utf-8").split("\n") if line.strip()]
    if len(lines) != count or any(len(line) != width + 1 for line in lines):
        raise ValueError(f"not {count} lines of a word and {width} numbers")
    return [line[0] for line in lines], [[float(number) for number in line[1:]] for line in lines]


def _binary(rest: bytes, count: int, width: int) -> tuple[list[str], list[np.ndarray]]:
    words, rows, at = [], [], 0
    for _ in range(count):
        space = rest.index(b" ", at)
        words.append(rest[at:space].lstrip(b"\n").decode("utf-8"))
        at = space + 1 + 4 * width
        if at > len(rest):
            raise ValueError("it ends too early")
        rows.append(np.frombuffer(rest, "<f4", width, space + 1))
    if rest[at:].strip(b"\n") or len(set(words)) < count:
        raise ValueError("it holds something else")
    return words, rows
