"""Texts: where they are cut, how much is read, and what is no file."""

from __future__ import annotations

import gzip
import os
import threading

import pytest

from etude import data
from etude.core.errors import UserError
from etude.data import texts
from etude.data.stream import Reader


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 19, 20, 1000, 29951, 1115394])
def test_split_shares_nothing_and_loses_nothing(count):
    text = "".join(chr(32 + i % 90) for i in range(count))
    parts = texts.split(text)
    assert "".join(parts) == text
    assert len(parts[0]) == int(0.9 * count + 1e-9)
    assert abs(len(parts[1]) - len(parts[2])) <= 1
    assert count < 11 or all(parts)


@pytest.mark.parametrize("packed", [True, False])
def test_no_more_than_the_limit_is_read(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST", 1 << 20)
    read = []
    monkeypatch.setattr(Reader, "_next", lambda self, most, of=Reader._next: read.append(most) or of(self, most))
    path = tmp_path / "long.txt"
    whole = b"ab " * (1 << 22)
    path.write_bytes(gzip.compress(whole, 1) if packed else whole)
    with pytest.raises(UserError, match=r"long.txt holds more than 1 MiB of text, the most that is read: name a part"):
        data.text(path)
    assert len(read) < 20  # of 12 MiB, in pieces of 256 KiB at most
    path.write_bytes(gzip.compress(whole[: 1 << 20]))
    assert len(data.text(path).text) == 1 << 20


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []

    def look():
        for path in (pipe, "/dev/zero", "/dev/null"):
            try:
                data.text(path)
            except UserError as error:
                found.append(str(error))

    waiting = threading.Thread(target=look, daemon=True)  # opening a pipe that nobody writes to would never return
    waiting.start()
    waiting.join(20)
    assert [sentence.split(":")[0] for sentence in found] == [
        f"{pipe} is a pipe, not a file",
        "/dev/zero is a device, not a file",
        "/dev/null is a device, not a file",
    ]
