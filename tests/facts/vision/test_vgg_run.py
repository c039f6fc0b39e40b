"""The whole run of VGG against the same training written out with torch's own parts, in float64."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.vision.vgg import VGG

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
    monkeypatch.setattr("etude.vision.vgg.room.images", lambda *_: data)
    return data


def network(source, counts, normalised, dropout):
    """torch's own layers with the weights of `source`; and the layers of its first stage."""
    layers, inputs = [], 1
    for number, times in zip(counts, (1, 2, 4, 8, 8)):
        for _ in range(number):
            layers += [nn.Conv2d(inputs, 4 * times, 3, padding=1)]
            layers += [nn.BatchNorm2d(4 * times)] if normalised else []
            layers += [nn.ReLU()]
            inputs = 4 * times
        layers += [nn.MaxPool2d(2)]
    features = nn.Sequential(*layers)
    dense = [nn.Linear(32, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout)]
    classifier = nn.Sequential(*dense, nn.Linear(16, 10))
    features.load_state_dict(source.features.state_dict())
    classifier.load_state_dict(source.classifier.state_dict())
    return nn.Sequential(features, nn.Flatten(), classifier).double()


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"weight_decay": 0.05, "shift": 2, "flip": True},
    {"depth": 11, "normalizer": "none", "schedule": "cosine", "optimizer": "nesterov", "shift": 0, "dropout": 0.5},
    {"examples": 30, "optimizer": "sgd", "schedule": "constant", "freeze": 2, "shift": 1, "dropout": 0.0},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, small, tmp_path):
    """Losses, validation rows and final weights: 4 steps, evaluated after the 3rd and the last."""
    flags = SMALL | {"shift": 1, "weight_decay": 5e-4, "dropout": 0.2} | flags
    done = etude.run("vision/vgg", **TINY, **flags, out=tmp_path / "run")
    spec = etude.load(done.folder).spec
    data = plain["subset"](small, flags["examples"], spec) if "examples" in flags else small
    torch.manual_seed(fold(0, 0, 0, "init"))
    normalised, depth = flags.get("normalizer", "batch") == "batch", flags.get("depth", 8)
    source = VGG(depth, 10, spec.mean, spec.std, 32, 4, 16, "batch" if normalised else "none")
    model = network(source, {8: (1,) * 5, 11: (1, 1, 2, 2, 2)}[depth], normalised, flags["dropout"])
    frozen = list(model[0][: 8 if flags.get("freeze") else 0])  # two stages of convolution, norm, ReLU and pooling
    for part in frozen:
        part.requires_grad_(False)
    losses, rows = plain["train"](model, data, evaluated=(2, 3), frozen=frozen, **flags)
    assert [row["loss"] for row in plain["rows_of"](done.folder)] == pytest.approx(losses, rel=1e-7)
    for mine, theirs in zip(plain["validated"](done.folder), rows, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-6)
    wanted = {"features": model[0], "classifier": model[2]}
    for name, value in plain["state_of"](done.folder).items():
        part, _, leaf = name.partition(".")
        torch.testing.assert_close(value.double(), wanted[part].state_dict()[leaf].double(), rtol=1e-6, atol=1e-8)


def test_reported_numbers_are_those_of_the_saved_network(small, tmp_path):
    done = etude.run("vision/vgg", **TINY, **SMALL, out=tmp_path / "run")
    loaded, last = etude.load(done.folder), plain["rows_of"](done.folder)[-1]
    model = nn.Sequential(loaded.model.features, nn.Flatten(), loaded.model.classifier).double()
    assert done.metrics.keys() == {"test_loss", "test_accuracy", "first_dense_share"}
    for said, part, numbers in (("test", small.test, done.metrics), ("validation", small.validation, last)):
        loss, right = plain["score"](model, part, loaded.spec)
        assert numbers[f"{said}_loss"] == pytest.approx(loss, rel=1e-5)
        assert numbers[f"{said}_accuracy"] == pytest.approx(right)
    sizes = [value.numel() for name, value in plain["state_of"](done.folder).items()
             if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]  # fmt: skip
    assert done.metrics["first_dense_share"] == pytest.approx((32 * 16 + 16) / sum(sizes))


def test_loop_begins_with_the_weights_of_a_run_and_sees_as_it_did(small, tmp_path):
    one = etude.run("vision/vgg", **TINY, **SMALL, out=tmp_path / "one")
    small.spec.extra.clear()
    two = etude.run(
        "vision/vgg", **TINY, **SMALL | {"steps": 1, "freeze": 5}, init=str(one.folder), out=tmp_path / "two"
    )
    before, after = plain["state_of"](one.folder), plain["state_of"](two.folder)
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier"}
    with pytest.raises(UserError, match="another network"):
        etude.run("vision/vgg", **TINY, **SMALL | {"depth": 11}, init=str(one.folder), out=tmp_path / "three")


def test_loop_draws_from_the_papers_initialiser_on_request(small, tmp_path):
    done = etude.run(
        "vision/vgg", **TINY, **SMALL | {"steps": 1, "learning_rate": 1e-9}, initializer="paper", out=tmp_path / "run"
    )
    assert float(plain["state_of"](done.folder)["features.12.weight"].std()) == pytest.approx(0.01, rel=0.1)


def test_predict_names_the_classes(small, tmp_path):
    done = etude.run("vision/vgg", **TINY, **SMALL, out=tmp_path / "run")
    loaded = etude.load(done.folder)
    with torch.no_grad():
        wanted = loaded.model(small.test.x[:3]).argmax(1)
    assert [row["class"] for row in loaded.predict(small.test.x[:3])] == [small.spec.classes[int(k)] for k in wanted]
