"""Walk the members of a zip or tar archive, refusing every one that could reach outside a folder.

etude never unpacks an archive to disk: members are read in memory. Refusing the dangerous ones all the same means
that an archive that passed here can also be unpacked by hand.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO

from etude.core.errors import UserError
from etude.data.stream import Reader

_LARGEST = 1 << 20
"""No member that etude reads from a zip archive is nearly as large; a decompression bomb is."""

_BROKEN = (EOFError, ValueError, OverflowError, RuntimeError, OSError, struct.error)
"""What the standard library raises on damaged archives, beside its own errors."""


def _refuse_outside(archive: Path, name: str) -> None:
    path = PureWindowsPath(name)  # also splits at '/', and knows drive letters and leading backslashes
    if not path.parts or path.drive or path.root or ".." in path.parts:
        raise UserError(
            f"{archive} holds the member '{name}', which points outside its folder: do not unpack it, "
            "get the archive from its official home."
        )


def _refuse_special(archive: Path, name: str, what: str) -> None:
    raise UserError(
        f"{archive} holds the member '{name}', which is a {what}: do not unpack it, "
        "get the archive from its official home."
    )


def tar_files(reader: Reader) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield (name, size in bytes, open file) of every regular member, in the order stored, in one pass.

    Raises `UserError` on absolute names, `..`, links and devices, and on a damaged archive.
    """
    try:
        with tarfile.open(fileobj=reader, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                _refuse_outside(reader.path, member.name)
                if member.isdir():
                    continue
                if not member.isreg():
                    _refuse_special(reader.path, member.name, "link" if member.islnk() or member.issym() else "device")
                opened = archive.extractfile(member)
                assert opened is not None
                yield member.name, member.size, opened
    except UserError:
        raise
    except (tarfile.TarError, *_BROKEN) as error:
        raise reader.fail(f"is a damaged tar archive ({error})") from error


def zip_files(path: Path, content: bytes, remedy: str) -> tuple[list[str], Iterator[tuple[str, bytes]]]:
    """Return the names of all files in the zip archive `content`, and an iterator of (name, unpacked bytes).

    All names are checked before the first file is read. Raises `UserError` on absolute names, `..`, links, members
    over 1 MiB, and on a damaged archive.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, *_BROKEN) as error:
        raise UserError(f"{path} is a damaged zip archive ({error}): {remedy}.") from error
    members = []
    for member in archive.infolist():
        _refuse_outside(path, member.filename)
        if stat.S_ISLNK(member.external_attr >> 16):
            _refuse_special(path, member.filename, "link")
        if member.file_size > _LARGEST:
            raise UserError(f"{path} holds '{member.filename}' of {member.file_size:,} bytes: {remedy}.")
        if not member.is_dir():
            members.append(member)

    def files() -> Iterator[tuple[str, bytes]]:
        for member in members:
            try:
                data = archive.read(member)
            except (zipfile.BadZipFile, zlib.error, *_BROKEN) as error:
                raise UserError(f"{path} is damaged at '{member.filename}' ({error}): {remedy}.") from error
            yield member.filename, data

    return [member.filename for member in members], files()
