"""Detectors in plain Python, one box at a time. Read it with
``plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))``.
"""

import json

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
