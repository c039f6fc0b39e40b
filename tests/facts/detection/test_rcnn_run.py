"""The whole run of rcnn against the same training written out with torch's own parts, in float64.

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
from etude.core.randomness import generator
from etude.detection import rcnn
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.heads import chosen_regions
from etude.detection.parts.selective_search import selective_search

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
region = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_regions.py"))))


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
    done = etude.run("detection/rcnn", **region.SMALL | flags, out=tmp_path / "run")
    config, data, net = region.begun("rcnn", region.SMALL | flags)
    trunk, classes = plain.layers(net.trunk, data.spec), len(data.spec.classes)
    net = net.double()
    regions = selective_search(data.train.x, config.proposals, config.search)[0]
    stream = plain.Stream(16, config.batch, 0)

    def phi(x, places):
        c = config.context
        middle, half = (places[..., :2] + places[..., 2:]) / 2, (places[..., 2:] - places[..., :2]) / 2
        wide = torch.cat([middle - half * (1 + c), middle + half * (1 + c)], -1)
        crops = plain.align(x, wide.double(), config.side, 1.0, 2)
        return torch.relu(net.hidden(trunk(crops.flatten(0, 1)).flatten(1)))

    def loss_of(step, x, boxes, labels):
        own = regions[stream.indices(step)]
        own = torch.cat([region.turned(own, step, config.batch) if config.flip else own, boxes], 1)
        chosen = chosen_regions(
            own, region.pictures(boxes, labels), config.regions, 0.25, 0.0, classes, region.dice(step)
        )
        logits = net.softmax(phi(x, chosen.boxes))
        return nn.functional.cross_entropy(logits, chosen.kinds.flatten(), ignore_index=-1)

    losses = region.trained(config, region.whole(net, trunk), data, loss_of)
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
        region.agree(done, losses, region.whole(net, trunk))
        places = selective_search(data.test.x, config.proposals, config.search)[0]
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
    region.worth(done, rows, data, test_proposal_recall=recall, test_region_accuracy=accuracy)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = region.SMALL | {"steps": 60, "examples": 80, "batch": 16, "width": 8, "side": 16, "evaluate_every": 60}
    done = etude.run("detection/rcnn", **flags, learning_rate=1e-2, out=tmp_path / "run")
    loaded, data = etude.load(done.folder), region.scenes("digits", 32, 80)
    model, found = loaded.model, {}
    for split in ("validation", "test"):
        part, rows, right = getattr(data, split), [], []
        places = selective_search(part.x, 9)[0]
        drawn = chosen_regions(places, part, 16, 0.5, 0.0, 10, generator(0, 0, 0, "held regions"))
        with torch.no_grad():
            for n, x in enumerate(part.x):
                phi = model.features(rcnn.warp(x[None], places[n : n + 1], 16, 0.1))
                chances, codes = (2 * model.machines(phi)).sigmoid(), model.codes(phi)
                candidates = []
                for p, t, place in zip(chances.tolist(), codes.tolist(), places[n].tolist()):
                    if place[2] > place[0]:
                        own = [(plain.decoded(t[4 * k : 4 * k + 4], place, 32), p[k], k) for k in range(10)]
                        candidates += own
                rows.append(plain.chosen(candidates, 0.05, 0.3))
                said = model(rcnn.warp(x[None], drawn.boxes[n : n + 1], 16, 0.1)).argmax(1)
                counted = drawn.kinds[n] >= 0
                right += (said == drawn.kinds[n])[counted].tolist()
        found |= plain.worth(rows, part, split) | {f"{split}_region_accuracy": sum(right) / len(right)}
        found[f"{split}_proposal_recall"] = recall_of(places, part.boxes, part.labels)
    assert found["test_map"] > 0.01
    assert found["test_region_accuracy"] != found["validation_region_accuracy"]
    assert done.metrics == pytest.approx({k: v for k, v in found.items() if k.startswith("test")}, abs=2e-3)
    last = plain.log(done.folder)[-1]
    assert last["validation_region_accuracy"] == pytest.approx(found["validation_region_accuracy"], abs=2e-3)
