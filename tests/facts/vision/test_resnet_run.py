"""The whole run of ResNet against the same training written out with torch's own parts, in float64."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.run import Run
from etude.data import images
from etude.data.batches import Stream
from etude.data.sets import Images, Split
from etude.vision.resnet import ResNet

SMALL = {"steps": 4, "batch": 6, "depth": 8, "evaluate_every": 3}
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.blocks.classifying.scores.classifier_pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)


@pytest.fixture
def small(monkeypatch):
    """40 training, 30 validation and 30 test digits of 8 × 8 pixels."""
    whole = images("digits", 8)
    cut = [Split(part.x[:n], part.y[:n]) for part, n in ((whole.train, 40), (whole.validation, 30), (whole.test, 30))]
    data = Images(whole.name, *cut, whole.spec, whole.source)
    monkeypatch.setattr("etude.vision.resnet.room.images", lambda *_: data)
    return data


class Plain(nn.Module):
    """torch's own layers: a ResNet-8 with shortcuts of option A, of option B, or without."""

    def __init__(self, shortcut):
        super().__init__()
        self.shortcut = shortcut
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            block = nn.Module()
            block.conv1 = nn.Conv2d(before, after, 3, 1 if stage == 1 else 2, 1, bias=False)
            block.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            block.bn1, block.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
            if shortcut == "projection" and stage > 1:
                block.downsample = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
            self.add_module(f"layer{stage}", nn.Sequential(block))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            block = stage[0]
            y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            if self.shortcut == "none":
                x = torch.relu(y)
            elif hasattr(block, "downsample"):
                x = torch.relu(y + block.downsample(x))
            elif y.shape == x.shape:
                x = torch.relu(y + x)
            else:
                half = x.shape[1] // 2
                x = torch.relu(
                    y + torch.cat([x[:, :half, ::2, ::2] * 0, x[:, :, ::2, ::2], x[:, half:, ::2, ::2] * 0], 1)
                )
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder):
    return checkpoint.load(folder / "checkpoints")[1]["model"]


def shown(data, step, batch, shift, flip):
    """Images and labels of a step, one image after the other."""
    index = Stream(len(data.train), batch, 0).indices(step)
    stream = generator(0, step, 0, "augment")
    places = torch.randint(2 * shift + 1, (2, batch), generator=stream)
    turned = torch.randint(2, (1, batch), generator=stream)[0]
    mean = round(255 * data.spec.mean[0])
    pictures = []
    for row, number in enumerate(index):
        wide = F.pad(data.train.x[number].double(), (shift,) * 4, value=mean)
        top, left = int(places[0, row]), int(places[1, row])
        picture = wide[:, top : top + 8, left : left + 8]
        pictures.append(picture.flip(-1) if flip and turned[row] else picture)
    return torch.stack(pictures), data.train.y[index]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"weight_decay": 0.05, "shift": 2, "flip": True},
    {"shortcut": "projection", "schedule": "cosine", "optimizer": "nesterov", "shift": 0},
    {"shortcut": "none", "optimizer": "sgd", "schedule": "constant", "shift": 1, "examples": 30},
    {"zero_init": True, "freeze": 2, "learning_rate": 0.02, "shift": 1},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, small, tmp_path):
    """Losses, validation rows, first gradients and final weights: 4 steps, evaluated after the 3rd and the last."""
    flags = {"learning_rate": 0.05, "schedule": "one_cycle", "weight_decay": 1e-4, "optimizer": "momentum"} | flags
    done = etude.run("vision/resnet", **TINY, **SMALL, **flags, out=tmp_path / "run")
    spec = etude.load(done.folder).spec
    data = small
    if "examples" in flags:
        kept = torch.randperm(40, generator=generator(0, 0, 0, "training subset"))[:30]
        data = Images("", Split(small.train.x[kept], small.train.y[kept]), small.validation, small.test, spec, "")
    torch.manual_seed(fold(0, 0, 0, "init"))
    source = ResNet(8, 10, spec.mean, spec.std, flags.get("shortcut"), flags.get("zero_init", False))
    model = Plain(flags.get("shortcut", "padding")).double()
    model.load_state_dict(source.state_dict())
    frozen = [model.conv1, model.bn1, model.layer1] if flags.get("freeze") else []
    for part in frozen:
        part.requires_grad_(False)
    mean, std = torch.tensor(spec.mean), 1 / (1 / torch.tensor(spec.std)).double()
    learned = [p for p in model.parameters() if p.requires_grad]
    momentum = {"sgd": 0.0}.get(flags["optimizer"], 0.9)
    optimizer = torch.optim.SGD(
        learned, 0.05, momentum, weight_decay=flags["weight_decay"], nesterov=flags["optimizer"] == "nesterov"
    )
    schedule = etude.optim.schedule(flags["schedule"], flags["learning_rate"], 4)
    losses, seen, first = [], [], None
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule(step)
        x, y = shown(data, step, 6, flags["shift"], flags.get("flip", False))
        model.train()
        for part in frozen:
            part.eval()
        loss = F.cross_entropy(model((x / 255 - mean.double()) / std), y)
        optimizer.zero_grad()
        loss.backward()
        if not step:
            convolutions = [model.conv1, *(stage[0].conv1 for stage in (model.layer1, model.layer2, model.layer3))]
            first = [float(c.weight.grad.norm()) for c in convolutions if c.weight.grad is not None]
        optimizer.step()
        losses.append(loss.item())
        if step in (2, 3):
            model.eval()
            with torch.no_grad():
                logits = model((small.validation.x.double() / 255 - mean.double()) / std)
            loss, right = F.cross_entropy(logits, small.validation.y), logits.argmax(1) == small.validation.y
            seen.append((step + 1, loss.item(), right.double().mean().item()))
    rows = rows_of(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-7)
    found = [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows if len(row) > 2]
    for mine, theirs in zip(found, seen, strict=True):
        assert mine == pytest.approx(theirs, rel=3e-6)
    for name, value in state_of(done.folder).items():
        torch.testing.assert_close(value.double(), model.state_dict()[name].double(), rtol=1e-6, atol=1e-8)
    first = [norm for norm in first if norm]  # a block that begins as the identity passes nothing on
    assert done.metrics["gradient_spread"] == pytest.approx(max(first) / min(first) if first else 1, rel=1e-5)


def test_reported_numbers_are_those_of_the_saved_network(small, tmp_path):
    done = etude.run("vision/resnet", **TINY, **SMALL, out=tmp_path / "run")
    model, last = etude.load(done.folder).model, rows_of(done.folder)[-1]
    assert set(done.metrics) == {"test_loss", "test_accuracy", "gradient_spread"}
    for said, part, numbers in (("test", small.test, done.metrics), ("validation", small.validation, last)):
        with torch.no_grad():
            logits = model(part.x)
        assert numbers[f"{said}_loss"] == pytest.approx(float(F.cross_entropy(logits, part.y)), rel=1e-5)
        assert numbers[f"{said}_accuracy"] == pytest.approx(float((logits.argmax(1) == part.y).double().mean()))
    norms = etude.load(done.folder).state["first"]["slopes"]
    assert done.metrics["gradient_spread"] == pytest.approx(float(norms.max() / norms.min()))


def test_loop_goes_on_where_it_was_killed(small, tmp_path, monkeypatch):
    whole = etude.run("vision/resnet", **TINY, **SMALL, out=tmp_path / "whole")
    average = Run.average

    def dying(run, *modules, **scalars):
        if run.step == 2:
            raise SystemExit
        return average(run, *modules, **scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "average", dying)
        with pytest.raises(SystemExit):
            etude.run("vision/resnet", **TINY, **SMALL, save_every=1, out=tmp_path / "killed")
    again = etude.resume(tmp_path / "killed")
    assert rows_of(whole.folder) == rows_of(again.folder)
    assert whole.metrics == again.metrics


def test_loop_begins_with_the_weights_of_a_run_and_sees_as_it_did(small, tmp_path):
    one = etude.run("vision/resnet", **TINY, **SMALL, out=tmp_path / "one")
    other = Images("", small.train, small.validation, small.test, small.spec.__class__(
        small.spec.shape, small.spec.classes, (0.9,), (0.9,)), "")  # fmt: skip
    assert other.spec.mean != small.spec.mean
    two = etude.run(
        "vision/resnet", **TINY, **SMALL | {"steps": 1, "freeze": 4}, init=str(one.folder), out=tmp_path / "two"
    )
    before, after = state_of(one.folder), state_of(two.folder)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    with pytest.raises(UserError, match="another network"):
        etude.run("vision/resnet", **TINY, **SMALL | {"depth": 14}, init=str(one.folder), out=tmp_path / "three")


def test_predict_names_the_classes(small, tmp_path):
    done = etude.run("vision/resnet", **TINY, **SMALL, out=tmp_path / "run")
    said = etude.load(done.folder).predict(small.test.x[:3])
    with torch.no_grad():
        wanted = etude.load(done.folder).model(small.test.x[:3]).argmax(1)
    assert [row["class"] for row in said] == [small.spec.classes[int(k)] for k in wanted]
