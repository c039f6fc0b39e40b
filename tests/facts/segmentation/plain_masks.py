"""Training on masks written out with torch's own parts, against which the loops of segmentation are held. Not a test."""

import json

import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import nn
from torch.nn import functional as F

from etude.blocks.nn.dropout import Dropout
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.data.batches import Stream
from etude.segmentation.parts.scenes import Part, Scenes, draw, read
from etude.segmentation.parts.scores import rand_error, segments


def few(train=7, test=3, noise=0):
    """A few canvases of digits in each split: what a run finds under --data digits, or that under noise below this."""
    data, cut = read("digits"), []
    for part, count in ((data.train, train), (data.validation, 2), (data.test, test)):
        generator = torch.Generator().manual_seed(count)
        x = (
            [x // 2 + torch.randint(noise + 1, x.shape, generator=generator).byte() for x in part.x[:count]]
            if noise
            else part.x
        )
        cut.append(Part(x[:count], part.y[:count]))
    return Scenes(data.name, *cut, data.spec, data.source)


def batch(part, step, size, side, margin=0, turns="none"):
    """The crops of a step, by numpy's padding and slices of each picture."""
    chances = torch.rand(size, 3, generator=generator(0, step, 0, "crops")).tolist()
    xs, ys = [], []
    for index, (down, across, turn) in zip(Stream(len(part), size, 0).indices(step).tolist(), chances):
        x, y = part.x[index].double()[None] / 255, part.y[index].double()[None, None]
        x, y = (F.pad(part, (margin,) * 4, mode="reflect")[0] if margin else part[0] for part in (x, y))
        whole = side + 2 * margin
        top, left = int(down * (x.shape[-2] - whole + 1)), int(across * (x.shape[-1] - whole + 1))
        x, y = (part[:, top : top + whole, left : left + whole] for part in (x, y))
        if turns != "none":
            x, y = (part.flip(-1) if turn >= 0.5 else part for part in (x, y))
        if turns == "all":
            x, y = (part.rot90(int(turn * 8) % 4, (1, 2)) for part in (x, y))
        xs.append(x)
        ys.append(y[0, margin : margin + side, margin : margin + side].long())
    return torch.stack(xs), torch.stack(ys)


def loss_of(z, y, weight=None):
    """Mean over the pixels that are not 255, one after the other."""
    kept = y != 255
    return F.cross_entropy(z.movedim(1, -1)[kept], y[kept], weight)


def began(build, config, spec):
    """The network with the weights that a run of seed 0 begins with."""
    torch.manual_seed(fold(0, 0, 0, "init"))
    return build(config, spec)["model"]


def scores(model, part, spec):
    """Every number that is returned, one picture after the other."""
    truth, said, rand, total = [], [], [], 0.0
    for x, y in zip(part.x, part.y):
        with torch.no_grad():
            z = model(x[None])
        y, answer = y.long(), z[0].argmax(0)
        kept = y != 255
        total += float(F.cross_entropy(z[0].movedim(0, -1)[kept], y[kept], reduction="sum"))
        truth.append(y[kept])
        said.append(answer[kept])
        rand.append(rand_error(segments(y.byte().numpy()), segments(answer.byte().numpy())))
    truth, said = torch.cat(truth), torch.cat(said)
    found = {
        "loss": total / len(truth),
        "pixel_accuracy": accuracy_score(truth, said),
        "mean_iou": jaccard_score(truth, said, average="macro", zero_division=0),
    }
    return found | ({"rand_error": sum(rand) / len(rand)} if spec.extra["segments"] else {})


def near(expected, prefix):
    """These scores under a prefix: exactly those, but the loss, which is summed in float32."""
    close = {True: 1e-6, False: 1e-12}
    return {f"{prefix}{name}": pytest.approx(value, rel=close[name == "loss"]) for name, value in expected.items()}


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder):
    return checkpoint.load(folder / "checkpoints")[1]["model"]


OPTIMIZERS = {
    "sgd": lambda p, **s: torch.optim.SGD(p, **s),
    "momentum": lambda p, **s: torch.optim.SGD(p, momentum=0.9, **s),
    "adam": lambda p, **s: torch.optim.Adam(p, **s),
    "adamw": lambda p, **s: torch.optim.AdamW(p, **s),
}


def replay(model, config, weight=None, steps=3, data=None):
    """The first steps of a run of seed 0, its rate falling to zero in a line: the loss before each, and after two the scores."""
    data, losses, found = data or few(), [], {}
    for name, part in [*model.named_modules()]:
        if isinstance(part, Dropout):
            model.set_submodule(name, nn.Dropout(part.p))
    model.to(memory_format=torch.channels_last)  # dropout draws in its order
    make = OPTIMIZERS[config.optimizer]
    optimizer = make(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / steps)
        x, y = batch(data.train, step, config.batch, config.crop, model.margin, config.turns)
        torch.manual_seed(fold(0, step, 0, "step"))
        loss = loss_of(model.train()(x), y, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1 and not model.margin:
            found = scores(model.eval(), data.validation, read("digits").spec)
    return losses, found


__all__ = ["batch", "began", "draw", "few", "log", "loss_of", "near", "replay", "scores", "state_of"]
