"""Read text: a bundled passage, tiny Shakespeare, or any UTF-8 text file of the user's."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from etude.core.errors import UserError
from etude.data.stream import Reader

MOST = 1 << 28
"""The longest text that is read, in unpacked bytes (256 MiB): a small gzip file can unpack to a thousand times its size."""


def house() -> str:
    """The bundled passage, the opening of Shakespeare's Coriolanus."""
    return (resources.files("etude.data") / "house_text.txt").read_text(encoding="utf-8")


def read(path: Path, remedy: str, sha256: str | None = None) -> str:
    """Return the text of a UTF-8 file, plain or gzip; line ends become "\\n" and a byte-order mark is dropped.

    Raises `UserError` when the file is missing, empty, not UTF-8 (the offset is named), longer than `MOST` bytes, no
    regular file, or has a wrong checksum.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a text file: name one file.")
    with Reader(path, remedy) as reader:
        pieces = []
        while piece := reader.read(1 << 20):
            pieces.append(piece)
            if reader.count > MOST:
                raise UserError(
                    f"{path} holds more than {MOST >> 20} MiB of text, the most that is read: name a part of it."
                )
        digest = reader.finish()
        if sha256 is not None and digest != sha256:
            raise reader.fail(f"has the wrong checksum (SHA-256 {digest[:12]}…, expected {sha256[:12]}…)")
    content = b"".join(pieces)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} holds no text: name a file that does.")
    return text


def split(text: str) -> tuple[str, str, str]:
    """(training, validation, test): the first 90 % of the characters, the next 5 % and the last 5 %."""
    first, second = len(text) * 9 // 10, len(text) * 19 // 20
    return text[:first], text[first:second], text[second:]
