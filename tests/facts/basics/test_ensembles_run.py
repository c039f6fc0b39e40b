"""The whole run of basics/ensembles: its training against torch's own parts, its numbers against NumPy's."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.basics.ensembles import build
from etude.blocks.classifying.batches import subset
from etude.core.randomness import fold
from etude.data import images
from etude.data.sets import Images, Split

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "plain_classifier.py")))
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.basics.ensembles.pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


def words(**settings):
    """Settings of the classifier as --settings has them."""
    return tuple(f"{name}={list(v) if isinstance(v, tuple) else v}" for name, v in settings.items())


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("own", "of"), [
    ({"ensemble": "seeds"}, {"optimizer": "sgd", "learning_rate": 0.2, "clip_norm": 0.4, "schedule": "linear"}),
    ({"ensemble": "bagging", "combine": "vote"}, {"clip_value": 0.01, "dropout": 0.3, "weight_decay": 0.1}),
    ({"ensemble": "heads"}, {"optimizer": "momentum", "learning_rate": 0.1, "clip_norm": 0.5, "schedule": "cosine"}),
    ({"ensemble": "heads", "split": "layers.3"}, {"optimizer": "sgd", "learning_rate": 0.2}),
    ({"ensemble": "snapshots"}, {"normalizer": "batch"}),
    ({"ensemble": "snapshots", "combine": "vote"}, {"schedule": "cyclic", "optimizer": "adamw"}),
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(own, of, tmp_path, monkeypatch):
    """Losses of every step, validation rows and final weights: 6 steps on 90 images, evaluated after the 4th and last."""
    of = {"widths": (12, 8), "steps": 6, "batch": 20, "evaluate_every": 4} | of
    monkeypatch.setattr("etude.basics.ensembles.summary", lambda *_: {})  # which test_reported_… has
    monkeypatch.setattr("etude.basics.ensembles.answers", lambda networks, *_: [torch.zeros(2)] * len(networks))
    monkeypatch.setattr("etude.basics.ensembles.worth", lambda *_: None)
    monkeypatch.setattr("etude.basics.ensembles.spread", lambda *_: None)
    done = etude.run(
        "basics/ensembles", **TINY, **own, members=3, examples=90, settings=words(**of), out=tmp_path / "run"
    )
    data, kind = subset(images("digits"), 90, 0), own["ensemble"]
    made = plain.networks(1 if kind == "snapshots" else 3, data.spec, **of)
    trunk = None
    if kind == "heads":  # Pixels, Flatten, Linear, ReLU, Linear, ReLU, Linear
        cut = 4 if "split" in own else 6
        trunk, made = made[0][:cut], [network[cut:] for network in made]
    made[0].snapshots = 3
    expected = plain.train(made, data, trunk=trunk, **of, **own)
    assert bool(expected.clipped) == any("clip" in name for name in of)
    rows, state = plain.log(done.folder), plain.state_of(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-9)
    seen = [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows if len(row) > 2]
    assert [row[0] for row in seen] == [4, 6]
    for mine, theirs in zip(seen, expected.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-7)  # scores are taken in float32
    parts = {f"members.{m}.": network for m, network in enumerate(expected.members)}
    if kind == "snapshots":
        parts = {name.replace("members", "kept"): network for name, network in parts.items()}
    if kind == "heads":
        parts["trunk."] = expected.trunk
    for name, network in parts.items():
        found = {key: value for key, value in state.items() if key.startswith(name)}
        torch.testing.assert_close(plain.flat(found), plain.flat(network), rtol=1e-8, atol=1e-10)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def averaged(members, x):
    """Logits of the mean of the members' parameters, batch statistics taken again over all of x in one pass."""
    mean = copy.deepcopy(members[0])
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([dict(m.named_parameters())[name] for m in members]).mean(0))
        features = mean.standardise(x).flatten(1)
        for part in list(mean.layers)[1:]:
            if hasattr(part, "running_mean"):
                part.running_mean, part.running_var = features.mean(0), features.var(0)
                features = (features - features.mean(0)) / (features.var(0, correction=0) + part.eps).sqrt()
                features = features * part.weight + part.bias
            else:
                features = part(features)
    return mean.eval()


@pytest.mark.parametrize(("own", "of"), [
    ({"ensemble": "seeds"}, {}),
    ({"ensemble": "bagging", "combine": "vote"}, {"dropout": 0.3}),
    ({"ensemble": "snapshots"}, {"normalizer": "batch", "learning_rate": 0.01}),
], ids=str)  # fmt: skip
def test_reported_numbers_are_those_of_the_saved_members(own, of, tmp_path, monkeypatch):
    """On the test split, in evaluation mode, in NumPy's float64."""
    drawn = []
    monkeypatch.setattr("etude.basics.ensembles.pictures", lambda *words: drawn.append(words[2]))
    done = etude.run("basics/ensembles", **TINY, **own, settings=words(evaluate_every=10, **of), out=tmp_path / "run")
    found, data = dict(done.metrics), subset(images("digits"), 200, 0)
    model, x, y = etude.load(done.folder).model, data.test.x, data.test.y.numpy()
    members = model.networks()
    with torch.no_grad():
        logits = np.stack([network(x).double().numpy() for network in members])
        mean = averaged(members, data.train.x)(x).double().numpy()
    p, truth = softmax(logits), np.arange(len(y))
    single, together = -np.log(p[:, truth, y]), -np.log(p.mean(0)[truth, y])
    votes = np.eye(10)[logits.argmax(-1)].sum(0)
    vote = -np.log((votes[truth, y] + 1) / (len(p) + 10))
    errors = 1 - p[:, truth, y]
    cov = np.cov(errors, bias=True)
    pairs = (cov.sum() - np.trace(cov)) / (len(p) * (len(p) - 1))
    differ = [np.mean(logits[i].argmax(-1) != logits[j].argmax(-1)) for i in range(len(p)) for j in range(i)]
    expected = {
        "test_probability_accuracy": np.mean(p.mean(0).argmax(-1) == y),
        "test_vote_accuracy": np.mean(votes.argmax(-1) == y),
        "test_member_accuracy": np.mean(logits.argmax(-1) == y),
        "test_averaged_accuracy": np.mean(mean.argmax(-1) == y),
        "test_nll": together.mean(),
        "test_member_nll": single.mean(),
        "test_averaged_nll": -np.log(softmax(mean)[truth, y]).mean(),
        "nll_gain": single.mean() - together.mean(),
        "averaged_gain": np.mean(mean.argmax(-1) == y) - np.mean(logits.argmax(-1) == y),
        "averaged_nll_gain": single.mean() + np.log(softmax(mean)[truth, y]).mean(),
        "jensen_slack": (single.mean(0) - together).min(),
        "vote_slack": (single.mean(0) - vote).min(),
        "correlation": pairs / (np.trace(cov) / len(p)),
        "variance": np.trace(cov) / len(p),
        "variance_of_mean": errors.mean(0).var(),
        "disagreement": np.mean(differ),
    }
    voting = own.get("combine") == "vote"
    expected["test_loss"] = vote.mean() if voting else expected["test_nll"]
    expected["test_accuracy"] = expected["test_vote_accuracy" if voting else "test_probability_accuracy"]
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    first = -1 if own["ensemble"] == "snapshots" else 0  # of snapshots the latest is drawn first
    assert drawn[0]["nll"][0] == pytest.approx(single[first].mean(), rel=2e-5)
    last = plain.log(done.folder)[-1]
    score = plain.score(members, data.validation, own.get("combine", "probability"))
    assert (last["validation_loss"], last["validation_accuracy"]) == pytest.approx(score, rel=1e-5)


def test_loop_sees_no_test_label(tmp_path, monkeypatch):
    """With the test labels in another order, the log and the weights are the same."""
    flags = {"settings": words(evaluate_every=10), "members": 2}
    one = etude.run("basics/ensembles", **TINY, **flags, out=tmp_path / "one")
    whole = images("digits")
    moved = Split(whole.test.x, whole.test.y.roll(1))
    other = Images(whole.name, whole.train, whole.validation, moved, whole.spec, whole.source)
    monkeypatch.setattr("etude.basics.ensembles.room.images", lambda *_: other)
    two = etude.run("basics/ensembles", **TINY, **flags, out=tmp_path / "two")
    assert plain.log(one.folder) == plain.log(two.folder)
    assert torch.equal(plain.flat(plain.state_of(one.folder)), plain.flat(plain.state_of(two.folder)))
    assert one.metrics["test_loss"] != two.metrics["test_loss"]


def test_loop_begins_every_member_on_its_own(tmp_path):
    """No two members share a weight, and none stands where it began."""
    done = etude.run("basics/ensembles", **TINY, settings=("steps=2",), out=tmp_path / "run")
    members = etude.load(done.folder).model.networks()
    torch.manual_seed(fold(0, 0, 0, "init"))
    begun = build(etude.load(done.folder).config, etude.load(done.folder).spec)["model"].networks()
    layers = [next(part for part in network.modules() if isinstance(part, nn.Linear)) for network in (*members, *begun)]
    for i, layer in enumerate(layers):
        assert all(not torch.equal(layer.weight, other.weight) for other in layers[:i])
