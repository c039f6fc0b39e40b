"""A run folder may come from anyone: nothing in it is run or followed unless the user, or this machine's memory, says so."""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import shutil
import socket
import sys
from pathlib import Path

import pytest

import etude as package
from etude.core import trust
from etude.core.errors import UserError

WORDS = ("--quiet", "--steps", "6", "--save-every", "3")
OPENED = ("resume", "show", "sample")
EVIL = "from pathlib import Path\nPath({mark!r}).touch()\n"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The memory of this machine, empty at first."""
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stranger(etude, tmp_path) -> Path:
    """A run of an own file as it comes from another machine, stopped half-way; loading it touches `mark`."""
    mine = tmp_path / "mine.py"
    text = Path(etude.piece).read_text(encoding="utf-8")
    where = text.index("import os")
    mine.write_text(text[:where] + EVIL.format(mark=str(tmp_path / "mark")) + text[where:], encoding="utf-8")
    done = etude("run", mine, "--out", tmp_path / "run", *WORDS, ETUDE_CACHE=str(tmp_path / "elsewhere"))
    assert (done.code, done.err) == (0, "")
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "mark").unlink()
    mine.unlink()
    return tmp_path / "run"


def test_a_kept_source_is_run_only_when_it_is_trusted(etude, tmp_path, cache, stranger) -> None:
    digest = hashlib.sha256((stranger / "source.py").read_bytes()).hexdigest()
    for words in (("resume", stranger), ("predict", stranger, "x.png")):
        said = etude.refused(*words, ETUDE_CACHE=str(cache))
        assert said.startswith(f"the method file {stranger / 'source.py'} (")
        assert digest[:16] in said
        assert "would be run, and this machine has not run it before" in said
        assert "--trust" in said
    assert etude("show", stranger, "--no-open", ETUDE_CACHE=str(cache)).code == 0  # which runs nothing
    for verb in (package.load, package.resume):
        with pytest.raises(UserError, match=r"would be run.*trust=True"):
            verb(stranger)
    assert not (tmp_path / "mark").exists()
    assert not cache.exists()
    assert package.load(stranger, trust=True).step == 6
    assert (tmp_path / "mark").exists()
    assert trust.remembered() == {digest}
    assert (cache / "trusted").stat().st_mode & 0o777 == 0o600
    assert etude("resume", stranger, ETUDE_CACHE=str(cache)).code == 0  # it is remembered now
    # another source is another matter, whoever wrote its digest into config.json
    (stranger / "done").unlink()
    with (stranger / "source.py").open("a") as file:
        file.write("# changed\n")
    assert "is not the source this run was made with" in etude.refused("resume", stranger, ETUDE_CACHE=str(cache))
    described = json.loads((stranger / "config.json").read_text())
    described["source"]["sha256"] = hashlib.sha256((stranger / "source.py").read_bytes()).hexdigest()
    (stranger / "config.json").write_text(json.dumps(described))
    assert "has not run it before" in etude.refused("resume", stranger, ETUDE_CACHE=str(cache))
    assert etude("resume", stranger, "--trust", ETUDE_CACHE=str(cache)).code == 0


@pytest.mark.parametrize("place", ["evil.py", "run/evil.py", "folder"])
def test_config_json_that_names_a_file(etude, tmp_path, cache, stranger, place) -> None:
    """The way it could be done before sources were kept: `method` is a path."""
    evil = tmp_path / place / "train.py" if place == "folder" else tmp_path / place
    evil.parent.mkdir(exist_ok=True)
    shutil.copyfile(stranger / "source.py", evil)
    described = json.loads((stranger / "config.json").read_text()) | {"source": {}}
    described["method"] = str(tmp_path / place)
    (stranger / "config.json").write_text(json.dumps(described))
    for words in (("resume", stranger), ("predict", stranger, "x.png")):
        said = etude.refused(*words, ETUDE_CACHE=str(cache))
        assert f"{tmp_path / place} (" in said
        assert "would be run" in said
    assert not (tmp_path / "mark").exists()
    assert etude("resume", stranger, "--trust", ETUDE_CACHE=str(cache)).code == 0


def test_a_compiled_file_beside_the_source_is_not_run(etude, tmp_path, stranger) -> None:
    """Python itself would take `__pycache__` for the source, whatever stands in it."""
    evil = tmp_path / "evil.py"
    evil.write_text(EVIL.format(mark=str(tmp_path / "worse")))
    (stranger / "__pycache__").mkdir()
    py_compile.compile(
        str(evil),
        cfile=str(stranger / "__pycache__" / f"source.{sys.implementation.cache_tag}.pyc"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    assert etude("resume", stranger, "--trust").code == 0
    assert (tmp_path / "mark").exists()
    assert not (tmp_path / "worse").exists()


def test_a_setting_that_names_code(etude, tmp_path, cache) -> None:
    """A game in a file, too, is run by `etude run` and not by whoever opens the run afterwards."""
    game = tmp_path / "game.py"
    game.write_text("from etude.games.parts.rules import Kuhn as Mine\n")
    words = ("run", "games/cfr", "--preset", "tiny", "--quiet", "--game", f"{game}:Mine", "--out", tmp_path / "run")
    assert etude(*words, ETUDE_CACHE=str(tmp_path / "elsewhere")).code == 0
    (tmp_path / "run" / "done").unlink()
    assert "game.py" in etude.refused("resume", tmp_path / "run", ETUDE_CACHE=str(cache))
    assert "game.py" in etude.refused("sample", tmp_path / "run", ETUDE_CACHE=str(cache))
    assert etude("resume", tmp_path / "run", ETUDE_CACHE=str(tmp_path / "elsewhere")).code == 0
    assert etude("sample", tmp_path / "run", "--trust", ETUDE_CACHE=str(cache)).code == 0


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def plain(etude, tmp_path) -> Path:
    """A stopped run of a method of the catalogue."""
    words = ("run", "vision/lenet", "--preset", "tiny", "--quiet", "--steps", "4", "--out", tmp_path / "run")
    assert etude(*words).code == 0
    (tmp_path / "run" / "done").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "environment.json",
        "spec.json",
        "result.json",
        "config.json",
        "artifacts/index.json",
        "checkpoints",
    ],
)
def test_a_link_is_not_followed_outside(etude, tmp_path, plain, name) -> None:
    outside = tmp_path / "outside"
    (plain / name).rename(outside)
    before = outside.read_bytes() if outside.is_file() else sorted(outside.rglob("*"))
    (plain / name).symlink_to(outside)
    for verb in OPENED:
        said = etude.refused(verb, plain)
        assert said.startswith(f"{plain / name} is a link to {outside}, outside the run folder, and is not followed")
    with pytest.raises(UserError, match="is not followed"):
        package.load(plain)
    assert before == (outside.read_bytes() if outside.is_file() else sorted(outside.rglob("*")))
    (plain / name).unlink()
    outside.rename(plain / "elsewhere")
    (plain / name).symlink_to(plain / "elsewhere")  # inside is the run's own business
    assert etude("show", plain, "--no-open").code == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "result.json", "failed"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "loop"])
def test_what_is_no_file_is_refused_without_waiting(etude, plain, name, kind) -> None:
    (plain / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(plain / name)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(plain)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
        os.chdir(here)
    else:
        (plain / name).symlink_to(name)
    for verb in OPENED:
        said = etude.refused(verb, plain)
        assert str(plain) in said


def test_pipes_and_devices_as_input(etude, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.py")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        said = etude.refused("run", "language/gpt", "--preset", "tiny", "--data", place)
        assert said.startswith(f"{place} is a {'pipe' if 'pipe' in place.name else 'device'}, not a file")
    assert "there is no file" in etude.refused("run", tmp_path / "pipe.py")
    assert etude.refused("run", "language/gpt", "--threads", "100000").startswith(
        "--threads is 100000; it must be a whole number between 0 and 512"
    )


# ----------------------------------------------------------------------------------------------------------- own files


def test_own_methods_have_their_own_name_and_no_evidence_but_their_own(etude, tmp_path) -> None:
    assert etude("copy", "vision/lenet", "lenet.py").code == 0
    shown = json.loads(etude("info", "./lenet.py", "--json").out)
    assert (shown["name"], shown["badge"], shown["card"], shown["experiments"]) == ("mine/lenet", "unproved", None, [])
    assert etude("run", "./lenet.py", "--preset", "tiny", "--quiet").code == 0
    (folder,) = (tmp_path / "runs" / "mine" / "lenet").iterdir()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "etude verify" not in page
    assert "clears the bar" not in page
    assert "verified" not in page


@pytest.mark.parametrize("method", ["language/gpt", "meta/maml", "basics/backprop"])
def test_a_method_of_several_files_is_copied_whole_or_alone(etude, tmp_path, method) -> None:
    stem = method.rpartition("/")[2]
    alone = etude("copy", method, "alone.py")
    assert alone.code == 0
    assert f"etude copy {method} FOLDER" in alone.err
    done = etude("copy", method, stem)
    assert (done.code, done.err) == (0, "")
    assert f"from etude.{method.replace('/', '.')}" not in "".join(
        p.read_text() for p in (tmp_path / stem).glob("*.py")
    )
    words = done.out.split("next: etude ")[1].split()
    assert etude(*words, "--quiet", "--out", "whole").code == 0
    assert etude("run", "./alone.py", "--preset", "tiny", "--quiet", "--out", "single").code == 0
    whole, single = tmp_path / "whole", tmp_path / "single"
    assert (whole / "metrics.jsonl").read_bytes() == (single / "metrics.jsonl").read_bytes()
    assert {path.name for path in (whole / "source").iterdir()} == {
        path.name for path in (tmp_path / stem).glob("*.py")
    }
    shutil.rmtree(tmp_path / stem)
    (whole / "done").unlink()
    assert etude("resume", whole).code == 0
    changed = whole / "source" / "train.py"
    changed.write_text(changed.read_text() + "\n")
    assert "is not the source this run was made with" in etude.refused("sample", whole)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x = 1\ndef broken(:\n", "SyntaxError in mine.py, line 2: invalid syntax in 'def broken(:'"),
        ("from .beside import x\n", "a method with files beside it is copied as a folder: etude copy METHOD FOLDER"),
        ("import math\nmath.nonsuch\n", "AttributeError: module 'math' has no attribute 'nonsuch' (line 2)"),
    ],
)
def test_what_is_wrong_with_an_own_file_is_said_with_its_line(etude, tmp_path, text, part) -> None:
    mine = tmp_path / "mine.py"
    own = Path(etude.piece).read_text(encoding="utf-8").replace("from __future__ import annotations\n", "")
    mine.write_text(text + own, encoding="utf-8")
    said = etude.refused("run", mine)
    assert said.startswith(f"{mine} cannot be imported: ")
    assert said.endswith(part)
    mine.write_text(own + "\n\ndef later(:\n", encoding="utf-8")
    assert f"line {own.count(chr(10)) + 3}: invalid syntax" in etude.refused("run", mine)


def test_python_uses_the_kept_source(tmp_path, monkeypatch, cache) -> None:
    """Two sources of one name side by side: each run is built by its own."""
    monkeypatch.chdir(tmp_path)
    text = Path(__file__).with_name("piece.py").read_text(encoding="utf-8")
    mine = tmp_path / "mine.py"
    folders = []
    for width in (8, 5):
        mine.write_text(text.replace("(8,)", f"({width},)"), encoding="utf-8")
        folders.append(package.run("./mine.py", steps=3, quiet=True, out=f"width {width}").folder)
    mine.unlink()
    for width, folder in zip((8, 5), folders):
        loaded = package.load(folder)
        assert loaded.model[0].weight.shape == (width, 4)
        assert loaded.name == "mine/mine"
    assert len(trust.remembered()) == 2
