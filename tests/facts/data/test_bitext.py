"""Parallel text: the official files of Multi30k, folders of the user's own, and what is refused."""

from __future__ import annotations

import gzip

import pytest

from etude import data
from etude.core.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """write(name, lines) puts a file into a folder, packed when its name ends in .gz."""

    def write(name, lines):
        content = "".join(line + "\n" for line in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
        return tmp_path

    return write


@pytest.mark.parametrize(("target", "first"), [("de", "Zwei junge weiße Männer"), ("fr", "Deux jeunes hommes blancs")])
def test_multi30k_is_read_line_by_line(real, target, first):
    real("multi30k/train.en.gz")
    pairs = data.parallel("multi30k", ("en", target))
    assert [len(part) for part in (pairs.train, pairs.validation, pairs.test)] == [29000, 1014, 1000]
    assert pairs.train[0][0] == "Two young, White males are outside near many bushes."
    assert pairs.train[0][1].startswith(first)
    turned = data.parallel("multi30k", (target, "en"))
    assert [(b, a) for a, b in turned.test] == pairs.test
    assert pairs.about()["pairs"] == {"train": 29000, "validation": 1014, "test": 1000}
    assert {row["state"] for row in data.check("multi30k")} == {"official"}


def test_other_bytes_are_no_multi30k(empty_home):
    (empty_home / "multi30k").mkdir()
    with pytest.raises(UserError, match=r"train.en.gz is not there: run `etude data get multi30k`"):
        data.parallel("multi30k")
    (empty_home / "multi30k" / "train.en.gz").write_bytes(gzip.compress(b"One line.\n"))
    with pytest.raises(UserError, match=r"train.en.gz has the wrong checksum"):
        data.parallel("multi30k")
    assert {row["state"] for row in data.check("multi30k")} == {"damaged", "missing"}
    with pytest.raises(UserError, match="multi30k has no language 'it': choose from de, en, fr"):
        data.parallel("multi30k", ("en", "it"))


def test_a_folder_with_three_parts(folder):
    for part, count in (("train", 5), ("dev", 2), ("test", 3)):
        folder(f"{part}.xx", [f"{part} {i}" for i in range(count)])
        home = folder(f"{part}.yy.gz", [f"{part.upper()} {i}" for i in range(count)])
    pairs = data.parallel(home, ("xx", "yy"))
    assert pairs.train == [(f"train {i}", f"TRAIN {i}") for i in range(5)]
    assert pairs.validation == [(f"dev {i}", f"DEV {i}") for i in range(2)]
    assert pairs.test == [(f"test {i}", f"TEST {i}") for i in range(3)]


def test_a_folder_with_one_file_a_language_is_cut(folder):
    folder("talk.xx", [f"a{i}" for i in range(40)])
    pairs = data.parallel(folder("speech.yy", [f"b{i}" for i in range(40)]), ("xx", "yy"))
    assert pairs.train == [(f"a{i}", f"b{i}") for i in range(36)]
    assert pairs.validation == [("a36", "b36"), ("a37", "b37")]
    assert pairs.test == [("a38", "b38"), ("a39", "b39")]


def test_pairs_with_an_empty_side_are_left_out(folder):
    folder("talk.xx", ["a", "", "b", " ", "c", *"defghijklmnopqrstu"])
    pairs = data.parallel(folder("talk.yy", ["A", "B", "", "C", "D ", *"DEFGHIJKLMNOPQRSTU"]), ("xx", "yy"))
    assert pairs.train[:3] == [("a", "A"), ("c", "D"), ("d", "D")]


def test_what_is_no_parallel_text_is_refused(folder, tmp_path):
    home = folder("talk.xx", ["a"] * 30)
    with pytest.raises(UserError, match="has no file of the language yy: a folder of parallel text has train.xx"):
        data.parallel(home, ("xx", "yy"))
    folder("talk.yy", ["b"] * 29)
    with pytest.raises(UserError, match=r"talk.xx has 30 lines and .*talk.yy 29: each line must translate"):
        data.parallel(home, ("xx", "yy"))
    folder("more.yy", ["b"] * 30)
    with pytest.raises(UserError, match="has 2 files of the language yy"):
        data.parallel(home, ("xx", "yy"))
    for name in ("train.uu", "train.vv", "val.uu", "val.vv"):
        folder(name, ["c"] * 3)
    with pytest.raises(UserError, match=r"/test\.uu"):
        data.parallel(home, ("uu", "vv"))
    for name in ("train.uu", "train.vv", "val.uu", "val.vv"):
        (home / name).unlink()
    folder("few.uu", ["b"] * 3)
    folder("few.vv", ["b"] * 3)
    with pytest.raises(UserError, match=r"few.uu has 3 lines: at least 20"):
        data.parallel(home, ("uu", "vv"))
    with pytest.raises(UserError, match="must be two languages"):
        data.parallel(home, ("xx", "xx"))
    with pytest.raises(UserError, match="is a file, but parallel text is a folder"):
        data.parallel(home / "talk.xx", ("xx", "yy"))
    with pytest.raises(UserError, match="There is no dataset 'multi3k'; did you mean 'multi30k'"):
        data.parallel("multi3k")
    with pytest.raises(UserError, match="mnist holds images, not parallel: choose from multi30k"):
        data.parallel("mnist")
