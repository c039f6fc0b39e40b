"""Facts about images handed over in Python: what is taken, in which units, and one sentence for what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import etude
from etude import data as room
from etude.blocks.looking.given import given, images, moments, split
from etude.core.errors import UserError
from etude.core.spec import Spec

TINY = {"preset": "tiny", "quiet": True, "threads": 1}
METHODS = ("robustness/fgsm", "insight/saliency", "insight/guided_backprop")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("ETUDE_DATA", raising=False)


class Pictures(Dataset[Any]):
    """As torchvision has them: Pillow images with numbers, and names of the classes."""

    classes = ("dark", "light")

    def __init__(self, mode: str = "L", label: Any = None) -> None:
        self.mode, self.label = mode, label

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        image = Image.new("L", (4, 4), 40 * i).convert(self.mode)
        return image, (i % 2 if self.label is None else self.label)


class Flow(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (row for row in zip(torch.rand(5, 1, 4, 4), range(5)))


X, Y = torch.rand(6, 1, 4, 4), torch.arange(6) % 2


@pytest.mark.parametrize(
    ("data", "x", "y"),
    [
        (X, X, None),
        (X[:, 0], X, None),
        ((X, Y), X, Y),
        ([X.numpy(), Y.numpy()], X, Y),
        ((X.numpy()[::-1], Y.numpy().astype(np.uint8)[::-1]), X.flip(0), Y.flip(0)),
        ((X, Y.tolist()), X, Y),
        (TensorDataset(X, Y), X, Y),
        (TensorDataset(X), X, None),
        (Subset(TensorDataset(X, Y), [3, 1]), X[[3, 1]], Y[[3, 1]]),
        (DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), X, Y),
        (((255 * X).byte(), Y), (255 * X).byte(), Y),
    ],
)
def test_what_is_taken(data: Any, x: Tensor, y: Tensor | None) -> None:
    found = given(data)
    assert torch.equal(found.x, x)
    assert found.x.dtype == x.dtype
    assert (found.y is None) == (y is None)
    assert y is None or torch.equal(found.y, y)  # type: ignore[arg-type]


def test_datasets_of_pictures_and_streams() -> None:
    found = given(Pictures())
    assert found.x.dtype == torch.uint8
    assert found.x.shape == (6, 1, 4, 4)
    assert found.x[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    assert found.y is not None
    assert found.y.tolist() == [0, 1] * 3
    assert found.classes == ("dark", "light")
    assert given(Pictures("RGB")).x.shape == (6, 3, 4, 4)
    assert given(Flow()).x.shape == (5, 1, 4, 4)


class Long(Dataset[Any]):
    def __len__(self) -> int:
        return 10**7


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"x": X}, "data is a dict object; give a name"),
        ((X, Y, Y), "data is a tuple object"),
        (X * 255, r"lie in \[.*\]; give uint8 from 0 to 255, or floats in \[0, 1\]"),
        (2 * X - 1, r"lie in \[-"),
        (X * float("nan"), r"lie in \[nan"),
        (X.long(), "are torch.int64; give uint8"),
        (X[0, 0], r"have the shape \(4, 4\)"),
        (X[:0], "N at least 1"),
        (("a", Y), "are a str object; give one tensor"),
        ((X, Y[:3]), r"labels given are torch.int64 \(3,\).*\(6,\), one an image"),
        ((X, Y.float()), "labels given are torch.float32"),
        ((X, Y - 1), "go down to -1"),
        ((X, ["a"] * 6), "holds no numbers"),
        (Long(), "has 10,000,000 items"),
        (TensorDataset(X, Y, Y), r"must all be images or all be \(image, label\) pairs"),
        (Subset(TensorDataset(X), []), "the Subset given is empty"),
        ([(X, Y)], "data is a list object"),
    ],
)
def test_what_is_refused(data: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        given(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_images_are_fitted_to_the_network() -> None:
    """Resized as `etude.data.images` resizes, in bytes and in floats; channels and labels are held against the network."""
    small, large = room.images("digits").test, room.images("digits", 28).test
    spec = Spec((1, 28, 28), tuple("0123456789"))
    assert torch.equal(images(given((small.x, small.y)), spec, 10).x, large.x)
    floats = images(given((small.x / 255, small.y)), spec, 10).x
    assert float((floats - large.x / 255).abs().max()) < 0.51 / 255
    for data, sentence in (
        (torch.rand(2, 1, 4, 5), r"are \(1, 4, 5\); the network takes \(1, 28, 28\)"),
        (torch.rand(2, 3, 28, 28), r"are \(3, 28, 28\); the network takes \(1, 28, 28\)"),
        ((torch.rand(2, 1, 28, 28), [0, 10]), "go up to 10; the network has classes 0 to 9"),
    ):
        with pytest.raises(UserError, match=sentence):
            images(given(data), spec, 10)


def test_a_fresh_network_gets_splits_of_its_own() -> None:
    """Every image is in one part; mean and deviation are the training part's."""
    x, y = torch.rand(100, 2, 3, 3), torch.arange(100) % 4
    found = split(given((x, y)), None)
    parts = [found.train, found.validation, found.test]
    assert [len(part) for part in parts] == [72, 8, 20]
    together = torch.cat([part.x for part in parts]).flatten(1)
    assert torch.equal(together.sort(0).values, x.flatten(1).sort(0).values)
    assert torch.bincount(found.test.y).tolist() == [5] * 4
    for part in parts:
        row = int((x == part.x[0]).flatten(1).all(1).nonzero()[0])
        assert int(y[row]) == int(part.y[0])
    plain = found.train.x.transpose(0, 1).flatten(1).double()
    assert found.spec.mean == pytest.approx(plain.mean(1).tolist(), rel=1e-6)
    assert found.spec.std == pytest.approx(plain.std(1, correction=0).tolist(), rel=1e-6)
    assert moments((255 * torch.ones(2, 1, 2, 2)).byte()) == ((1.0,), (1.0,))
    for data, sentence in ((x, "learns from labels"), ((x, y * 0), "two classes or more")):
        with pytest.raises(UserError, match=sentence):
            split(given(data), None)


@pytest.mark.parametrize("method", METHODS)
def test_methods_examine_what_they_are_given(method: str, tmp_path: Path) -> None:
    """A run's network, a model object and a fresh network, on arrays: the same numbers as on the data by name."""
    trained = etude.run("vision/lenet", **TINY)
    test = room.images("digits").test
    shown = {**TINY, "images": 150, "batch": 90, "shown": 1}
    if method != "robustness/fgsm":
        shown["subsets"] = 2
    by_name = etude.run(method, **shown, source=trained)
    by_hand = etude.run(method, **shown, source=trained, data=(test.x, test.y))
    assert by_hand.metrics == by_name.metrics
    captions = (by_hand.folder / "artifacts" / "index.json").read_text()
    assert "360 images given in Python" in captions
    assert "digits" not in captions
    config = json.loads((by_hand.folder / "config.json").read_text())
    assert config["config"]["data"] == "the data object tuple"
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    done = etude.run(method, **TINY, source=theirs, data=TensorDataset(test.x.float() / 255, test.y))
    assert "Sequential object on 360 images given in Python" in (done.folder / "artifacts" / "index.json").read_text()
    fresh = etude.run(method, **TINY, data=(test.x, test.y))
    assert (
        "trained for 30 steps on 360 images given in Python, 72 test images"
        in (fresh.folder / "artifacts" / "index.json").read_text()
    )
    (by_hand.folder / "done").unlink()
    with pytest.raises(UserError, match=r"the data object tuple, which ended with its Python session.*data=…"):
        etude.resume(by_hand.folder)


def test_without_labels_the_network_s_own_word_is_taken(tmp_path: Path) -> None:
    trained = etude.run("vision/lenet", **TINY)
    done = etude.run("robustness/fgsm", **TINY, source=trained, data=room.images("digits").test.x)
    assert done.metrics["clean_accuracy"] == 1
    assert done.metrics["attacked_error"] > 0
    assert "360 images given in Python without labels" in (done.folder / "artifacts" / "index.json").read_text()


def test_a_pair_in_the_wrong_place_gets_one_sentence(tmp_path: Path) -> None:
    """Not a page of pixel values; and floats from 0 to 255 are not misread."""
    pair = (room.images("digits").test.x.float(), room.images("digits").test.y)
    with pytest.raises(UserError, match=r"lie in \[0, 255\]") as caught:
        etude.run("robustness/fgsm", **TINY, data=pair, out=tmp_path / "out")
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="vision/lenet takes data by name or as a folder, not a tuple object"):
        etude.run("vision/lenet", **TINY, data=pair)
