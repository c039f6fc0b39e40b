"""A classifier's training written out with torch's own parts, against which the loops of etude are held.

Not a test itself: `runpy.run_path` brings it into the tests of the methods. Only the documented random streams are
etude's: the order of the images, a member's seed, its bootstrap sample, the shift of an image, the seed of a step.
"""

import copy
import json
import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from etude.basics.mlp import Config, build
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.data.batches import Stream


class Pixels(nn.Module):
    """(x/255 − mean) / deviation."""

    def __init__(self, spec):
        super().__init__()
        self.mean, self.std = torch.tensor(spec.mean).double(), torch.tensor(spec.std)

    def forward(self, x):
        return (x.double() / 255 - self.mean) * (1 / self.std).double()


class Classic(nn.Module):
    """Units dropped in training without scaling, all of them multiplied by the keep probability at test."""

    def __init__(self, p):
        super().__init__()
        self.keep = 1 - p

    def forward(self, x):
        return x * torch.empty_like(x).bernoulli_(self.keep) if self.training else x * self.keep


def networks(
    count, spec, widths, activation="relu", dropout=0.0, dropout_style="inverted", normalizer="none", **_others
):
    """torch's own layers, begun with the weights that a run with seed 0 begins with."""
    torch.manual_seed(fold(0, 0, 0, "init"))
    config = Config(widths=widths, activation=activation, dropout=dropout, normalizer=normalizer)
    sources, made = [build(config, spec)["model"] for _ in range(count)], []
    for source in sources:
        layers = [nn.Flatten()]
        for before, after in zip((64, *widths), widths):
            layers.append(nn.Linear(before, after, bias=normalizer != "batch"))
            layers += {"none": [], "batch": [nn.BatchNorm1d(after)], "layer": [nn.LayerNorm(after)]}[normalizer]
            layers.append({"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout) if dropout_style == "inverted" else Classic(dropout))
        layers = nn.Sequential(*layers, nn.Linear((64, *widths)[-1], 10))
        layers.load_state_dict(source.layers.state_dict())
        made.append(nn.Sequential(Pixels(spec), *layers).double())
    return made


def flat(module):
    """All numbers of a module's state, in order."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return torch.cat([value.double().flatten() for value in state.values()])


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder):
    return checkpoint.load(folder / "checkpoints")[1]["model"]


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, rate, **more: torch.optim.SGD(p, rate, momentum=0.9, **more),
    "nesterov": lambda p, rate, **more: torch.optim.SGD(p, rate, momentum=0.9, nesterov=True, **more),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def rates(schedule, peak, steps, cycles):
    """The learning rate of every step."""
    if schedule == "one_cycle":
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], peak)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, cycle_momentum=False)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(found) < steps:
                scheduler.step()
        return found
    cycle = math.ceil(steps / cycles)
    wave = {
        "constant": lambda s: 1.0,
        "linear": lambda s: 1 - s / steps,
        "cosine": lambda s: (1 + math.cos(math.pi * s / steps)) / 2,
        "cyclic": lambda s: (1 + math.cos(math.pi * (s % cycle) / cycle)) / 2,
    }[schedule]
    return [peak * wave(s) for s in range(steps)]


def shifted(x, most, seed, step, member):
    """Every image moved down and across by a number of pixels of its own, zeros behind it."""
    draw = generator(seed, step, 0, f"shift {member}" if member else "shift")
    down, across = (torch.randint(2 * most + 1, (len(x),), generator=draw) for _ in range(2))
    moved = torch.zeros_like(x)
    height, width = x.shape[2:]
    for i in range(len(x)):
        top, left = most - int(down[i]), most - int(across[i])
        for row in range(height):
            for column in range(width):
                if 0 <= row - top < height and 0 <= column - left < width:
                    moved[i, :, row, column] = x[i, :, row - top, column - left]
    return moved


def answer(logits, how):
    """log-probabilities of (M, N, C) logits of M members; of a single network, its own."""
    if how == "vote":
        votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
        return ((votes + 1) / (len(logits) + logits.shape[-1])).log()
    return logits.softmax(-1).mean(0).log()


@torch.no_grad()
def score(networks, split, how="probability"):
    """Loss and accuracy of networks in evaluation mode on a whole split; they are left as they were."""
    still = [copy.deepcopy(network).eval() for network in networks]
    logp = answer(torch.stack([network(split.x) for network in still]), how)
    right = (logp.argmax(1) == split.y).double().mean()
    return float(-logp[torch.arange(len(split.y)), split.y].mean()), float(right)


def train(
    networks, data, *, steps, batch, seed=0, optimizer="adam", learning_rate=1e-3, schedule="constant", weight_decay=0.0,
    clip_norm=None, clip_value=None, ensemble="none", combine="probability", shift=0, evaluate_every=0, trunk=None,
    **_others,
):  # fmt: skip
    """Train `networks` (one, members with everything of their own, or heads on a `trunk`) as the settings say.

    Returns `losses` (mean of the members) of every step, `rows` of (step, loss, accuracy) on validation, `members`
    as they answer in the end (the networks, or the snapshots taken of one), and how often a gradient was `clipped`.
    """
    together = [networks] if ensemble == "heads" else [[network] for network in networks]
    trunk = trunk if ensemble == "heads" else nn.Identity()
    parameters = [[*trunk.parameters(), *(p for n in group for p in n.parameters())] for group in together]
    rules = [OPTIMIZERS[optimizer](group, learning_rate, weight_decay=weight_decay) for group in parameters]
    count, cycles = len(data.train.y), networks[0].snapshots if ensemble == "snapshots" else 5
    streams = [Stream(count, batch, fold(seed, m, 0, "member") if m else seed) for m in range(len(together))]
    drawn = [torch.arange(count)] * len(together)
    if ensemble == "bagging":
        drawn = [
            torch.randint(count, (count,), generator=generator(seed, m, 0, "bootstrap")) for m in range(len(together))
        ]
    moments = []
    if ensemble == "snapshots":
        cycle, gap = math.ceil(steps / cycles), max(1, steps // (2 * cycles))
        ends = {"cyclic": [min((k + 1) * cycle, steps) - 1 for k in range(cycles)],
                "constant": [steps - 1 - k * gap for k in range(cycles)]}  # fmt: skip
        moments = ends[schedule]
    losses, rows, taken, clipped = [], [], [], 0
    for step, rate in enumerate(rates(schedule, learning_rate, steps, cycles)):
        torch.manual_seed(fold(seed, step, 0, "step"))  # of the masks of dropout
        each = []
        for member, group in enumerate(together):
            index = drawn[member][streams[member].indices(step)]
            x, y = data.train.x[index], data.train.y[index]
            x = shifted(x, shift, seed, step, member) if shift else x
            features = trunk.train()(x)
            each.append([F.cross_entropy(network.train()(features), y) for network in group])
        for group, rule, values in zip(parameters, rules, each):
            for settings in rule.param_groups:
                settings["lr"] = rate
            rule.zero_grad()
            sum(values).backward()
            if clip_norm is not None:
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in group))  # torch's own adds 1e-6 to it
                clipped += norm > clip_norm
                for p in group:
                    p.grad *= min(1, clip_norm / norm)
            if clip_value is not None:
                clipped += any(float(p.grad.abs().max()) > clip_value for p in group)
                nn.utils.clip_grad_value_(group, clip_value)
            rule.step()
        if step in moments:
            taken.append(copy.deepcopy(networks[0]))
        losses.append(float(torch.stack([value for values in each for value in values]).detach().mean()))
        if step == steps - 1 or (evaluate_every and (step + 1) % evaluate_every == 0):
            answering = [nn.Sequential(trunk, network) for network in networks] if ensemble == "heads" else networks
            rows.append((step + 1, *score(taken or answering, data.validation, combine)))
    return SimpleNamespace(losses=losses, rows=rows, members=taken or networks, trunk=trunk, clipped=clipped)
