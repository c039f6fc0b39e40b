"""Whole runs of the region detectors against the same training written out with torch's own parts, in float64.

Which regions a mini-batch looks at is drawn by the proved `sample`; everything else is written again.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.core.checkpoint import list_checkpoints, read
from etude.core.randomness import fold
from etude.detection import fast_rcnn, faster_rcnn, rcnn
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.heads import chosen_regions
from etude.detection.parts.matching import assign, sample
from etude.detection.parts.scenes import scenes
from etude.detection.parts.selective_search import selective_search

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
ROOMS = {"fast_rcnn": fast_rcnn, "faster_rcnn": faster_rcnn, "rcnn": rcnn}
ASIDE = {"quiet": True, "seed": 0, "threads": 1}
SMALL = {"size": 32, "examples": 16, "width": 4, "steps": 3, "batch": 4, "hidden": 8, "regions": 6, "proposals": 9}
SMALL |= ASIDE


def begun(name, flags):
    """Config, data and the network that a run with seed 0 begins with."""
    room = ROOMS[name]
    config = room.Config(**{k: v for k, v in flags.items() if k not in ASIDE})
    data = scenes("digits", 32, config.examples, config.objects)
    torch.manual_seed(fold(0, 0, 0, "init"))
    return config, data, room.build(config, data.spec)["model"]


def dice(step):
    return torch.Generator().manual_seed(fold(0, step, 0, "regions"))


def turned(regions, step, batch):
    """The mirrored regions of the pictures that the mini-batch mirrors."""
    turn = torch.rand(batch, generator=torch.Generator().manual_seed(fold(0, step, 0, "mirror"))) < 0.5
    out = regions.clone()
    out[turn, :, 0], out[turn, :, 2] = 32 - regions[turn, :, 2], 32 - regions[turn, :, 0]
    return out


def whole(net, trunk):
    """The network with torch's own trunk in place of its trunk."""
    return nn.ModuleList([trunk, *(part for name, part in net.named_children() if name != "trunk")])


def trained(config, net, data, loss_of):
    """The loop: losses of every step."""
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1.0, weight_decay=config.weight_decay)
    rates = plain.one_cycle(config.learning_rate, config.steps)
    batch = plain.batches(data.train, config.batch, 0, config.flip)
    losses, clipped = [], 0
    net.train()
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        loss = loss_of(step, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            clipped += bool(nn.utils.clip_grad_norm_(learning, config.clip_norm) > config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    assert clipped or config.clip_norm is None or config.clip_norm > 1
    return losses


def pictures(boxes, labels):
    from etude.detection.parts.scenes import Scene

    return Scene(torch.zeros(len(boxes)), boxes, labels, torch.zeros_like(labels, dtype=torch.bool))


def agree(done, losses, net):
    rows = plain.log(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    saved = read(list_checkpoints(done.folder / "checkpoints")[-1])["model"]
    mine = torch.cat([v.double().flatten() for k, v in saved.items() if k.endswith(("weight", "bias"))])
    theirs = torch.cat([p.detach().flatten().double() for p in net.parameters()])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def worth(done, rows, data, **more):
    expected = plain.worth(rows, data.test, "test") | more
    assert done.metrics == pytest.approx(expected, abs=2e-3)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"pooling": "max", "bins": 3, "flip": True, "clip_norm": 0.05, "box_weight": 2.0, "background_from": 0.05},
    {"pooling": "align", "bins": 2, "clip_norm": None, "weight_decay": 0.1, "overlap": 0.2, "stride": 16},
], ids=str)  # fmt: skip
def test_loop_of_fast_rcnn_is_the_one_written_out(flags, tmp_path):
    """Regions come from the picture and are projected on the map (E39)."""
    done = etude.run("detection/fast_rcnn", **SMALL | flags, out=tmp_path / "run")
    config, data, net = begun("fast_rcnn", SMALL | flags)
    trunk, both, classes = plain.layers(net.trunk, data.spec), plain.heads(net.heads), len(data.spec.classes)
    regions = selective_search(data.train.x, config.proposals)[0]
    stream = plain.Stream(16, config.batch, 0)

    def pooled(features, places):
        made = plain.pool if config.pooling == "max" else lambda *a: plain.align(*a, 2)
        return made(features, places, config.bins, 1 / config.stride).flatten(2).flatten(0, 1)

    def loss_of(step, x, boxes, labels):
        own = regions[stream.indices(step)]
        own = torch.cat([turned(own, step, config.batch) if config.flip else own, boxes], 1)
        chosen = chosen_regions(
            own, pictures(boxes, labels), config.regions, 0.25, config.background_from, classes, dice(step)
        )
        return plain.region_loss(*both(pooled(trunk(x), chosen.boxes.double())), chosen, classes, config.box_weight)

    losses = trained(config, whole(net, trunk), data, loss_of)
    agree(done, losses, whole(net, trunk))
    trunk.eval()
    with torch.no_grad():
        places = selective_search(data.test.x, config.proposals)[0]
        said = both(pooled(trunk(data.test.x.double() / 255), places.double()))
        said = [part.unflatten(0, places.shape[:2]) for part in said]
    rows = plain.region_answers(*said, places, 32, config.least_score, config.overlap)
    worth(done, rows, data, test_proposal_recall=recall_of(places, data.test.boxes, data.test.labels))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"pooling": "align", "bins": 2, "flip": True, "clip_norm": 0.05, "box_weight": 2.0, "scales": (0.3, 0.5)},
    {"pooling": "max", "bins": 3, "clip_norm": None, "weight_decay": 0.1, "aspects": (0.5, 1.0), "scales": (0.4,)},
], ids=str)  # fmt: skip
def test_loop_of_faster_rcnn_is_the_one_written_out(flags, tmp_path):
    """The network's own proposals, decoded and suppressed box by box (E40); no gradient goes through their places."""
    flags = {"anchors": 12, "least_score": 0.05, **flags}
    done = etude.run("detection/faster_rcnn", **SMALL | flags, out=tmp_path / "run")
    config, data, net = begun("faster_rcnn", SMALL | flags)
    near, classes = net.anchors.double(), len(data.spec.classes)
    trunk, both = plain.layers(net.trunk, data.spec), plain.heads(net.heads)
    slide, objectness, codes = net.slide.double(), net.objectness.double(), net.codes.double()

    def said_of(x):
        features = trunk(x)
        slid = torch.relu(slide(features))
        logit = objectness(slid).permute(0, 2, 3, 1).reshape(len(x), -1)
        return features, logit, codes(slid).permute(0, 2, 3, 1).reshape(len(x), -1, 4)

    def proposals(logit, moved):
        out = torch.zeros(len(logit), config.proposals, 4)
        for n in range(len(logit)):
            places = [plain.decoded(c, a, 32) for c, a in zip(moved[n].tolist(), near.tolist())]
            chance = logit[n].sigmoid().tolist()
            large = [i for i, p in enumerate(places) if min(p[2] - p[0], p[3] - p[1]) >= 1]
            best = sorted(large, key=lambda i: -chance[i])[: 6 * config.proposals]
            kept = plain.greedy([places[i] for i in best], [chance[i] for i in best], 0.7, [0] * len(best))
            for row, i in enumerate(kept[: config.proposals]):
                out[n, row] = torch.tensor(places[best[i]])
        return out

    def pooled(features, places):
        made = plain.pool if config.pooling == "max" else lambda *a: plain.align(*a, 2)
        return made(features, places.double(), config.bins, 1 / config.stride).flatten(2).flatten(0, 1)

    def loss_of(step, x, boxes, labels):
        features, logit, moved = said_of(x)
        draw = dice(step)
        overlaps = torch.tensor(
            [[[plain.overlap(a, b) for b in rows] for a in near.tolist()] for rows in boxes.tolist()]
        )
        assigned = assign(overlaps, labels, 0.7, 0.3, rescue=True)
        index, valid = sample(assigned, config.anchors, 0.5, draw)
        total, counted = 0.0, 0
        for n in range(len(x)):
            for a, used in zip(index[n].tolist(), valid[n].tolist()):
                if not used:
                    continue
                owner = int(assigned[n, a])
                counted += 1
                aim = torch.tensor(float(owner >= 0))
                total = total + nn.functional.binary_cross_entropy_with_logits(logit[n, a], aim)
                if owner >= 0:
                    code = torch.tensor(plain.encoded(boxes[n, owner].tolist(), near[a].tolist()))
                    apart = nn.functional.smooth_l1_loss(moved[n, a], code, reduction="sum", beta=1 / 9)
                    total = total + config.box_weight * apart
        places = torch.cat([proposals(logit, moved), boxes], 1)
        chosen = chosen_regions(places, pictures(boxes, labels), config.regions, 0.25, 0.0, classes, draw)
        fast = plain.region_loss(*both(pooled(features, chosen.boxes)), chosen, classes, config.box_weight)
        return total / counted + fast

    losses = trained(config, whole(net, trunk), data, loss_of)
    agree(done, losses, whole(net, trunk))
    trunk.eval()
    with torch.no_grad():
        features, logit, moved = said_of(data.test.x.double() / 255)
        places = proposals(logit, moved)
        said = [part.unflatten(0, places.shape[:2]) for part in both(pooled(features, places))]
    rows = plain.region_answers(*said, places, 32, config.least_score, config.overlap)
    worth(done, rows, data, test_proposal_recall=recall_of(places, data.test.boxes, data.test.labels))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"side": 16, "flip": True, "clip_norm": 0.05, "context": 0.3},
    {"side": 24, "clip_norm": None, "weight_decay": 0.1, "overlap": 0.6, "slack": 1.0, "shrink": 1.0, "least_score": 0.2},
], ids=str)  # fmt: skip
def test_loop_of_rcnn_is_the_one_written_out(flags, tmp_path):
    """The network on warped regions, then scikit-learn's machines and regressions on its features (E39)."""
    from sklearn.linear_model import Ridge
    from sklearn.svm import LinearSVC

    flags = {"steps": 8, "regions": 4, "learning_rate": 0.02, **flags}
    done = etude.run("detection/rcnn", **SMALL | flags, out=tmp_path / "run")
    config, data, net = begun("rcnn", SMALL | flags)
    trunk, classes = plain.layers(net.trunk, data.spec), len(data.spec.classes)
    net = net.double()
    regions = selective_search(data.train.x, config.proposals)[0]
    stream = plain.Stream(16, config.batch, 0)

    def phi(x, places):
        c = config.context
        middle, half = (places[..., :2] + places[..., 2:]) / 2, (places[..., 2:] - places[..., :2]) / 2
        wide = torch.cat([middle - half * (1 + c), middle + half * (1 + c)], -1)
        crops = plain.align(x, wide.double(), config.side, 1.0, 2)
        return torch.relu(net.hidden(trunk(crops.flatten(0, 1)).flatten(1)))

    def loss_of(step, x, boxes, labels):
        own = regions[stream.indices(step)]
        own = torch.cat([turned(own, step, config.batch) if config.flip else own, boxes], 1)
        chosen = chosen_regions(own, pictures(boxes, labels), config.regions, 0.25, 0.0, classes, dice(step))
        logits = net.softmax(phi(x, chosen.boxes))
        return nn.functional.cross_entropy(logits, chosen.kinds.flatten(), ignore_index=-1)

    losses = trained(config, whole(net, trunk), data, loss_of)
    trunk.eval()
    with torch.no_grad():
        part = data.train
        places = torch.cat([regions, part.boxes], 1)
        features = phi(part.x.double() / 255, places).view(*places.shape[:2], -1)
        for k in range(classes):
            vectors, signs, near, aims = [], [], [], []
            for n in range(len(part)):
                objects = [b for b, label in zip(part.boxes[n].tolist(), part.labels[n].tolist()) if label == k]
                for r, place in enumerate(places[n].tolist()):
                    own = r >= config.proposals
                    kind = int(part.labels[n, r - config.proposals]) if own else -1
                    if (own and kind < 0) or place[2] <= place[0]:
                        continue
                    overlaps = [plain.overlap(place, b) for b in objects]
                    best = max(overlaps, default=0.0)
                    if (own and kind == k) or best < 0.3:
                        vectors.append(features[n, r].numpy())
                        signs.append(1 if own and kind == k else -1)
                    if best >= 0.6:
                        near.append(features[n, r].numpy())
                        aims.append(plain.encoded(objects[overlaps.index(best)], place))
            peer = LinearSVC(C=config.slack, tol=1e-10, max_iter=100_000, dual=False).fit(vectors, signs)
            net.machines.weight[k] = torch.from_numpy(peer.coef_[0])
            net.machines.bias[k] = torch.from_numpy(peer.intercept_)[0]
            fit = Ridge(alpha=config.shrink).fit(np.array(near), np.array(aims))
            net.codes.weight[4 * k : 4 * k + 4] = torch.from_numpy(fit.coef_)
            net.codes.bias[4 * k : 4 * k + 4] = torch.from_numpy(fit.intercept_)
        agree(done, losses, whole(net, trunk))
        places = selective_search(data.test.x, config.proposals)[0]
        features = phi(data.test.x.double() / 255, places).view(*places.shape[:2], -1)
        chances, codes = (2 * net.machines(features)).sigmoid(), net.codes(features)
        rows = []
        for chance, code, own in zip(chances.tolist(), codes.tolist(), places.tolist()):
            found = []
            for p, t, place in zip(chance, code, own):
                if place[2] > place[0]:
                    found += [(plain.decoded(t[4 * k : 4 * k + 4], place, 32), p[k], k) for k in range(classes)]
            rows.append(plain.chosen(found, config.least_score, config.overlap))
    recall = recall_of(places, data.test.boxes, data.test.labels)
    accuracy = done.metrics["test_region_accuracy"]
    worth(done, rows, data, test_proposal_recall=recall, test_region_accuracy=accuracy)
