"""Training of a network on moved and mirrored images, written out with torch's own parts; not a test itself.

`runpy.run_path` brings it into the tests of the methods whose batches come from `etude.vision.parts.augmented`.
"""

import json

import torch
from torch.nn import functional as F

import etude
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.data import images
from etude.data.batches import Stream
from etude.data.sets import Images, Split

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, rate, **more: torch.optim.SGD(p, rate, momentum=0.9, **more),
    "nesterov": lambda p, rate, **more: torch.optim.SGD(p, rate, momentum=0.9, nesterov=True, **more),
    "adam": torch.optim.Adam,
}


def some_digits(size, counts=(40, 30, 30)):
    """The first training, validation and test digits, resized."""
    whole = images("digits", size)
    cut = [Split(part.x[:n], part.y[:n]) for part, n in zip((whole.train, whole.validation, whole.test), counts)]
    return Images(whole.name, *cut, whole.spec, whole.source)


def subset(data, count, spec):
    """The training images that a run with seed 0 and `--examples` sees; `spec` is that of the run."""
    kept = torch.randperm(len(data.train), generator=generator(0, 0, 0, "training subset"))[:count]
    return Images("", Split(data.train.x[kept], data.train.y[kept]), data.validation, data.test, spec, "")


def shown(data, step, batch, shift, flip):
    """Images and labels of a step of a run with seed 0, one image after the other."""
    index = Stream(len(data.train), batch, 0).indices(step)
    stream = generator(0, step, 0, "augment")
    places = torch.randint(2 * shift + 1, (2, batch), generator=stream)
    turned = torch.randint(2, (1, batch), generator=stream)[0]
    height, width = data.train.x.shape[2:]
    colour = torch.tensor(data.spec.mean).mul(255).round().double()[:, None, None]
    pictures = []
    for row, number in enumerate(index):
        wide = F.pad(data.train.x[number].double() - colour, (shift,) * 4) + colour
        top, left = int(places[0, row]), int(places[1, row])
        picture = wide[:, top : top + height, left : left + width]
        pictures.append(picture.flip(-1) if flip and turned[row] else picture)
    return torch.stack(pictures), data.train.y[index]


def unit(x, spec):
    """(x/255 − mean) / deviation, of uint8 or floating (N, C, H, W) in [0, 255], in float64."""
    mean, scale = torch.tensor(spec.mean).double(), (1 / torch.tensor(spec.std)).double()
    return (x.double() / 255 - mean[:, None, None]) * scale[:, None, None]


def train(model, data, *, steps, batch, evaluated=(), shift=0, flip=False, optimizer="momentum", learning_rate=0.1,
          schedule="one_cycle", weight_decay=0.0, frozen=(), **_others):  # fmt: skip
    """Losses of all steps and (step, loss, accuracy) on validation behind those `evaluated`; the model is trained in place."""
    rule = OPTIMIZERS[optimizer](
        [p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=weight_decay
    )
    rate = etude.optim.schedule(schedule, learning_rate, steps)
    losses, rows = [], []
    for step in range(steps):
        rule.param_groups[0]["lr"] = rate(step)
        x, y = shown(data, step, batch, shift, flip)
        torch.manual_seed(fold(0, step, 0, "step"))  # of the masks of dropout
        model.train()
        for part in frozen:
            part.eval()
        loss = F.cross_entropy(model(unit(x, data.spec)), y)
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(loss.item())
        if step in evaluated:
            rows.append((step + 1, *score(model, data.validation, data.spec)))
    return losses, rows


@torch.no_grad()
def score(model, split, spec):
    """Mean cross-entropy and accuracy in evaluation mode."""
    logits = model.eval()(unit(split.x, spec))
    return F.cross_entropy(logits, split.y).item(), (logits.argmax(1) == split.y).double().mean().item()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validated(folder):
    """(step, loss, accuracy) of every evaluation on record."""
    rows = [row for row in rows_of(folder) if "validation_loss" in row]
    return [(row["step"], row["validation_loss"], row["validation_accuracy"]) for row in rows]


def state_of(folder):
    return checkpoint.load(folder / "checkpoints")[1]["model"]
