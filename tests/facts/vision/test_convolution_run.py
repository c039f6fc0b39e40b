"""The whole run of vision/convolution against the same training with torch's kernels, in float64."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.data import images
from etude.data.batches import Stream
from etude.data.sets import Images, Split
from etude.vision.convolution import Config, build
from etude.vision.parts.exhibits import looked_at

SMALL = {"steps": 4, "batch": 6, "maps": 4, "evaluate_every": 3, "learning_rate": 0.02}
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.vision.convolution.show", lambda *_: None)
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


@pytest.fixture
def small(monkeypatch):
    """40 training, 30 validation and 30 test digits of 8 × 8 pixels."""
    whole = images("digits", 8)
    cut = [Split(part.x[:n], part.y[:n]) for part, n in ((whole.train, 40), (whole.validation, 30), (whole.test, 30))]
    data = Images(whole.name, *cut, whole.spec, whole.source)
    monkeypatch.setattr("etude.vision.convolution.room.images", lambda *_: data)
    return data


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shown(data, step, batch, shift):
    """Images and labels of a step, one image after the other."""
    index = Stream(len(data.train), batch, 0).indices(step)
    places = torch.randint(2 * shift + 1, (2, batch), generator=generator(0, step, 0, "augment"))
    pictures = []
    for row, number in enumerate(index):
        wide = F.pad(data.train.x[number].double(), (shift,) * 4, value=round(255 * data.spec.mean[0]))
        top, left = int(places[0, row]), int(places[1, row])
        pictures.append(wide[:, top : top + 8, left : left + 8])
    return torch.stack(pictures), data.train.y[index]


def plain(flags, subtract, spec):
    """torch's own layers with the weights that a run with seed 0 begins with."""
    torch.manual_seed(fold(0, 0, 0, "init"))
    source = build(Config(maps=4, **flags), spec)["model"]
    d, k, s, g = (flags.get(n, v) for n, v in (("dilation", 1), ("kernel", 3), ("stride", 1), ("groups", 1)))
    p = flags.get("padding", d * (k - 1) // 2)
    pool = {"max": nn.MaxPool2d, "mean": nn.AvgPool2d, "none": lambda _: nn.Identity()}[flags.get("pool", "max")]
    chain = nn.Sequential(
        nn.Conv2d(1, 4, k, s, p, d), nn.ReLU(), pool(2), nn.Conv2d(4, 8, k, s, p, d, g), nn.ReLU(), pool(2),
        nn.Flatten(), nn.Linear(source.classifier[1].in_features, 10),
    )  # fmt: skip
    chain[:6].load_state_dict(source.features.state_dict())
    chain[7].load_state_dict(source.classifier[1].state_dict())
    mean, std = torch.tensor(spec.mean[0] if subtract else 0.0), torch.tensor(spec.std[0])
    chain = chain.double()
    return lambda x: chain((x / 255 - mean.double()) * (1 / std).double()), chain


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {},
    {"pool": "mean", "groups": 2, "optimizer": "momentum", "shift": 1, "weight_decay": 0.05},
    {"pool": "none", "stride": 2, "padding": 2, "schedule": "cosine", "subtract": False},
    {"kernel": 5, "dilation": 1, "examples": 30, "optimizer": "sgd", "schedule": "constant"},
    {"engine": "torch", "dilation": 2},
], ids=str)  # fmt: skip
def test_loop_is_that_of_torchs_kernels(flags, small, tmp_path):
    """Losses, validation rows and final weights: 4 steps, evaluated after the 3rd and the last."""
    done = etude.run("vision/convolution", **TINY, **SMALL | flags, out=tmp_path / "run")
    spec = etude.load(done.folder).spec
    data = small
    if "examples" in flags:
        kept = torch.randperm(40, generator=generator(0, 0, 0, "training subset"))[:30]
        data = Images("", Split(small.train.x[kept], small.train.y[kept]), small.validation, small.test, spec, "")
    layers = {k: v for k, v in flags.items() if k in ("pool", "groups", "stride", "padding", "kernel", "dilation")}
    model, chain = plain(layers, flags.get("subtract", True), spec)
    decay = flags.get("weight_decay", 0.0)
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, weight_decay=decay),
        "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=decay),
        "sgd": lambda p: torch.optim.SGD(p, 0.1),
    }[flags.get("optimizer", "adam")](chain.parameters())
    schedule = etude.optim.schedule(flags.get("schedule", "one_cycle"), 0.02, 4)
    losses, found = [], []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule(step)
        x, y = shown(data, step, 6, flags.get("shift", 0))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (2, 3):
            with torch.no_grad():
                logits = model(small.validation.x.double())
            right = (logits.argmax(1) == small.validation.y).double().mean().item()
            found.append((step + 1, F.cross_entropy(logits, small.validation.y).item(), right))
    rows = rows_of(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
    kept = [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows if len(row) > 2]
    for mine, theirs in zip(kept, found, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-6)
    state = checkpoint.load(done.folder / "checkpoints")[1]["model"]
    for mine, theirs in zip(state.values(), chain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-7, atol=1e-10)


def test_reported_numbers_are_those_of_the_saved_network(small, tmp_path):
    done = etude.run("vision/convolution", **TINY, **SMALL, subtract=False, photograph="china", out=tmp_path / "run")
    model, last = etude.load(done.folder).model, rows_of(done.folder)[-1]
    for said, part, numbers in (("test", small.test, done.metrics), ("validation", small.validation, last)):
        with torch.no_grad():
            logits = model(part.x)
        assert numbers[f"{said}_loss"] == pytest.approx(float(F.cross_entropy(logits, part.y)), rel=1e-5)
        assert numbers[f"{said}_accuracy"] == pytest.approx(float((logits.argmax(1) == part.y).double().mean()))
    from etude.vision.convolution import examine

    wanted = examine(
        Config(maps=4, subtract=False), small.spec, model, small.test.x, looked_at("china", subtract=False)[1]
    )
    assert {name: done.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert done.metrics.keys() == wanted.keys() | {"test_loss", "test_accuracy"}


def test_predict_names_the_classes(small, tmp_path):
    done = etude.run("vision/convolution", **TINY, **SMALL, scramble=True, out=tmp_path / "run")
    loaded = etude.load(done.folder)
    with torch.no_grad():
        wanted = loaded.model(small.test.x[:3]).argmax(1)
    assert [row["class"] for row in loaded.predict(small.test.x[:3])] == [small.spec.classes[int(k)] for k in wanted]


def test_bfloat16_learns_too(small, tmp_path):
    done = etude.run("vision/convolution", **TINY, **SMALL | {"steps": 2}, precision="bf16", out=tmp_path / "run")
    whole = etude.run("vision/convolution", **TINY, **SMALL | {"steps": 2}, out=tmp_path / "other")
    for a, b in zip(rows_of(done.folder), rows_of(whole.folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
