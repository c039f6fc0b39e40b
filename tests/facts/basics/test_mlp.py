"""The feed-forward network against torch.nn.Sequential and scikit-learn's forward pass."""

import json

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier
from torch import nn
from torch.nn import functional as F

import etude
from etude.basics.mlp import MLP, PRESETS, Config, build
from etude.blocks.classifying.recipe import DAMPING
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.data import images
from etude.data.batches import Stream
from etude.optim.newton import newton_step

SPEC = Spec(shape=(1, 8, 8), classes=tuple("0123456789"), mean=(0.3,), std=(0.3,))
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing takes most of a tiny run; the learning tests and the contract tests draw."""
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


def test_parity_with_plain_sequential():
    torch.manual_seed(0)
    model = MLP(12, (7, 5), 3, (0.5,), (0.25,), "tanh").double()
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    plain.load_state_dict({name.removeprefix("layers."): value for name, value in model.state_dict().items()})
    x = torch.rand(6, 1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain((x - 0.5) / 0.25), rtol=1e-12, atol=1e-12)


def test_forward_parity_with_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    theirs = MLPClassifier((8, 4), max_iter=3000, tol=1e-2, random_state=0).fit(x, y)
    model = MLP(6, (8, 4), 3, (0.0,), (1.0,)).double()
    with torch.no_grad():
        for layer, weight, bias in zip(
            (m for m in model.layers if isinstance(m, nn.Linear)), theirs.coefs_, theirs.intercepts_
        ):
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.copy_(torch.from_numpy(bias))
    ours = model(torch.from_numpy(x).view(40, 1, 6)).softmax(1).detach().numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x), rtol=1e-9, atol=1e-12)


def test_no_hidden_layer_is_softmax_regression():
    model = build(Config(widths=()), SPEC)["model"]
    assert sum(p.numel() for p in model.parameters()) == 650


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = MLP(4, (64,), 2, dropout=0.5)
    x = torch.rand(8, 1, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_classic_dropout_scales_at_test():
    """The classic network is the inverted one whose weights behind the dropout are multiplied by the keep probability."""
    torch.manual_seed(0)
    classic = MLP(4, (16,), 3, dropout=0.25, dropout_style="classic").eval()
    plain = MLP(4, (16,), 3).eval()
    plain.load_state_dict({name.replace("layers.4", "layers.3"): v for name, v in classic.state_dict().items()})
    with torch.no_grad():
        plain.layers[3].weight.mul_(0.75)
    x = torch.rand(5, 1, 4)
    torch.testing.assert_close(classic(x), plain(x))


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_normalizers_are_torchs_between_the_layer_and_its_squashing(name):
    torch.manual_seed(0)
    model = MLP(12, (7, 5), 3, (0.5,), (0.25,), normalizer=name).double()
    norm = nn.BatchNorm1d if name == "batch" else nn.LayerNorm
    bias = name == "layer"  # a bias in front of batch normalisation would change nothing
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7, bias=bias), norm(7), nn.ReLU(), nn.Linear(7, 5, bias=bias), norm(5), nn.ReLU(),
        nn.Linear(5, 3),
    ).double()  # fmt: skip
    plain.load_state_dict({key.removeprefix("layers."): value for key, value in model.state_dict().items()})
    x, y = torch.rand(6, 1, 3, 4, dtype=torch.float64), torch.arange(6) % 3
    for training in (True, False):
        a, b = model.train(training)(x), plain.train(training)((x - 0.5) / 0.25)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        F.cross_entropy(a, y).backward()
        F.cross_entropy(b, y).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_loop_on_a_subset_from_another_initialiser(tmp_path):
    """SGD on 300 of the images, drawn by the seed; test_mlp_run.py has the other settings."""
    done = etude.run(
        "basics/mlp", **TINY, optimizer="sgd", learning_rate=0.2, schedule="cosine", weight_decay=0.01, examples=300,
        initializer="glorot", initial_bias=0.1, out=tmp_path / "run",
    )  # fmt: skip
    found = etude.load(done.folder).model
    data, spec = images("digits"), etude.load(done.folder).spec
    torch.manual_seed(fold(0, 0, 0, "init"))
    model = build(Config(widths=(32,), initializer="glorot", initial_bias=0.1), spec)["model"]
    assert all(bool((layer.bias == 0.1).all()) for layer in model.layers if isinstance(layer, nn.Linear))
    count = len(data.train.y)
    kept = torch.randperm(count, generator=torch.Generator().manual_seed(fold(0, 0, 0, "training subset")))[:300]
    optimizer = torch.optim.SGD(model.parameters(), 0.2, weight_decay=0.01)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    stream = Stream(300, 32, 0)
    for step in range(30):
        index = kept[stream.indices(step)]
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.x[index]), data.train.y[index]).backward()
        optimizer.step()
        annealing.step()
    for mine, theirs in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("flags", "said"), [
    ({"optimizer": "newton", "widths": (256,)}, r"this network has 19,210; it takes up to 3,000"),
    ({"optimizer": "newton", "clip_norm": 1.0}, "--clip-norm changes a gradient, but --optimizer newton solves"),
    ({"optimizer": "newton", "weight_decay": 0.1}, "--weight-decay changes a gradient, but --optimizer newton solves"),
    ({"optimizer": "newton", "ensemble": "seeds"}, "newton solves for one network at a time; leave --ensemble out"),
    ({"clip_norm": 1.0, "clip_value": 1.0}, "--clip-norm and --clip-value are two ways to do one thing"),
    ({"normalizer": "batch", "batch": 1}, "--normalizer batch has no statistics in a batch of one; take --batch 2"),
    ({"normalizer": "batch", "examples": 1}, "--normalizer batch has no statistics in a batch of one; take --examples 2"),
    ({"normalizer": "layer", "widths": (8, 1)}, "--normalizer layer makes a layer of one unit constant"),
    ({"normalizer": "layer", "widths": ()}, "--widths names none"),
    ({"dropout": 0.5, "widths": ()}, "--dropout and --normalizer act on hidden units"),
    ({"dropout_style": "classic"}, "--dropout-style classic changes nothing at --dropout 0"),
    ({"members": 3}, "--members 3 needs an ensemble; add --ensemble seeds"),
    ({"combine": "vote"}, "--combine vote needs an ensemble"),
    ({"combine": "weights", "ensemble": "seeds"}, "--ensemble seeds begin with different weights"),
    ({"combine": "weights", "ensemble": "bagging"}, "take probability or vote"),
    ({"combine": "weights", "ensemble": "heads"}, "averages the parameters of one network's snapshots"),
    ({"ensemble": "snapshots", "schedule": "one_cycle"}, "take --schedule cyclic"),
    ({"ensemble": "snapshots", "members": 31}, "--steps 30 has no room for 31 snapshots"),
    ({"ensemble": "heads", "widths": ()}, "there is nothing to learn"),
    ({"examples": 5000}, "--examples 5000 is more than the 1,293 training images of digits"),
    ({"clip_norm": 0.0}, "--clip-norm is 0.0; it must be a number greater than 0"),
    ({"schedule": "snapshot"}, "--schedule is 'snapshot'; it must be one of"),
])  # fmt: skip
def test_combinations_that_make_no_sense(flags, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        etude.run("basics/mlp", **TINY, **flags, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_default_settings_add_nothing():
    """The layers, names and random draws of the plain network: what the evidence card was measured with."""
    torch.manual_seed(0)
    model = build(Config(dropout=0.5), SPEC)["model"]
    torch.manual_seed(0)
    plain = [nn.Linear(64, 256), nn.Linear(256, 128), nn.Linear(128, 10)]
    for layer in plain:
        nn.init.normal_(layer.weight, 0.0, (2 / layer.in_features) ** 0.5)
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    assert all(torch.equal(a.weight, b.weight) and not b.bias.any() for a, b in zip(plain, layers, strict=True))
    assert [*model.state_dict()] == [f"layers.{i}.{kind}" for i in (1, 4, 7) for kind in ("weight", "bias")]


def test_newton_on_softmax_regression(tmp_path):
    """Damped Newton steps on all digits: the losses are those of the update written out, and fall at once."""
    done = etude.run("basics/mlp", preset="newton", steps=3, quiet=True, threads=1, out=tmp_path / "run")
    lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    data = images("digits")
    torch.manual_seed(fold(0, 0, 0, "init"))
    model = build(PRESETS["newton"], data.spec)["model"].double()
    x, y = data.train.x.double() / 255, data.train.y
    x = model.standardise(x).flatten(1)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    layer = model.layers[1]
    theta = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1).flatten()
    for found in losses:

        def loss(theta: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(x @ theta.view(10, -1).T, y)

        assert found == pytest.approx(float(loss(theta)), rel=2e-3)
        theta = newton_step(loss, theta, damping=DAMPING)
    assert losses[0] > 2
    assert losses[2] < 0.13


def test_a_singular_hessian_ends_in_one_sentence(tmp_path, monkeypatch):
    """Without damping: a constant added to all logits changes nothing, so the Hessian has no inverse."""
    monkeypatch.setattr("etude.blocks.classifying.recipe.DAMPING", 0.0)
    with pytest.raises(RunError, match="the update of step 0 was not made: the Hessian is singular"):
        etude.run("basics/mlp", preset="newton", quiet=True, threads=1, out=tmp_path / "run")
