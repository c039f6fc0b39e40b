"""The whole run of the feed-forward network against the same training written out with torch, in float64."""

import contextlib
import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import etude
from etude.basics.mlp import Config, build
from etude.blocks.classifying.ensembles import reestimate
from etude.blocks.classifying.recipe import DAMPING
from etude.blocks.classifying.scores import accuracy
from etude.core.randomness import fold
from etude.data import images
from etude.data.sets import Images, Split

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_classifier.py")))
SMALL = {"widths": (12, 8), "steps": 6, "batch": 20}
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


RULES = [{"optimizer": name, "weight_decay": 0.05, "schedule": schedule, "learning_rate": rate}
         for name, schedule, rate in (("sgd", "linear", 0.2), ("momentum", "cosine", 0.1), ("nesterov", "one_cycle", 0.1),
                                      ("rmsprop", "constant", 1e-3), ("adagrad", "cyclic", 1e-2),
                                      ("adam", "one_cycle", 1e-2), ("adamw", "cyclic", 1e-2))]  # fmt: skip
LAYERS = [
    {"clip_norm": 0.4, "normalizer": "batch"},
    {"clip_value": 0.01, "normalizer": "layer", "optimizer": "sgd", "learning_rate": 0.5},
    {"dropout": 0.4, "activation": "tanh"},
    {"dropout": 0.4, "dropout_style": "classic", "activation": "sigmoid"},
]
MEMBERS = [
    {"ensemble": "seeds", "optimizer": "sgd", "learning_rate": 0.2, "clip_norm": 0.4, "dropout": 0.3},
    {"ensemble": "bagging", "combine": "vote", "clip_value": 0.01},
    {"ensemble": "heads", "optimizer": "momentum", "learning_rate": 0.1, "clip_norm": 0.5},
    {"ensemble": "snapshots", "schedule": "cyclic", "normalizer": "batch", "steps": 7},  # three cycles of 3, 3 and 1
    {"ensemble": "snapshots", "combine": "vote", "dropout": 0.3},
]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", RULES + LAYERS + MEMBERS, ids=str)
def test_loop_is_the_one_written_out(flags, tmp_path):
    """Losses of every step, validation rows and final weights: 6 or 7 steps, evaluated after the 4th and the last."""
    flags = SMALL | flags | {"evaluate_every": 4} | ({"members": 3} if "ensemble" in flags else {})
    done = etude.run("basics/mlp", **TINY, **flags, out=tmp_path / "run")
    data, kind = images("digits"), flags.get("ensemble")
    made = plain.networks(3 if kind in ("seeds", "bagging", "heads") else 1, data.spec, **flags)
    trunk = None
    if kind == "heads":  # the first network's trunk under the last layers of all
        trunk, made = made[0][:-1], [network[-1] for network in made]
    made[0].snapshots = 3
    expected = plain.train(made, data, trunk=trunk, **flags)
    assert bool(expected.clipped) == any("clip" in name for name in flags)
    rows, state = plain.log(done.folder), plain.state_of(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-9)
    seen = [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows if len(row) > 2]
    assert [row[0] for row in seen] == [4, flags["steps"]]
    for mine, theirs in zip(seen, expected.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-7)  # scores are taken in float32
    prefix = {None: "layers.", "snapshots": "kept.0."}.get(kind, "members.0.")
    for number, network in enumerate(expected.members):
        own = prefix.replace("0", str(number))
        found = {name: value for name, value in state.items() if name.startswith(own)}
        torch.testing.assert_close(plain.flat(found), plain.flat(network), rtol=1e-8, atol=1e-10)
    if kind == "heads":
        found = {name: value for name, value in state.items() if name.startswith("trunk.")}
        torch.testing.assert_close(plain.flat(found), plain.flat(expected.trunk), rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("_float64")
def test_loop_of_newton_s_method(tmp_path):
    """θ ← θ − α (H + λI)⁻¹ ∇L of each mini-batch, the Hessian by torch's own functional."""
    flags = {"widths": (), "optimizer": "newton", "learning_rate": 0.8, "schedule": "linear", "steps": 3, "batch": 64}
    done = etude.run("basics/mlp", **TINY, **flags, initializer="small", initial_bias=0.1, out=tmp_path / "run")
    data = images("digits")
    torch.manual_seed(fold(0, 0, 0, "init"))
    layer = build(Config(widths=(), initializer="small", initial_bias=0.1), data.spec)["model"].layers[1].double()
    assert bool((layer.bias == torch.tensor(0.1).double()).all())
    theta, losses = torch.cat([layer.weight.flatten(), layer.bias]).detach(), []
    stream = plain.Stream(len(data.train.y), 64, 0)
    for step in range(3):
        index = stream.indices(step)
        x, y = plain.Pixels(data.spec)(data.train.x[index]).flatten(1), data.train.y[index]

        def loss(theta, x=x, y=y):
            return F.cross_entropy(x @ theta[:640].view(10, 64).T + theta[640:], y)

        losses.append(float(loss(theta)))
        gradient, hessian = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta)
        theta = theta - 0.8 * (1 - step / 3) * torch.linalg.solve(
            hessian + DAMPING * torch.eye(650, dtype=torch.float64), gradient
        )
    assert [row["loss"] for row in plain.log(done.folder)] == pytest.approx(losses, rel=1e-7)
    torch.testing.assert_close(plain.flat(plain.state_of(done.folder)), theta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("flags", [
    {"dropout": 0.4},
    {"normalizer": "batch"},
    {"ensemble": "bagging", "combine": "vote", "members": 3},
    {"ensemble": "snapshots", "combine": "weights", "normalizer": "batch", "members": 3},
], ids=str)  # fmt: skip
def test_reported_numbers_are_those_of_the_saved_network(flags, tmp_path):
    """On the test split, in evaluation mode; and the last row of the log on the validation split."""
    done = etude.run("basics/mlp", **TINY, **flags, evaluate_every=10, out=tmp_path / "run")
    model, data = etude.load(done.folder).model, images("digits")
    rows = [row for row in plain.log(done.folder) if len(row) > 2]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert set(rows[0]) == {"step", "loss", "validation_loss", "validation_accuracy"}
    for said, part in (("test", data.test), ("validation", data.validation)):
        numbers = done.metrics if said == "test" else rows[-1]
        with torch.no_grad():
            logp = model(part.x).log_softmax(1)
        loss = -float(logp[torch.arange(len(part.y)), part.y].mean())
        assert numbers[f"{said}_loss"] == pytest.approx(loss, rel=1e-5)
        assert numbers[f"{said}_accuracy"] == float((logp.argmax(1) == part.y).double().mean())
    assert set(done.metrics) == {"test_loss", "test_accuracy"}


def test_loop_sees_no_test_label(tmp_path, monkeypatch):
    """With the test labels in another order, everything but the score at the end is the same."""
    flags = {"evaluate_every": 10, "ensemble": "snapshots", "members": 2}
    one = etude.run("basics/mlp", **TINY, **flags, out=tmp_path / "one")
    whole = images("digits")

    def moved(name, size=None):
        other = Split(whole.test.x, whole.test.y.roll(1))
        return Images(whole.name, whole.train, whole.validation, other, whole.spec, whole.source)

    monkeypatch.setattr("etude.basics.mlp.room.images", moved)
    two = etude.run("basics/mlp", **TINY, **flags, out=tmp_path / "two")
    assert plain.log(one.folder) == plain.log(two.folder)
    assert torch.equal(plain.flat(plain.state_of(one.folder)), plain.flat(plain.state_of(two.folder)))
    assert one.metrics != two.metrics


def test_loop_trains_on_the_subset_only(tmp_path):
    """Five images in batches of five: the batch is the same every step, and full-batch descent lowers its loss."""
    flags = {"examples": 5, "batch": 5, "optimizer": "sgd", "learning_rate": 0.05, "steps": 8}
    done = etude.run("basics/mlp", **TINY, **flags, out=tmp_path / "run")
    losses = [row["loss"] for row in plain.log(done.folder)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_loop_gives_averaged_weights_statistics_of_their_own(tmp_path):
    flags = {**TINY, "steps": 30, "normalizer": "batch", "ensemble": "snapshots", "members": 3, "combine": "weights"}
    model = etude.load(etude.run("basics/mlp", **flags, out=tmp_path / "run").folder).model
    (average,) = model.networks()
    data = images("digits")
    expected = copy.deepcopy(average)
    reestimate(expected, lambda: data.train.x.split([647, 646]))  # two batches, as equal as can be
    norm, again = average.layers[2], expected.layers[2]
    assert torch.equal(norm.running_mean, again.running_mean)
    assert not torch.allclose(norm.running_mean, model.live.layers[2].running_mean, rtol=1e-2)
    x = data.test.x[:9]
    assert torch.equal(model(x), average(x))


def test_reported_scores_count_every_image_once():
    """In batches that do not divide the number of images, whatever the mode before; a network of chance weights."""
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    part = images("digits").validation
    model = plain.networks(1, images("digits").spec, (12,), dropout=0.5)[0].train()
    for batch in (7, 50, len(part.y), 1000):
        found = accuracy(run, model, part.x, part.y, batch)
        assert (found["loss"], found["accuracy"]) == pytest.approx(plain.score([model], part), rel=1e-6)
        model.train()
