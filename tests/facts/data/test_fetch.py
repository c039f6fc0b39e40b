"""Downloads from a server on this machine: good, wrong, cut short, too long, refused; nothing half-written stays."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import threading
import time
import urllib.parse

import pytest

from etude import data
from etude.core.errors import UserError
from etude.data import fetch
from etude.data.registry import Dataset, File

CONTENT = random.Random(0).randbytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """The path's first word says how to misbehave."""

    def do_GET(self):
        kind = urllib.parse.urlsplit(self.path).path.split("/")[1]
        body = {
            "wrong": CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]),
            "long": CONTENT + bytes(100_000),
            "short": CONTENT[:1000],
        }.get(kind, CONTENT)
        if kind == "missing":
            self.send_error(404)
            return
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", self.path.replace("moved", "good"))
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) if kind == "cut" else len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def made():
    digest = hashlib.sha256(CONTENT).hexdigest()
    file = File("part/set.bin", "https://example.invalid/set.bin", len(CONTENT), digest)
    return Dataset("made", "A set", "images", 0, 0, (), (), "https://example.invalid", "none", "none", files=(file,))


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["good", "moved"])
def test_a_good_download_lands_under_its_name(tmp_path, server, made, kind):
    seen = []
    rows = fetch.get(made, tmp_path, f"{server}/{kind}", lambda *what: seen.append(what))
    assert rows == [{"dataset": "made", "file": "part/set.bin", "state": "official", "detail": "downloaded"}]
    assert (tmp_path / "part" / "set.bin").read_bytes() == CONTENT
    assert left(tmp_path) == ["set.bin"]
    assert seen[-1] == ("part/set.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert fetch.get(made, tmp_path, f"{server}/missing", None)[0]["detail"] == "already there"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wrong", "sent a file with the wrong checksum"),
        ("cut", "could not be downloaded .*the connection broke off|broke off after 150,000 of 300,000"),
        ("short", "broke off after 1,000 of 300,000 bytes"),
        ("long", "sends more than the 300,000 bytes"),
        ("missing", "could not be downloaded .*the server answered 404"),
    ],
)
def test_a_bad_download_leaves_nothing_and_spares_what_was_there(tmp_path, server, made, kind, message):
    target = tmp_path / "part" / "set.bin"
    for before in (None, b"old"):
        if before is not None:
            target.write_bytes(before)
        with pytest.raises(UserError, match=message) as error:
            fetch.get(made, tmp_path, f"{server}/{kind}", None)
        assert "\n" not in str(error.value)
        assert left(tmp_path) == ([] if before is None else ["set.bin"])
        assert before is None or target.read_bytes() == before


def test_other_bytes_are_replaced(tmp_path, server, made):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "set.bin").write_bytes(bytes(len(CONTENT)))
    assert fetch.get(made, tmp_path, f"{server}/good", None)[0]["detail"] == "replaced what was there"
    assert (tmp_path / "part" / "set.bin").read_bytes() == CONTENT


def test_an_interrupt_leaves_nothing(tmp_path, server, made):
    def stop(name, done, total):
        if done > 100_000:
            assert [path for path in left(tmp_path) if path.endswith(".part")]  # it is under way, under another name
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.get(made, tmp_path, f"{server}/good", stop)
    assert left(tmp_path) == []


def test_parts_of_a_killed_process_are_swept_after_an_hour(tmp_path, server, made):
    (tmp_path / "part").mkdir()
    old, young = (tmp_path / "part" / f"set.bin.{number}.part" for number in (1, 2))
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    fetch.get(made, tmp_path, f"{server}/good", None)
    assert left(tmp_path) == ["set.bin", "set.bin.2.part"]


@pytest.mark.parametrize(
    "base", ["http://example.com", "ftp://example.com", "file:///tmp", "http://127.0.0.1.evil.org"]
)
def test_only_https_unless_on_this_machine(tmp_path, made, base):
    with pytest.raises(UserError, match="is not an https address"):
        fetch.get(made, tmp_path, base, None)


def test_no_server_and_no_place(tmp_path, made):
    with pytest.raises(UserError, match=r"could not be downloaded \(no connection\), nothing was kept: try again"):
        fetch.get(made, tmp_path, "http://127.0.0.1:9", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch.get(made, tmp_path / "file", "http://127.0.0.1:9", None)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, server, made, monkeypatch):
    def full(self, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch._Part, "write", full)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\): make room"):
        fetch.get(made, tmp_path, f"{server}/good", None)
    assert left(tmp_path) == []


def test_the_public_door(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path / "new" / "home"))
    with pytest.raises(UserError, match=r"/good/tiny_shakespeare/input.txt (broke off|sent a file)"):
        data.get("tiny_shakespeare", base=f"{server}/good")
    assert (tmp_path / "new" / "home" / "tiny_shakespeare").is_dir()  # the folder was created on the way
    assert data.get("digits") == [
        {
            "dataset": "digits",
            "file": "",
            "state": "bundled",
            "detail": "comes with an installed package, nothing to fetch",
        }
    ]
    with pytest.raises(UserError, match=r"cifar10_jpeg cannot be downloaded: .*`etude data get cifar10`"):
        data.get(["cifar10_jpeg"])


def test_real_files_from_a_mirror(real, tmp_path, monkeypatch):
    """The official labels through a mirror laid out as ETUDE_DATA, then checked and read."""
    source = real("tiny_shakespeare/input.txt").parent.parent

    class Mirror(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(source))

        def log_message(self, *words):
            pass

    monkeypatch.setenv("ETUDE_DATA", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        data.get("tiny_shakespeare", base=f"http://127.0.0.1:{running.server_address[1]}")
        running.shutdown()
        thread.join()
    assert data.check("tiny_shakespeare")[0]["state"] == "official"
    assert len(data.text("tiny_shakespeare").text) == 1115394
