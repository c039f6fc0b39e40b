"""Twenty sigmoid layers: networks and whole runs against torch, gradients through depth, probing leaves no trace (E15)."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude import data as room
from etude.basics.normalization import NAMES, Config, Sigmoids, build, probe
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.data.batches import Stream

SPEC = Spec(shape=(1, 4, 4), classes=("a", "b", "c"), mean=(0.25,), std=(0.5,))


def batch(count=32):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 4, 4, generator=draw), torch.randint(3, (count,), generator=draw)


def plain(ours, normalised):
    """The same network in torch's layers, with copies of its weights; it takes standardised, flat images."""
    theirs = nn.Sequential()
    for layer in ours.hidden:
        linear = nn.Linear(layer[0].in_features, layer[0].out_features, bias=not normalised)
        linear.load_state_dict(layer[0].state_dict())
        theirs.extend([linear, *([nn.BatchNorm1d(layer[0].out_features)] if normalised else []), nn.Sigmoid()])
    theirs.append(nn.Linear(ours.output.in_features, ours.output.out_features))
    theirs[-1].load_state_dict(ours.output.state_dict())
    return theirs


@pytest.mark.parametrize("normalised", [True, False])
def test_the_network_equals_torchs_layers(normalised):
    """E15: in training by the batch's moments, in evaluation by the running ones, after two batches."""
    torch.manual_seed(0)
    ours = Sigmoids(SPEC, 3, 8, normalised).double()
    theirs = plain(ours, normalised).double()
    x = (batch()[0].double() - 0.25) / 0.5
    for part in x.flatten(1).split(16):
        torch.testing.assert_close(ours(part.view(-1, 1, 4, 4) * 0.5 + 0.25), theirs(part), rtol=1e-10, atol=1e-12)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x * 0.5 + 0.25), theirs(x.flatten(1)), rtol=1e-10, atol=1e-12)


def test_batch_norm_keeps_spread_and_gradient_at_every_depth():
    """Without it both fall by orders of magnitude; layer 20's units hardly tell two images apart."""
    torch.manual_seed(0)
    found = {name: probe(model, *batch(128)) for name, model in build(Config(), SPEC).items()}
    with_, without = found["with"], found["without"]
    assert with_["spread"].min() > 0.15
    assert without["spread"][0] > 0.05
    assert without["spread"][-1] < 1e-6
    assert with_["slope"][0] > 0.2 * with_["slope"][-1]
    assert without["slope"][0] < 1e-8 * without["slope"][-1]
    # each layer passes at most a quarter of the weight matrix's norm
    net = build(Config(), SPEC)["without"]
    factors = [0.25 * torch.linalg.matrix_norm(layer[0].weight, 2).item() for layer in net.hidden[1:]]
    slopes = probe(net, *batch(128))["slope"]
    assert (slopes[:-1] <= slopes[1:] * np.array(factors) * (1 + 1e-5)).all()


def test_probing_leaves_no_trace():
    torch.manual_seed(0)
    model = build(Config(layers=2, width=8), SPEC)["with"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, *batch())
    assert found["histogram"].sum(1).tolist() == [32 * 8] * 2
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_both_networks_begin_with_glorots_draw():
    torch.manual_seed(0)
    for name, model in build(Config(), SPEC).items():
        for layer in list(model.hidden)[1:]:
            assert layer[0].weight.std().item() == pytest.approx(math.sqrt(1 / 128), rel=0.03)
            assert (layer[0].bias is None) == (name == "with")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SMALL = {"layers": 3, "width": 6, "steps": 5, "batch": 20, "evaluate_every": 2}


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double().mean().item()
    model.train()
    return right


@pytest.mark.parametrize("extra", [{}, {"examples": 30, "evaluate_every": 0}, {"examples": 0, "learning_rate": 0.1}])
def test_loop_equals_a_plain_one(extra, tmp_path, double):
    """torch's layers and Adam on the same batches, in float64: weights, running estimates, every logged and returned number."""
    flags = SMALL | extra
    done = etude.run("basics/normalization", out=tmp_path / "run", quiet=True, seed=7, **flags)
    config, data = Config(**flags), room.images("digits")
    torch.manual_seed(fold(7, 0, 0, "init"))
    models = {name: plain(model, name == "with") for name, model in build(config, data.spec).items()}
    rules = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
    mean, std = data.spec.mean[0], data.spec.std[0]
    (x, y), (val_x, val_y), (test_x, test_y) = (
        ((part.x.flatten(1).double() / 255 - mean) / std, part.y) for part in (data.train, data.validation, data.test)
    )
    stream = Stream(min(config.examples or len(y), len(y)), 20, 7)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    for step, row in enumerate(rows):
        index = stream.indices(step)
        for name, model in models.items():
            rules[name].param_groups[0]["lr"] = config.learning_rate * (1 - step / 5)
            loss = F.cross_entropy(model(x[index]), y[index])
            assert row[f"loss_{name}"] == pytest.approx(loss.item(), rel=1e-10)
            rules[name].zero_grad()
            loss.backward()
            rules[name].step()
            due = step == 4 or bool(config.evaluate_every and step % 2)
            assert (f"validation_accuracy_{name}" in row) == due
            if due:
                assert row[f"validation_accuracy_{name}"] == pytest.approx(accuracy(model, val_x, val_y))
    got = etude.load(done.folder).modules
    for name, model in models.items():
        assert done.metrics[f"test_accuracy_{name}"] == pytest.approx(accuracy(model, test_x, test_y))
        mine, theirs = got[name].state_dict().values(), model.state_dict().values()
        for ours, his in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, his, rtol=1e-6, atol=1e-8)


def test_reported_numbers_belong_to_the_kept_networks_and_to_those_of_the_start(tmp_path):
    """Test accuracy from the checkpoint; spread and slope of the fresh networks on 500 images for validation."""
    flags = SMALL | {"layers": 4, "width": 16, "steps": 40, "learning_rate": 0.05}
    done = etude.run("basics/normalization", out=tmp_path / "run", quiet=True, seed=7, **flags)
    data, got = room.images("digits"), etude.load(done.folder).modules
    expected = {
        f"test_accuracy_{name}": (got[name](data.test.x).argmax(1) == data.test.y).double().mean().item()
        for name in NAMES
    }
    torch.manual_seed(fold(7, 0, 0, "init"))
    fresh = build(Config(**flags), data.spec)
    x, y = data.validation.x[:500], data.validation.y[:500]
    for name in NAMES:
        theirs = plain(fresh[name], name == "with")
        a, kept = fresh[name].standardise(x).flatten(1), []
        for part in theirs[:-1]:
            a = part(a)
            if isinstance(part, nn.Sigmoid):
                kept.append(a)
        slopes = torch.autograd.grad(F.cross_entropy(theirs[-1](a), y), [kept[0], kept[-1]])
        expected[f"spread_{name}"] = kept[-1].std(0).mean().item()
        expected[f"slope_{name}"] = (slopes[0].square().mean() / slopes[1].square().mean()).sqrt().item()
    assert done.metrics == pytest.approx(expected, rel=1e-3)
    assert done.metrics["test_accuracy_with"] > 0.3
