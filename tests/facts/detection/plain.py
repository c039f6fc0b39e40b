"""Detectors in plain Python, one box at a time. Read it with
``plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))``.
"""

import json
import math

import torch
from torch import nn

from etude.core.randomness import fold
from etude.data.batches import Stream
from etude.detection.parts.average_precision import voc


def overlap(a, b):
    """IoU of two boxes given as four numbers."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def greedy(boxes, scores, threshold, classes):
    """Indices that stay, best first."""
    kept = []
    for n in sorted(range(len(scores)), key=lambda n: (-scores[n], n)):
        if all(classes[n] != classes[m] or overlap(boxes[n], boxes[m]) <= threshold for m in kept):
            kept.append(n)
    return kept


def chosen(rows, least, threshold, most=100):
    """The detections of a picture from rows of (box, score, class), as the padded tensors of `pick`, batch of one."""
    rows = [row for row in sorted(rows, key=lambda row: -row[1])[:most] if row[1] > least]
    kept = greedy([r[0] for r in rows], [r[1] for r in rows], threshold, [r[2] for r in rows])
    boxes, scores, kinds = torch.zeros(1, most, 4), torch.zeros(1, most), torch.full((1, most), -1)
    for place, n in enumerate(kept):
        boxes[0, place] = torch.tensor(rows[n][0])
        scores[0, place], kinds[0, place] = rows[n][1], rows[n][2]
    return boxes, scores, kinds


def layers(trunk, spec):
    """A Trunk's layers as torch's own, with its weights: float64 pictures in [0, 1] → features."""

    class Shift(nn.Module):
        def forward(self, x):
            mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (spec.mean, spec.std))
            return (x - mean) / std

    made = [Shift()]
    for block in trunk.layers:
        old, norm = block[0], block[1]
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, 1, bias=False)
        new.load_state_dict(old.state_dict())
        other = nn.BatchNorm2d(old.out_channels)
        other.load_state_dict(norm.state_dict())
        made += [new, other, nn.LeakyReLU(0.1)]
    return nn.Sequential(*made).double()


def batches(part, batch, seed, flip=False):
    """step → (pictures in [0, 1] float64, boxes, labels), mirrored one by one."""

    def at(step):
        index = Stream(len(part), batch, seed).indices(step)
        x, boxes, labels = part.x[index].double() / 255, part.boxes[index].clone(), part.labels[index]
        if flip:
            turn = torch.rand(len(x), generator=torch.Generator().manual_seed(fold(seed, step, 0, "mirror"))) < 0.5
            for n in range(len(x)):
                if turn[n]:
                    x[n] = x[n].flip(-1)
                    boxes[n, :, [0, 2]] = x.shape[-1] - boxes[n][:, [2, 0]]
        return x, boxes, labels

    return at


def one_cycle(peak, total):
    """The rates of torch's OneCycleLR."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, cycle_momentum=False)
    out = []
    for _ in range(total):
        out.append(rates.get_last_lr()[0])
        optimizer.step()
        rates.step()
    return out


def worth(found, part, split):
    """map, map_75 and recall of a split, from detections of all its pictures."""
    found = tuple(torch.cat(rows) for rows in zip(*found))
    loose, tight = (voc(found, part.boxes, part.labels, part.difficult, t) for t in (0.5, 0.75))
    recall = sum(loose.recall.values()) / len(loose.recall)
    return {f"{split}_map": loose.mean, f"{split}_map_75": tight.mean, f"{split}_recall": recall}


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def yolo_loss(out, boxes, labels, count, size, coordinate, no_object):
    """YOLO's loss, one object and one box at a time, from the objects themselves; differentiable in `out`."""
    cells, total = out.shape[1], out.sum() * 0
    for n in range(len(out)):
        owner = {}
        for box, kind in zip(boxes[n].tolist(), labels[n].tolist()):
            column, row = (int((box[i] + box[i + 2]) / 2 / size * cells) for i in (0, 1))
            if kind >= 0 and (row, column) not in owner:
                owner[row, column] = (box, kind)
        for row in range(cells):
            for column in range(cells):
                said = out[n, row, column]
                places = [said[5 * b : 5 * b + 5] for b in range(count)]
                responsible = None
                if (row, column) in owner:
                    box, kind = owner[row, column]
                    overlaps = []
                    for place in places:
                        x, y, w, h, _ = place.tolist()
                        cx, cy = (column + x) * size / cells, (row + y) * size / cells
                        wide, high = w * w * size / 2, h * h * size / 2
                        overlaps.append(overlap((cx - wide, cy - high, cx + wide, cy + high), box))
                    responsible = overlaps.index(max(overlaps))
                    x1, y1, x2, y2 = box
                    x, y, w, h, c = places[responsible]
                    aim_x, aim_y = (x1 + x2) / 2 / size * cells - column, (y1 + y2) / 2 / size * cells - row
                    total = total + coordinate * ((x - aim_x) ** 2 + (y - aim_y) ** 2)
                    total = total + coordinate * ((w - ((x2 - x1) / size) ** 0.5) ** 2)
                    total = total + coordinate * ((h - ((y2 - y1) / size) ** 0.5) ** 2)
                    total = total + (c - overlaps[responsible]) ** 2
                    total = total + sum((p - float(k == kind)) ** 2 for k, p in enumerate(said[5 * count :]))
                for b in range(count):
                    if b != responsible:
                        total = total + no_object * places[b][4] ** 2
    return total / len(out)


def align(features, boxes, size, scale, samples):
    """RoIAlign region by region: every point between its four cells, the points of a bin averaged."""
    n_, c_, h, w = features.shape
    out = torch.zeros(n_, boxes.shape[1], c_, size, size, dtype=features.dtype)
    steps = (torch.arange(size * samples, dtype=torch.float64) + 0.5) / (size * samples)
    for n in range(n_):
        for r, (x1, y1, x2, y2) in enumerate((boxes[n] * scale).tolist()):
            y, x = y1 - 0.5 + steps * (y2 - y1), x1 - 0.5 + steps * (x2 - x1)
            inside = ((y >= -1) & (y <= h))[:, None] & ((x >= -1) & (x <= w))
            y, x = y.clamp(0, h - 1), x.clamp(0, w - 1)
            a, b = y.long(), x.long()
            a2, b2, down, across = (a + 1).clamp(max=h - 1), (b + 1).clamp(max=w - 1), (y - a)[:, None], x - b
            f = features[n]
            upper = f[:, a][:, :, b] * (1 - across) + f[:, a][:, :, b2] * across
            lower = f[:, a2][:, :, b] * (1 - across) + f[:, a2][:, :, b2] * across
            point = (upper * (1 - down) + lower * down) * inside
            out[n, r] = point.view(c_, size, samples, size, samples).mean((2, 4))
    return out


def pool(features, boxes, size, scale):
    """Maximum of each bin, cell by cell; edges of bins as exact fractions."""
    n_, c_, h, w = features.shape
    out = torch.zeros(n_, boxes.shape[1], c_, size, size, dtype=features.dtype)
    for n in range(n_):
        for r, box in enumerate((boxes[n] * scale).tolist()):
            x1, y1, x2, y2 = (math.floor(v + 0.5) for v in box)
            high, wide = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
            for p in range(size):
                for q in range(size):
                    ys = [y for y in range(h) if p * high // size <= y - y1 < -(-(p + 1) * high // size)]
                    xs = [x for x in range(w) if q * wide // size <= x - x1 < -(-(q + 1) * wide // size)]
                    if ys and xs:
                        out[n, r, :, p, q] = features[n][:, ys][:, :, xs].amax((1, 2))
    return out


def encoded(b, a):
    """The code of box b relative to a, four numbers each."""
    (bw, bh), (aw, ah) = ((v[2] - v[0], v[3] - v[1]) for v in (b, a))
    across = ((b[0] + b[2]) / 2 - (a[0] + a[2]) / 2) / aw
    down = ((b[1] + b[3]) / 2 - (a[1] + a[3]) / 2) / ah
    return [across, down, math.log(bw / aw), math.log(bh / ah)]


def decoded(code, a, size):
    """The inverse, cut at the picture's edge."""
    w, h = a[2] - a[0], a[3] - a[1]
    x, y = (a[0] + a[2]) / 2 + code[0] * w, (a[1] + a[3]) / 2 + code[1] * h
    half_w, half_h = math.exp(code[2]) * w / 2, math.exp(code[3]) * h / 2
    return [min(max(v, 0.0), size) for v in (x - half_w, y - half_h, x + half_w, y + half_h)]


def region_loss(scores, codes, chosen, classes, weight):
    """Fast R-CNN's loss, region by region, by torch's own functions."""
    total, counted = 0.0, 0
    for row, kind in enumerate(chosen.kinds.flatten().tolist()):
        if kind < 0:
            continue
        counted += 1
        total = total + nn.functional.cross_entropy(scores[row : row + 1], torch.tensor([kind]))
        if kind < classes:
            code = chosen.codes.flatten(0, 1)[row]
            total = total + weight * nn.functional.smooth_l1_loss(
                codes[row].view(classes, 4)[kind], code, reduction="sum"
            )
    return total / counted


def heads(made):
    """The two heads as torch's own layers, with the weights of `made`: features → (scores, codes (K, 4C))."""
    body = nn.Sequential(made.hidden[0], nn.ReLU(), made.hidden[2], nn.ReLU()).double()
    scores, codes = made.scores.double(), made.codes.double()

    def both(x):
        x = body(x)
        return scores(x), codes(x)

    return both


def region_answers(scores, codes, regions, size, least, threshold):
    """Detections from heads on regions, picture by picture: scores (N, R, C + 1), codes (N, R, 4C)."""
    rows = []
    for said, moved, places in zip(scores.softmax(-1), codes, regions.tolist()):
        candidates = []
        for chance, code, place in zip(said.tolist(), moved.tolist(), places):
            for kind, p in enumerate(chance[:-1]):
                if place[2] > place[0]:
                    own = [d * v for d, v in zip((0.1, 0.1, 0.2, 0.2), code[4 * kind : 4 * kind + 4])]
                    candidates.append((decoded(own, place, size), p, kind))
        rows.append(chosen(candidates, least, threshold))
    return rows
