"""The table, the names, where the data lie, and that none of it costs an import of torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from etude import data
from etude.core.errors import UserError
from etude.data.registry import DATASETS


def test_the_table_is_sound():
    names = [dataset.name for dataset in DATASETS]
    assert len(set(names)) == len(names)
    assert names == data.names()
    for dataset in DATASETS:
        assert dataset.title
        assert dataset.licence
        assert dataset.citation
        assert dataset.home.startswith("http")
        for file in dataset.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.url.startswith("https://")
            assert file.url.endswith("/" + file.path)
            assert file.bytes > 1000
            assert file.published
    digests = [file.sha256 for dataset in DATASETS for file in dataset.files]
    assert len(set(digests)) == len(digests) == 4 * 3 + 1 + 2 + 9 + 1


def test_names_by_kind():
    assert data.names("characters") == ["omniglot"]
    assert data.names("text") == ["tiny_shakespeare", "house_text"]
    assert {"digits", "mnist", "fashion_mnist", "kmnist", "cifar10"} <= set(data.names("images"))


def test_importing_and_listing_costs_neither_torch_nor_numpy():
    code = (
        "import sys, etude.data as d; d.catalogue(); d.names(); d.home();"
        "print([m for m in ('torch', 'numpy', 'PIL', 'sklearn', 'pooch', 'requests') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_catalogue_can_be_written_as_json(empty_home):
    rows = {row["name"]: row for row in json.loads(json.dumps(data.catalogue()))}
    assert rows["digits"]["state"] == rows["house_text"]["state"] == "bundled"
    assert rows["mnist"]["state"] == rows["cifar10"]["state"] == rows["omniglot"]["state"] == "missing"
    assert rows["mnist"]["bytes"] == 11594722
    assert rows["mnist"]["folder"] == str(empty_home / "mnist")


def test_state_follows_the_files(empty_home):
    def state():
        return next(row["state"] for row in data.catalogue() if row["name"] == "omniglot")

    folder = empty_home / "omniglot"
    folder.mkdir()
    assert state() == "missing"
    (folder / "images_background.zip").write_bytes(b"x")
    assert state() == "partly"
    (folder / "images_evaluation.zip").write_bytes(b"x")
    assert state() == "other"
    for name, size in (("images_background.zip", 9464212), ("images_evaluation.zip", 6462886)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    assert state() == "here"


def test_home_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path))
    assert data.home() == tmp_path
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("ETUDE_DATA")
        else:
            monkeypatch.setenv("ETUDE_DATA", value)
        assert data.home().parts[-3:] == (".cache", "etude", "data")
        assert data.home().is_absolute()
    monkeypatch.setenv("ETUDE_DATA", "~/somewhere")
    assert "~" not in str(data.home())


def test_a_variable_that_points_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path / "nowhere"))
    for read in (lambda: data.images("mnist"), data.characters, lambda: data.text("tiny_shakespeare"), data.check):
        with pytest.raises(UserError, match=r"ETUDE_DATA is set to .*nowhere, which does not exist: correct it"):
            read()
    assert len(data.images("digits").train) == 1293  # bundled data need no folder
    assert data.check("digits")[0]["state"] == "bundled"
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(UserError, match="which is a file"):
        data.images("mnist")


def test_a_missing_dataset_says_what_to_run(empty_home):
    with pytest.raises(UserError, match=r"mnist/train-images-idx3-ubyte.gz is not there: run `etude data get mnist`"):
        data.images("mnist")
    with pytest.raises(UserError, match=r"images_background.zip is not there: run `etude data get omniglot`"):
        data.characters()
    with pytest.raises(UserError, match=r"input.txt is not there: run `etude data get tiny_shakespeare`"):
        data.text("tiny_shakespeare")
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz in .*run `etude data get cifar10`"):
        data.images("cifar10")
    with pytest.raises(UserError, match=r"cifar10_jpeg needs cifar-10-images-jpeg-q75.tar.gz"):
        data.images("cifar10_jpeg")
    with pytest.raises(UserError, match=r"cifar10_partial needs at least one unpacked data_batch_N.bin"):
        data.images("cifar10_partial")
    assert {row["state"] for row in data.check(["mnist", "omniglot", "cifar10", "cifar10_jpeg"])} == {"missing"}
    assert {row["dataset"] for row in data.check()} == {"digits", "house_text"}  # what is there


@pytest.mark.parametrize(
    ("name", "close"),
    [("mnits", "mnist"), ("fashionmnist", "fashion_mnist"), ("cifar", "cifar10"), ("digit", "digits")],
)
def test_an_unknown_name_brings_the_nearest_one(name, close):
    for call in (data.images, data.get, data.check):
        with pytest.raises(
            UserError, match=rf"There is no dataset '{name}'; did you mean '{close}'\? Known: digits, mnist"
        ):
            call(name)


def test_names_that_resemble_nothing():
    for name in ("zzzzzzzzzz", "", "\0", "n" * 5000):
        with pytest.raises(UserError, match="There is no dataset"):
            data.images(name)
    for name in ("./no", "no/no", "~/no-such-folder-here", "/no"):
        with pytest.raises(UserError, match=r"The path .* does not exist: name a dataset"):
            data.images(name)


def test_a_dataset_of_another_kind():
    with pytest.raises(UserError, match="mnist holds images, not text: choose from tiny_shakespeare, house_text"):
        data.text("mnist")
    with pytest.raises(UserError, match="tiny_shakespeare holds text, not images: choose from digits"):
        data.images("tiny_shakespeare")
    with pytest.raises(UserError, match="digits holds images, not characters: choose from omniglot"):
        data.characters("digits")
