"""Read a plain or gzip file once, front to back: hash the stored bytes, unpack straight into the caller's array.

The file is never held whole, neither packed nor unpacked; the only buffers are one packed block (64 KiB) and one
unpacked block (256 KiB). The checksum therefore costs no second pass, and memory for the data is used once.
"""

from __future__ import annotations

import hashlib
import stat
import zlib
from pathlib import Path
from types import TracebackType

from etude.core.errors import UserError
from etude.core.folder import kind_of

_PACKED, _UNPACKED = 1 << 16, 1 << 18
_GZIP = b"\x1f\x8b"


class Reader:
    """The unpacked bytes of `path`, in order. `remedy` ends every error sentence (what the user should do).

    Raises `UserError` when the file cannot be opened, is no regular file, is not whole, or is damaged.
    """

    def __init__(self, path: Path | str, remedy: str = "put a whole copy of the file there") -> None:
        self.path, self.remedy = Path(path), remedy
        self.count = 0
        self._hash = hashlib.sha256()
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
                raise UserError(f"{self.path} is {kind_of(status.st_mode)}, not a file: {remedy}.")
            self._file = self.path.open("rb")
            self._size = status.st_size
            head = self._file.read(len(_GZIP))
            self._file.seek(0)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not there: {remedy}.") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}): {remedy}.") from error
        self._gzip = zlib.decompressobj(31) if head == _GZIP else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def most(self) -> int:
        """No file of this size can unpack to more bytes than this (deflate shrinks at most 1032 times)."""
        return self._size if self._gzip is None else self._size * 1032

    def fail(self, what: str) -> UserError:
        """The error to raise: file, what is wrong with it, what to do."""
        return UserError(f"{self.path} {what}: {self.remedy}.")

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file."""
        pieces = []
        while size > 0 and (piece := self._next(size)):
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, view: memoryview) -> None:
        """Fill the byte view; the file must have that many bytes left."""
        done = 0
        while done < len(view):
            piece = self._next(len(view) - done)
            if not piece:
                raise self.fail(f"is truncated, {len(view) - done:,} bytes are missing")
            view[done : done + len(piece)] = piece
            done += len(piece)

    def finish(self, exact: bool = True) -> str:
        """Read to the end and return the SHA-256 of the stored bytes; with `exact`, nothing may be left unpacked."""
        left = 0
        while piece := self._next(_UNPACKED):
            left += len(piece)
        if exact and left:
            raise self.fail(f"has {left:,} bytes too many")
        return self._hash.hexdigest()

    def _packed(self) -> bytes:
        try:
            block = self._file.read(_PACKED)
        except OSError as error:
            raise self.fail(f"cannot be read ({error.strerror or error})") from error
        self._hash.update(block)
        return block

    def _next(self, most: int) -> bytes:
        """The next 1 to `most` bytes, or b"" at the end."""
        most = min(most, _UNPACKED)
        if self._gzip is None:
            try:
                piece = self._file.read(most)
            except OSError as error:
                raise self.fail(f"cannot be read ({error.strerror or error})") from error
            self._hash.update(piece)
        else:
            piece = self._unpack(most)
        self.count += len(piece)
        return piece

    def _unpack(self, most: int) -> bytes:
        while True:
            assert self._gzip is not None
            if self._gzip.eof:  # a gzip file may hold several members in a row
                rest = self._gzip.unused_data or self._packed()
                if not rest:
                    return b""
                self._gzip = zlib.decompressobj(31)
            else:
                rest = self._gzip.unconsumed_tail or self._packed()
                if not rest:
                    raise self.fail(f"is truncated, its gzip stream breaks off after {self.count:,} unpacked bytes")
            try:
                piece = self._gzip.decompress(rest, most)
            except zlib.error as error:
                raise self.fail(f"is damaged, its gzip stream cannot be unpacked ({error})") from error
            if piece:
                return piece
