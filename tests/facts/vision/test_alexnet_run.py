"""The whole run of AlexNet against the same training written out with torch's own parts, in float64."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import etude
from etude.core.randomness import fold
from etude.vision.alexnet import AlexNet, gap, joined

plain = runpy.run_path(str(Path(__file__).parents[1] / "plain_augmented.py"))
SMALL = {"steps": 4, "batch": 6, "evaluate_every": 3, "learning_rate": 0.05}
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


@pytest.fixture
def small(monkeypatch):
    data = plain["some_digits"](32)
    monkeypatch.setattr("etude.vision.alexnet.room.images", lambda *_: data)
    return data


def network(source, towers, norm, overlap, squash, dropout):
    """torch's own layers with the weights of `source`."""
    a, b, c, d, e = (6, 16, 24, 24, 16) if towers == 2 else (6, 18, 36, 24, 24)

    def pool(normed):
        window = nn.MaxPool2d(3, 2) if overlap else nn.MaxPool2d(2)
        return nn.Sequential(nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0), window) if norm and normed else window

    features = nn.Sequential(
        nn.Conv2d(1, a, 5, padding=2), squash(), pool(True), nn.Conv2d(a, b, 5, padding=2, groups=towers), squash(), pool(True),
        nn.Conv2d(b, c, 3, padding=1), squash(), nn.Conv2d(c, d, 3, padding=1, groups=towers), squash(),
        nn.Conv2d(d, e, 3, padding=1, groups=towers), squash(), pool(False),
    )  # fmt: skip
    side = 3 if overlap else 4
    classifier = nn.Sequential(
        nn.Dropout(dropout), nn.Linear(e * side * side, 16), squash(), nn.Dropout(dropout), nn.Linear(16, 16), squash(),
        nn.Linear(16, 10),
    )  # fmt: skip
    features.load_state_dict(source.features.state_dict())
    classifier.load_state_dict(source.classifier.state_dict())
    return nn.Sequential(features, nn.Flatten(), classifier).double()


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"weight_decay": 0.05, "shift": 2, "flip": True},
    {"towers": 1, "schedule": "cosine", "optimizer": "nesterov", "shift": 0, "activation": "tanh", "dropout": 0.5},
    {"examples": 30, "optimizer": "sgd", "schedule": "constant", "freeze": 2, "overlap": False, "response_norm": False},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, small, tmp_path):
    """Losses, validation rows and final weights: 4 steps, evaluated after the 3rd and the last."""
    flags = SMALL | {"shift": 1, "weight_decay": 5e-4, "dropout": 0.2} | flags
    done = etude.run("vision/alexnet", **TINY, **flags, out=tmp_path / "run")
    spec = etude.load(done.folder).spec
    data = plain["subset"](small, flags["examples"], spec) if "examples" in flags else small
    towers, overlap, kind = (flags.get(n, v) for n, v in (("towers", 2), ("overlap", True), ("activation", "relu")))
    torch.manual_seed(fold(0, 0, 0, "init"))
    source = AlexNet(10, spec.mean, spec.std, 32, towers, 6, 16, kind, False, overlap)
    norm = flags.get("response_norm", towers == 2)
    model = network(source, towers, norm, overlap, {"relu": nn.ReLU, "tanh": nn.Tanh}[kind], flags["dropout"])
    for part in (model[0][0], model[0][3]) if flags.get("freeze") else ():
        part.requires_grad_(False)
    losses, rows = plain["train"](model, data, evaluated=(2, 3), **flags)
    assert [row["loss"] for row in plain["rows_of"](done.folder)] == pytest.approx(losses, rel=1e-7)
    for mine, theirs in zip(plain["validated"](done.folder), rows, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-6)
    wanted = {"features": model[0], "classifier": model[2]}
    for name, value in plain["state_of"](done.folder).items():
        part, _, leaf = name.partition(".")
        torch.testing.assert_close(value.double(), wanted[part].state_dict()[leaf].double(), rtol=1e-6, atol=1e-8)


def test_reported_numbers_are_those_of_the_saved_network(small, tmp_path):
    done = etude.run("vision/alexnet", **TINY, **SMALL, out=tmp_path / "run")
    loaded, last = etude.load(done.folder), plain["rows_of"](done.folder)[-1]
    model = nn.Sequential(loaded.model.features, nn.Flatten(), loaded.model.classifier).double()
    assert done.metrics.keys() == {"test_loss", "test_accuracy", "block_gap", "merged_gap"}
    for said, part, numbers in (("test", small.test, done.metrics), ("validation", small.validation, last)):
        loss, right = plain["score"](model, part, loaded.spec)
        assert numbers[f"{said}_loss"] == pytest.approx(loss, rel=1e-5)
        assert numbers[f"{said}_accuracy"] == pytest.approx(right)
    network = loaded.model.float()
    assert done.metrics["block_gap"] < 1e-6
    assert done.metrics["merged_gap"] == pytest.approx(gap(network, joined(network, 1.0), small.test.x), rel=1e-4)


def test_loop_begins_with_the_weights_of_a_run(small, tmp_path):
    one = etude.run("vision/alexnet", **TINY, **SMALL, out=tmp_path / "one")
    two = etude.run(
        "vision/alexnet", **TINY, **SMALL | {"steps": 1, "freeze": 5}, init=str(one.folder), out=tmp_path / "two"
    )
    before, after = plain["state_of"](one.folder), plain["state_of"](two.folder)
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier"}


def test_predict_names_the_classes(small, tmp_path):
    done = etude.run("vision/alexnet", **TINY, **SMALL, out=tmp_path / "run")
    loaded = etude.load(done.folder)
    with torch.no_grad():
        wanted = loaded.model(small.test.x[:3]).argmax(1)
    assert [row["class"] for row in loaded.predict(small.test.x[:3])] == [small.spec.classes[int(k)] for k in wanted]
