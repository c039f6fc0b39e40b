"""Omniglot: a small archive written here, damage, and the counts of the real one."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from etude import data
from etude.core.errors import UserError
from etude.data import omniglot

CHARACTERS = [("Greek", 1), ("Greek", 2), ("Latin", 1)]


def drawing(seed: int) -> np.ndarray:
    """Ink (True) on paper, 105 × 105."""
    return np.random.default_rng(seed).random((105, 105)) < 0.1


def png(ink: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def members() -> dict[str, bytes]:
    found, seed = {}, 0
    for alphabet, character in reversed(CHARACTERS):  # not the order of the result
        for drawer in range(1, 21):
            seed += 1
            found[f"images_background/{alphabet}/character{character:02d}/{seed // 20:04d}_{drawer:02d}.png"] = png(
                drawing(seed)
            )
    return found


def build(path, content: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_background/", b"")
        for name, bytes_ in content.items():
            archive.writestr(name, bytes_)
    return path


def test_every_drawing_at_its_place(tmp_path):
    path = build(tmp_path / "a.zip", members())
    read = omniglot.read(path, 3, hashlib.sha256(path.read_bytes()).hexdigest(), None, "")
    assert read.official
    assert read.x.shape == (3, 20, 105, 105)
    assert read.alphabets == ("Greek", "Greek", "Latin")
    assert read.names == ("Greek/character01", "Greek/character02", "Latin/character01")
    for row, first in ((2, 1), (1, 21), (0, 41)):  # Latin was written first
        for drawer in range(20):
            np.testing.assert_array_equal(read.x[row, drawer], np.where(drawing(first + drawer), 255, 0))
    assert not omniglot.read(path, 3, "0" * 64, None, "").official


def test_reduced_while_reading(tmp_path):
    path = build(tmp_path / "a.zip", members())
    small, large = (omniglot.read(path, 3, "", size, "").x for size in (21, None))
    assert small.shape == (3, 20, 21, 21)
    blocks = large.reshape(3, 20, 21, 5, 21, 5).mean((3, 5))
    error = np.abs(blocks[..., 1:-1, 1:-1] - small[..., 1:-1, 1:-1])
    # a triangle of twice the width is not the 5 × 5 mean, but close to it, and keeps the amount of ink
    assert error.mean() < 20
    assert abs(float(small.mean()) - float(large.mean())) < 1


def test_memory_for_the_array_is_used_once(tmp_path):
    path = build(tmp_path / "a.zip", members())
    packed = path.stat().st_size
    for size in (None, 21):
        omniglot.read(path, 3, "", size, "")
        tracemalloc.start()
        bytes_ = omniglot.read(path, 3, "", size, "").x.nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * bytes_ + 3 * packed + 200_000  # so reduced drawings never cost the large originals


def test_damage_is_named(tmp_path):
    good, path = members(), tmp_path / "a.zip"
    names = list(good)

    def fails(content, message, characters=3):
        build(path, content)
        with pytest.raises(UserError, match=message):
            omniglot.read(path, characters, "", None, "fetch it")

    fails(good, r"a\.zip holds 3 characters, not 4: fetch it\.", 4)
    fails({name: good[name] for name in names[1:]}, r"holds 19 of 20 drawings of Latin/character01")
    fails({**good, names[3]: good[names[3]][:60]}, rf"holds '{names[3]}', which cannot be decoded")
    fails({**good, names[3]: png(np.zeros((105, 104), bool))}, rf"holds '{names[3]}' of 104×105 pixels")
    fails({**good, "images_background/Greek/notes.txt": b"x"}, "notes.txt', which is no Omniglot drawing")
    fails({**good, names[0].replace("_01.png", "_21.png"): b""}, "which is no Omniglot drawing")
    fails({**good, "../up.png": b""}, r"'\.\./up\.png', which points outside")
    whole = build(path, good).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.zip is a damaged zip archive"):
        omniglot.read(path, 3, "", None, "")
    position = whole.index(good[names[5]]) + 50
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(UserError, match=rf"damaged at '{names[5]}' .*CRC"):
        omniglot.read(path, 3, "", None, "")


def test_validation_has_alphabets_of_its_own():
    names = [f"alphabet {k:02d}" for k in range(30)]
    of = tuple(name for name in reversed(names) for _ in range(3))
    held = omniglot.validating(of)
    assert {alphabet for alphabet, chosen in zip(of, held) if chosen} == {names[k] for k in (5, 11, 17, 23, 29)}
    assert sum(held) == 15


def test_real_counts(real):
    """964 characters of 30 alphabets and 659 of 20 others, 20 drawings each (Lake et al. 2015)."""
    real("omniglot/images_evaluation.zip")
    read = data.characters("omniglot", size=14)
    assert read.background.x.shape == (964, 20, 14, 14)
    assert read.evaluation.x.shape == (659, 20, 14, 14)
    assert len(set(read.background.alphabets)) == 30
    assert len(set(read.evaluation.alphabets)) == 20
    assert not set(read.background.alphabets) & set(read.evaluation.alphabets)
    assert len(set(read.background.names)) == len(read.background) == 964
    ink = read.background.x.float().mean() / 255
    assert 0.03 < ink < 0.15  # ink is bright and rare: strokes on empty paper
    of, held = read.background.alphabets, omniglot.validating(read.background.alphabets)
    assert sum(held) == 158
    chosen = {alphabet for alphabet, validates in zip(of, held) if validates}
    assert chosen == {
        "Balinese",
        "Early_Aramaic",
        "Inuktitut_(Canadian_Aboriginal_Syllabics)",
        "Mkhedruli_(Georgian)",
        "Tifinagh",
    }
    assert not chosen & {alphabet for alphabet, validates in zip(of, held) if not validates}
