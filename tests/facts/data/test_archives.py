"""Archives: members that point outside their folder are refused, zip and tar alike, and damage is named."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile

import pytest

from etude.core.errors import UserError
from etude.data.archives import tar_files, zip_files
from etude.data.stream import Reader

OUTSIDE = [
    "/etc/passwd",
    "../up.png",
    "a/../../up.png",
    "a/..",
    "C:\\x.png",
    "\\x.png",
    "..\\x.png",
    "a\\..\\..\\x",
    "C:x",
]


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def walk_tar(path):
    with Reader(path) as reader:
        found = [(name, size, member.read()) for name, size, member in tar_files(reader)]
        reader.finish(exact=False)
    return found


def make_zip(members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members:
            archive.writestr(member, content)
    return buffer.getvalue()


def walk_zip(path, content):
    return list(zip_files(path, content, "fetch it")[1])


def test_good_archives_pass(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    path = make_tar(tmp_path / "a.tgz", [(folder, b""), ("a/x..png", b"one"), ("./b", b"")])
    assert walk_tar(path) == [("a/x..png", 3, b"one"), ("./b", 0, b"")]
    content = make_zip([("a/", b""), ("a/x..png", b"one"), ("b", b"two")])
    assert walk_zip(tmp_path / "a.zip", content) == [("a/x..png", b"one"), ("b", b"two")]
    assert zip_files(tmp_path / "a.zip", content, "")[0] == ["a/x..png", "b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_members_outside_are_refused(tmp_path, name):
    path = make_tar(tmp_path / "a.tgz", [("good", b"1"), (name, b"2")])
    with pytest.raises(UserError, match=r"a\.tgz holds the member .* points outside"):
        walk_tar(path)
    info = zipfile.ZipInfo("x")
    info.filename = name
    with pytest.raises(UserError, match=r"a\.zip holds the member .* points outside"):
        walk_zip(tmp_path / "a.zip", make_zip([("good", b"1"), (info, b"2")]))


@pytest.mark.parametrize(
    ("kind", "word"),
    [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link"), (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "device")],
)
def test_links_and_devices_are_refused(tmp_path, kind, word):
    info = tarfile.TarInfo("inside")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match=f"'inside', which is a {word}"):
        walk_tar(make_tar(tmp_path / "a.tgz", [(info, b"")]))
    entry = zipfile.ZipInfo("inside")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(UserError, match="'inside', which is a link"):
        walk_zip(tmp_path / "a.zip", make_zip([(entry, b"/etc/passwd")]))


def test_all_names_are_checked_before_a_zip_member_is_read(tmp_path):
    with pytest.raises(UserError, match="points outside"):
        zip_files(tmp_path / "a.zip", make_zip([("good", b"1"), ("../bad", b"2")]), "")


def test_damage_is_named(tmp_path):
    path = make_tar(tmp_path / "a.tgz", [(f"f{i}", bytes(range(256)) * 40) for i in range(20)])
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tgz"):
            walk_tar(path)
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"text\.tar is a damaged tar archive"):
        walk_tar(tmp_path / "text.tar")
    content = make_zip([(f"f{i}", bytes(range(256)) * 4) for i in range(5)])
    for length in range(0, len(content) - 1, 11):
        with pytest.raises(UserError, match=r"a\.zip is a damaged zip"):
            walk_zip(tmp_path / "a.zip", content[:length])
    noticed = 0
    for position in range(0, len(content), 3):
        try:
            walk_zip(
                tmp_path / "a.zip", content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
            )
        except UserError:
            noticed += 1
    assert noticed > 20  # and nothing but UserError ever came out


def test_a_tar_with_flipped_bytes_gives_files_or_a_user_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"12345"))
    whole, noticed = (tmp_path / "a.tar").read_bytes(), 0
    for position in range(0, 1600, 3):
        for bits in (0x01, 0x80):
            damaged = whole[:position] + bytes([whole[position] ^ bits]) + whole[position + 1 :]
            (tmp_path / "b.tar").write_bytes(damaged)
            try:
                walk_tar(tmp_path / "b.tar")
            except UserError:
                noticed += 1
    assert noticed > 100  # and nothing but UserError ever came out


def test_a_bomb_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds 'big' of 2,097,152 bytes"):
        walk_zip(tmp_path / "a.zip", make_zip([("big", bytes(1 << 21))]))
