"""Sliding windows in plain Python and torch's own layers. Read it with ``runpy``, as `plain.py`."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from etude.core.checkpoint import list_checkpoints, read
from etude.core.randomness import fold
from etude.detection import overfeat, sliding_window
from etude.detection.parts.matching import sample
from etude.detection.parts.scenes import scenes

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
ROOMS = {"sliding_window": sliding_window, "overfeat": overfeat}
ASIDE = {"quiet": True, "seed": 0, "threads": 1}
SMALL = {
    "size": 32,
    "examples": 16,
    "side": 14,
    "width": 4,
    "head_width": 8,
    "windows": 6,
    "steps": 3,
    "batch": 4,
} | ASIDE


def begun(name, flags):
    """Config, data and the network that a run with seed 0 begins with."""
    config = ROOMS[name].Config(**{k: v for k, v in flags.items() if k not in ASIDE})
    data = scenes("digits", config.size, config.examples, config.objects)
    torch.manual_seed(fold(0, 0, 0, "init"))
    return config, data, ROOMS[name].build(config, data.spec)["model"]


def every(size, side, stride, scales, aspects):
    """All windows: the level's height and width, top, left, and the box on the picture."""
    rows = []
    for scale in scales:
        for aspect in aspects:
            high = max(side, round(side / (scale * aspect**0.5)))
            wide = max(side, round(side / (scale / aspect**0.5)))
            top = 0
            while top + side <= high:
                left = 0
                while left + side <= wide:
                    box = (
                        left * size / wide,
                        top * size / high,
                        (left + side) * size / wide,
                        (top + side) * size / high,
                    )
                    rows.append((high, wide, top, left, box))
                    left += stride
                top += stride
    return rows


def crop(x, window, side):
    """One window of one picture (C, S, S) in [0, 1], float64."""
    high, wide, top, left, _ = window
    level = F.interpolate(x[None], (high, wide), mode="bilinear", align_corners=False, antialias=True)[0]
    return level[:, top : top + side, left : left + side]


class Plain(nn.Module):
    """The network of windows in torch's own layers: logits, and codes where there is a regression."""

    def __init__(self, made, spec):
        super().__init__()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (spec.mean, spec.std))
        one, two, three, four = made.features[0], made.features[1], made.features[4], made.features[5]
        self.mean, self.std = mean, std
        self.first = nn.Conv2d(one.in_channels, one.out_channels, 5, bias=False)
        self.norm = nn.BatchNorm2d(one.out_channels)
        self.second = nn.Conv2d(three.in_channels, three.out_channels, 3, bias=False)
        self.other = nn.BatchNorm2d(three.out_channels)
        for new, old in ((self.first, one), (self.norm, two), (self.second, three), (self.other, four)):
            new.load_state_dict(old.state_dict())
        self.hidden, self.scores = made.hidden, made.scores
        self.moves, self.codes = getattr(made, "moves", None), getattr(made, "codes", None)
        self.double()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first((x - self.mean) / self.std))), 2)
        x = F.max_pool2d(F.relu(self.other(self.second(x))), 3).flatten(1)
        scores = self.scores(F.relu(self.hidden(x)))
        return scores if self.codes is None else (scores, self.codes(F.relu(self.moves(x.detach()))))


def square(box):
    """The square around a box, four numbers each."""
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, max(box[2] - box[0], box[3] - box[1]) / 2
    return (x - half, y - half, x + half, y + half)


def chosen(config, rows, boxes, labels, step, around=lambda box: box):
    """(picture, window, owner or −1) of a mini-batch's windows that count; `sample` draws, the overlaps are written out."""
    assigned = torch.full((len(boxes), len(rows)), -2)
    for n in range(len(boxes)):
        real = [(m, around(box)) for m, box in enumerate(boxes[n].tolist()) if labels[n, m] >= 0]
        for w, row in enumerate(rows):
            overlaps = [(plain.overlap(row[4], box), m) for m, box in real]
            best, owner = max(overlaps, key=lambda pair: (pair[0], -pair[1]))
            if best >= config.positive:
                assigned[n, w] = owner
            elif best < config.negative:
                assigned[n, w] = -1
    dice = torch.Generator().manual_seed(fold(0, step, 0, "windows"))
    index, valid = sample(assigned, config.windows, 0.5, dice)
    return [
        (n, w, int(assigned[n, w]))
        for n in range(len(boxes))
        for w, ok in zip(index[n].tolist(), valid[n].tolist())
        if ok
    ]


def trained(config, net, data, loss_of, after):
    """The loop: losses of every step and what `after(step)` says behind each."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=config.weight_decay)
    rates, batch = (
        plain.one_cycle(config.learning_rate, config.steps),
        plain.batches(data.train, config.batch, 0, config.flip),
    )
    losses, seen, clipped = [], [], 0
    net.train()
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        loss = loss_of(step, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            clipped += bool(nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm) > config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == config.steps or (config.evaluate_every and (step + 1) % config.evaluate_every == 0):
            net.eval()
            seen.append((step + 1, after()))
            net.train()
    assert clipped or config.clip_norm is None or config.clip_norm > 1
    return losses, seen


def saved(folder):
    state = read(list_checkpoints(folder / "checkpoints")[-1])["model"]
    return torch.cat([v.double().flatten() for k, v in state.items() if k.endswith(("weight", "bias"))])


def localised(found, part):
    """Share of pictures whose first detection has the class of an object that it overlaps by half."""
    right = 0
    for (boxes, _, kinds), truth, labels in zip(found, part.boxes.tolist(), part.labels.tolist()):
        kind, box = int(kinds[0, 0]), boxes[0, 0].tolist()
        right += any(k == kind and k >= 0 and plain.overlap(box, t) >= 0.5 for t, k in zip(truth, labels))
    return right / len(part)


def worth(found, part, split):
    return plain.worth(found, part, split) | {f"{split}_localisation": localised(found, part)}


def scored(config, net, rows, part):
    """Detections of sliding windows, window by window."""
    out = []
    for x in part.x.double() / 255:
        with torch.no_grad():
            chance = net(torch.stack([crop(x, row, config.side) for row in rows])).softmax(-1)[:, :-1].tolist()
        boxes = [[min(max(v, 0.0), config.size) for v in row[4]] for row in rows]
        candidates = [(box, p, kind) for box, row in zip(boxes, chance) for kind, p in enumerate(row)]
        out.append(plain.chosen(candidates, config.least_score, config.overlap))
    return out


def match(a, b):
    """1 − IoU plus the distance of the centres in sides."""
    mean = ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) / 2
    x, y = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    return 1 - plain.overlap(a, b) + ((x * x + y * y) / mean) ** 0.5


def merged(rows, threshold):
    """Rows [box, confidence, class]: all pairs looked at again after every merge."""
    rows = [list(row) for row in rows]
    while True:
        pairs = [
            (match(rows[i][0], rows[j][0]), i, j)
            for i in range(len(rows)) for j in range(i + 1, len(rows)) if rows[i][2] == rows[j][2]
        ]  # fmt: skip
        if not pairs or min(pairs)[0] > threshold:
            return sorted(rows, key=lambda row: -row[1])
        _, i, j = min(pairs)
        rows[i][0] = [(p + q) / 2 for p, q in zip(rows[i][0], rows[j][0])]
        rows[i][1] += rows[j][1]
        del rows[j]


def overfeat_found(config, net, rows, part):
    """Detections of OverFeat, window by window, and every window's box: lists over the pictures."""
    out, all_boxes = [], []
    for x in part.x.double() / 255:
        with torch.no_grad():
            scores, codes = net(torch.stack([crop(x, row, config.side) for row in rows]))
        boxes = [plain.decoded(code, row[4], config.size) for code, row in zip(codes.tolist(), rows)]
        all_boxes.append(torch.tensor(boxes))
        chance = scores.softmax(-1)[:, :-1].tolist()
        candidates = [
            (b, p, kind) for b, line in zip(boxes, chance) for kind, p in enumerate(line) if p > config.least_score
        ]
        left = merged(sorted(candidates, key=lambda row: -row[1])[:200], config.match)[:100]
        found = torch.zeros(1, 100, 4), torch.zeros(1, 100), torch.full((1, 100), -1)
        for place, (box, total, kind) in enumerate(left):
            found[0][0, place], found[1][0, place], found[2][0, place] = torch.tensor(box), total / (1 + total), kind
        out.append(found)
    return out, all_boxes
