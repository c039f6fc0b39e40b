"""The whole run of faster_rcnn against the same training written out with torch's own parts, in float64.

Which regions a mini-batch looks at is drawn by the proved `sample`; everything else is written again.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import etude
from etude.detection import faster_rcnn
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.heads import chosen_regions
from etude.detection.parts.matching import assign, sample

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
region = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_regions.py"))))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"pooling": "align", "bins": 2, "flip": True, "clip_norm": 0.05, "box_weight": 2.0, "scales": (0.3, 0.5)},
    {"pooling": "max", "bins": 3, "clip_norm": None, "weight_decay": 0.1, "aspects": (0.5, 1.0), "scales": (0.4,)},
], ids=str)  # fmt: skip
def test_loop_of_faster_rcnn_is_the_one_written_out(flags, tmp_path):
    """The network's own proposals, decoded and suppressed box by box (E40); no gradient goes through their places."""
    flags = {"anchors": 12, "least_score": 0.05, **flags}
    done = etude.run("detection/faster_rcnn", **region.SMALL | flags, out=tmp_path / "run")
    config, data, net = region.begun("faster_rcnn", region.SMALL | flags)
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
        draw = region.dice(step)
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
        chosen = chosen_regions(places, region.pictures(boxes, labels), config.regions, 0.25, 0.0, classes, draw)
        fast = plain.region_loss(*both(pooled(features, chosen.boxes)), chosen, classes, config.box_weight)
        return total / counted + fast

    losses = region.trained(config, region.whole(net, trunk), data, loss_of)
    region.agree(done, losses, region.whole(net, trunk))
    trunk.eval()
    with torch.no_grad():
        features, logit, moved = said_of(data.test.x.double() / 255)
        places = proposals(logit, moved)
        said = [part.unflatten(0, places.shape[:2]) for part in both(pooled(features, places))]
    rows = plain.region_answers(*said, places, 32, config.least_score, config.overlap)
    region.worth(done, rows, data, test_proposal_recall=recall_of(places, data.test.boxes, data.test.labels))


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = region.SMALL | {"steps": 60, "examples": 80, "batch": 16, "width": 8, "bins": 2, "learning_rate": 1e-2}
    done = etude.run("detection/faster_rcnn", **flags, out=tmp_path / "run")
    loaded, part = etude.load(done.folder), region.scenes("digits", 32, 80).test
    found, recalled = [], []
    with torch.no_grad():
        for x in part.x:
            features, said = loaded.model(x[None])
            places = faster_rcnn.propose(said, loaded.model.anchors, 32, 9)
            pooled = plain.align(features.double(), places.double(), 2, 1 / 8, 2).flatten(2).flatten(0, 1)
            scores, codes = loaded.model.heads(pooled.float())
            found += plain.region_answers(scores[None], codes.flatten(1)[None], places, 32, 0.02, 0.5)
            recalled.append(places)
    expected = plain.worth(found, part, "test")
    assert expected["test_map"] > 0.005
    expected["test_proposal_recall"] = recall_of(torch.cat(recalled), part.boxes, part.labels)
    assert done.metrics == pytest.approx(expected, abs=2e-3)
