"""The whole run of OverFeat against the same training written out, window by window, in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import etude
from etude.detection.parts.average_precision import recall_of

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_windows.py"))))
SMALL = plain.SMALL | {"scales": (0.5, 0.7), "offsets": False, "least_score": 0.1}


def rows_of(config):
    return plain.every(32, 14, 2 if config.offsets else 6, config.scales, (1.0,))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"flip": True, "clip_norm": 0.05, "positive": 0.4, "negative": 0.3, "evaluate_every": 2, "box_weight": 3.0},
    {"clip_norm": None, "weight_decay": 0.1, "match": 0.4, "offsets": True, "scales": (0.45,), "least_score": 0.09, "learning_rate": 0.02},
], ids=str)  # fmt: skip
def test_loop_of_overfeat_is_the_one_written_out(flags, tmp_path):
    flags = SMALL | flags
    done = etude.run("detection/overfeat", **flags, out=tmp_path / "run")
    config, data, made = plain.begun("overfeat", flags)
    net, rows = plain.Plain(made, data.spec), rows_of(config)

    def loss_of(step, x, boxes, labels):
        seen = plain.chosen(config, rows, boxes, labels, step, plain.square)
        assert len(seen) == config.windows * config.batch  # batch statistics are taken over all of them
        scores, codes = net(torch.stack([plain.crop(x[n], rows[w], 14) for n, w, _ in seen]))
        total = 0.0
        for row, (n, w, owner) in enumerate(seen):
            kind = 10 if owner < 0 else int(labels[n, owner])
            total = total + F.cross_entropy(scores[row : row + 1], torch.tensor([kind]))
            if owner >= 0:
                code = torch.tensor(plain.plain.encoded(boxes[n, owner].tolist(), rows[w][4]), dtype=torch.float64)
                total = total + config.box_weight * F.smooth_l1_loss(codes[row], code, reduction="sum")
        return total / len(seen)

    def validation():
        return plain.worth(plain.overfeat_found(config, net, rows, data.validation)[0], data.validation, "validation")

    losses, seen = plain.trained(config, net, data, loss_of, validation)
    told = plain.plain.log(done.folder)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-5)
    mine = [
        (row["step"], {k: v for k, v in row.items() if "validation" in k}) for row in told if "validation_map" in row
    ]
    assert [step for step, _ in mine] == [step for step, _ in seen]
    assert all(a == pytest.approx(b, abs=1e-6) for (_, a), (_, b) in zip(mine, seen))
    theirs = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(plain.saved(done.folder), theirs, rtol=1e-4, atol=1e-5)
    net.eval()
    found, boxes = plain.overfeat_found(config, net, rows, data.test)
    covered = recall_of(torch.stack(boxes), data.test.boxes, data.test.labels)
    expected = plain.worth(found, data.test, "test") | {"test_proposal_recall": covered}
    assert expected["test_recall"] > 0
    assert done.metrics == pytest.approx(expected, abs=1e-6)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = SMALL | {
        "steps": 200,
        "examples": 120,
        "objects": 1,
        "batch": 16,
        "width": 8,
        "learning_rate": 1e-2,
        "head_width": 48,
        "windows": 12,
        "least_score": 0.25,
        "offsets": True,
        "scales": (0.42, 0.55),
    }
    done = etude.run("detection/overfeat", **flags, out=tmp_path / "run")
    config, data, _ = plain.begun("overfeat", flags)
    net = plain.Plain(etude.load(done.folder).model, data.spec).eval()
    found, boxes = plain.overfeat_found(config, net, rows_of(config), data.test)
    expected = plain.worth(found, data.test, "test")
    assert expected["test_map"] > 0.02
    covered = recall_of(torch.stack(boxes), data.test.boxes, data.test.labels)
    assert done.metrics == pytest.approx(expected | {"test_proposal_recall": covered}, abs=2e-3)
