"""The whole run of LeNet against the same training written out with torch's own parts, in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.nn.dropout import Dropout
from etude.blocks.nn.norm import BatchNorm, LayerNorm
from etude.core.randomness import fold
from etude.core.run import Run
from etude.data import images
from etude.data.sets import Images, Split
from etude.vision.lenet import Config, build

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_classifier.py")))
SMALL = {"steps": 4, "batch": 6, "examples": 40, "evaluate_every": 3, "shift": 0}
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


@pytest.fixture
def small(monkeypatch):
    """40 training, 30 validation and 30 test digits of 28 × 28 pixels: what a run finds under --data digits."""
    whole = images("digits", 28)
    cut = [Split(part.x[:n], part.y[:n]) for part, n in ((whole.train, 40), (whole.validation, 30), (whole.test, 30))]
    data = Images(whole.name, *cut, whole.spec, whole.source)
    monkeypatch.setattr("etude.vision.lenet.room.images", lambda *_: data)
    return data


def torchs(network, dropout_style):
    """The same network with torch's own dropout and normalisation."""
    for name, part in list(network.named_modules()):
        other = None
        if isinstance(part, Dropout):
            other = nn.Dropout(part.p) if dropout_style == "inverted" else plain.Classic(part.p)
        elif isinstance(part, LayerNorm):
            other = nn.LayerNorm(part.normalized_shape)
        elif isinstance(part, BatchNorm):
            flat = name.startswith("classifier")
            other = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(part.num_features)
        if other is not None:
            home, _, key = name.rpartition(".")
            other.load_state_dict(part.state_dict())
            setattr(network.get_submodule(home), key, other)
    return network.double()


def networks(count, spec, **flags):
    """`count` networks, begun with the weights that a run with seed 0 begins with."""
    torch.manual_seed(fold(0, 0, 0, "init"))
    known = {
        name: flags[name] for name in ("style", "normalizer", "dropout", "initializer", "initial_bias") if name in flags
    }
    sources = [build(Config(**known), spec)["model"] for _ in range(count)]
    return [torchs(source, flags.get("dropout_style", "inverted")) for source in sources]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.05},
    {"optimizer": "momentum", "learning_rate": 0.05, "schedule": "cosine", "style": "1998", "clip_norm": 0.5},
    {"normalizer": "batch", "clip_value": 0.01, "schedule": "linear"},
    {"normalizer": "layer", "style": "1998", "dropout": 0.4, "optimizer": "adamw", "weight_decay": 0.1, "schedule": "cyclic"},
    {"dropout": 0.4, "dropout_style": "classic", "optimizer": "sgd", "learning_rate": 0.1},
    {"shift": 2, "initializer": "glorot", "initial_bias": 0.1, "optimizer": "nesterov", "schedule": "constant"},
    {"ensemble": "seeds", "shift": 1, "clip_norm": 0.5, "optimizer": "sgd", "learning_rate": 0.1},
    {"ensemble": "bagging", "combine": "vote", "optimizer": "rmsprop"},
    {"ensemble": "heads", "shift": 1, "optimizer": "sgd", "learning_rate": 0.05, "clip_norm": 1.0, "dropout": 0.2},
    {"ensemble": "snapshots", "schedule": "cyclic", "normalizer": "batch", "optimizer": "adagrad"},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, small, tmp_path):
    """Losses of every step, validation rows and final weights: 4 steps, evaluated after the 3rd and the last."""
    flags = {"learning_rate": 1e-3, "schedule": "one_cycle"} | SMALL | flags
    flags |= {"members": 2} if "ensemble" in flags else {}
    done = etude.run("vision/lenet", **TINY, **flags, out=tmp_path / "run")
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(fold(0, 0, 0, "training subset")))
    train = Split(small.train.x[kept], small.train.y[kept])
    spec, kind = etude.load(done.folder).spec, flags.get("ensemble")
    made = networks(2 if kind in ("seeds", "bagging", "heads") else 1, spec, **flags)
    trunk = None
    if kind == "heads":  # the first network's trunk under the last layers of all
        trunk, made = made[0], [network.classifier[-1] for network in made]
        trunk.classifier[-1] = nn.Identity()
    made[0].snapshots = 2
    data = Images(small.name, train, small.validation, small.test, spec, "")
    expected = plain.train(made, data, trunk=trunk, **flags)
    assert bool(expected.clipped) == any("clip" in name for name in flags)
    rows, state = plain.log(done.folder), plain.state_of(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-9)
    seen = [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows if len(row) > 2]
    assert [row[0] for row in seen] == [3, 4]
    for mine, theirs in zip(seen, expected.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-7)  # scores are taken in float32
    prefix = {None: "", "snapshots": "kept.0."}.get(kind, "members.0.")
    for number, network in enumerate(expected.members):
        own = prefix.replace("0", str(number))
        found = {name: value for name, value in state.items() if name.startswith(own)}
        torch.testing.assert_close(plain.flat(found), plain.flat(network), rtol=1e-8, atol=1e-9)
    if kind == "heads":
        found = {name: value for name, value in state.items() if name.startswith("trunk.")}
        torch.testing.assert_close(plain.flat(found), plain.flat(expected.trunk), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "flags", [{"dropout": 0.4, "normalizer": "batch"}, {"ensemble": "bagging", "members": 2}], ids=str
)
def test_reported_numbers_are_those_of_the_saved_network(flags, small, tmp_path):
    """On the test split, in evaluation mode; and the last row of the log on the validation split."""
    done = etude.run("vision/lenet", **TINY, **SMALL, **flags, out=tmp_path / "run")
    model, last = etude.load(done.folder).model, plain.log(done.folder)[-1]
    assert set(last) == {"step", "loss", "validation_loss", "validation_accuracy"}
    assert set(done.metrics) == {"test_loss", "test_accuracy"}
    for said, part, numbers in (("test", small.test, done.metrics), ("validation", small.validation, last)):
        with torch.no_grad():
            logits = model(part.x)
        assert numbers[f"{said}_loss"] == pytest.approx(float(F.cross_entropy(logits, part.y)), rel=1e-5)
        assert numbers[f"{said}_accuracy"] == pytest.approx(float((logits.argmax(1) == part.y).double().mean()))


def test_loop_sees_no_test_label(small, tmp_path, monkeypatch):
    """With the test labels in another order, everything but the score at the end is the same."""
    one = etude.run("vision/lenet", **TINY, **SMALL, out=tmp_path / "one")
    moved = Split(small.test.x, small.test.y.roll(1))
    other = Images(small.name, small.train, small.validation, moved, small.spec, small.source)
    monkeypatch.setattr("etude.vision.lenet.room.images", lambda *_: other)
    two = etude.run("vision/lenet", **TINY, **SMALL, out=tmp_path / "two")
    assert plain.log(one.folder) == plain.log(two.folder)
    assert torch.equal(plain.flat(plain.state_of(one.folder)), plain.flat(plain.state_of(two.folder)))
    assert one.metrics != two.metrics


@pytest.mark.parametrize(
    ("stop", "flags"), [(2, {}), (3, {"ensemble": "heads", "members": 2, "dropout": 0.3})], ids=str
)
def test_loop_goes_on_where_it_was_killed(stop, flags, small, tmp_path, monkeypatch):
    """Killed inside a step and resumed: the same log, weights and numbers as never interrupted."""
    whole = etude.run("vision/lenet", **TINY, **SMALL, **flags, out=tmp_path / "whole")
    average = Run.average

    def dying(run, *modules, **scalars):
        if run.step == stop:
            raise SystemExit
        return average(run, *modules, **scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "average", dying)
        with pytest.raises(SystemExit):
            etude.run("vision/lenet", **TINY, **SMALL, **flags, save_every=1, out=tmp_path / "killed")
    again = etude.resume(tmp_path / "killed")
    assert plain.log(whole.folder) == plain.log(again.folder)
    assert whole.metrics == again.metrics
    assert torch.equal(plain.flat(plain.state_of(whole.folder)), plain.flat(plain.state_of(again.folder)))
