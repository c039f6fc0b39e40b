"""The whole run of fast_rcnn against the same training written out with torch's own parts, in float64.

Which regions a mini-batch looks at is drawn by the proved `sample`; everything else is written again.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import etude
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.heads import chosen_regions
from etude.detection.parts.selective_search import selective_search

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
region = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_regions.py"))))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"pooling": "max", "bins": 3, "flip": True, "clip_norm": 0.05, "box_weight": 2.0, "background_from": 0.3},
    {"pooling": "align", "bins": 2, "clip_norm": None, "weight_decay": 0.1, "overlap": 0.2, "stride": 16},
], ids=str)  # fmt: skip
def test_loop_of_fast_rcnn_is_the_one_written_out(flags, tmp_path):
    """Regions come from the picture and are projected on the map (E39)."""
    done = etude.run("detection/fast_rcnn", **region.SMALL | flags, out=tmp_path / "run")
    config, data, net = region.begun("fast_rcnn", region.SMALL | flags)
    trunk, both, classes = plain.layers(net.trunk, data.spec), plain.heads(net.heads), len(data.spec.classes)
    regions = selective_search(data.train.x, config.proposals, config.search)[0]
    stream = plain.Stream(16, config.batch, 0)

    def pooled(features, places):
        made = plain.pool if config.pooling == "max" else lambda *a: plain.align(*a, 2)
        return made(features, places, config.bins, 1 / config.stride).flatten(2).flatten(0, 1)

    def loss_of(step, x, boxes, labels):
        own = regions[stream.indices(step)]
        own = torch.cat([region.turned(own, step, config.batch) if config.flip else own, boxes], 1)
        chosen = chosen_regions(
            own,
            region.pictures(boxes, labels),
            config.regions,
            0.25,
            config.background_from,
            classes,
            region.dice(step),
        )
        return plain.region_loss(*both(pooled(trunk(x), chosen.boxes.double())), chosen, classes, config.box_weight)

    losses = region.trained(config, region.whole(net, trunk), data, loss_of)
    region.agree(done, losses, region.whole(net, trunk))
    trunk.eval()
    with torch.no_grad():
        places = selective_search(data.test.x, config.proposals, config.search)[0]
        said = both(pooled(trunk(data.test.x.double() / 255), places.double()))
        said = [part.unflatten(0, places.shape[:2]) for part in said]
    rows = plain.region_answers(*said, places, 32, config.least_score, config.overlap)
    region.worth(done, rows, data, test_proposal_recall=recall_of(places, data.test.boxes, data.test.labels))


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = region.SMALL | {"steps": 60, "examples": 80, "batch": 16, "width": 8, "bins": 2, "learning_rate": 1e-2}
    done = etude.run("detection/fast_rcnn", **flags, out=tmp_path / "run")
    loaded, data = etude.load(done.folder), region.scenes("digits", 32, 80)
    net, part = loaded.model.double(), data.test
    trunk, both = plain.layers(net.trunk, data.spec).eval(), plain.heads(net.heads)
    places = selective_search(part.x, 9)[0]
    with torch.no_grad():
        features = plain.pool(trunk(part.x.double() / 255), places.double(), 2, 1 / 8)
        said = [rows.unflatten(0, places.shape[:2]) for rows in both(features.flatten(2).flatten(0, 1))]
    rows = plain.region_answers(*said, places, 32, 0.02, 0.5)
    expected = plain.worth(rows, part, "test")
    assert expected["test_map"] > 0.01
    expected["test_proposal_recall"] = recall_of(places, part.boxes, part.labels)
    assert done.metrics == pytest.approx(expected, abs=2e-3)
