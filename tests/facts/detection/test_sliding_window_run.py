"""The whole run of sliding windows against the same training written out, window by window, in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import etude
from etude.detection.parts.average_precision import recall_of

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_windows.py"))))
SMALL = plain.SMALL | {"scales": (0.4, 0.6), "aspects": (1.0, 1.4), "stride": 5}


def covered(rows, part):
    boxes = torch.tensor([[min(max(v, 0.0), 32) for v in row[4]] for row in rows])
    return recall_of(boxes.expand(len(part), -1, 4), part.boxes, part.labels)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"flip": True, "clip_norm": 0.05, "positive": 0.5, "negative": 0.2, "evaluate_every": 2},
    {"clip_norm": None, "weight_decay": 0.1, "overlap": 0.1, "stride": 4, "aspects": (0.8,), "objects": 2, "least_score": 0.1},
], ids=str)  # fmt: skip
def test_loop_of_sliding_windows_is_the_one_written_out(flags, tmp_path):
    flags = SMALL | flags
    done = etude.run("detection/sliding_window", **flags, out=tmp_path / "run")
    config, data, made = plain.begun("sliding_window", flags)
    net, rows = plain.Plain(made, data.spec), plain.every(32, 14, config.stride, config.scales, config.aspects)

    def loss_of(step, x, boxes, labels):
        seen = plain.chosen(config, rows, boxes, labels, step)
        crops = torch.stack([plain.crop(x[n], rows[w], 14) for n, w, _ in seen])
        kinds = torch.tensor([10 if owner < 0 else int(labels[n, owner]) for n, _, owner in seen])
        # every place of the mini-batch counts here: batch statistics are taken over all of them
        assert len(seen) == config.windows * config.batch
        return F.cross_entropy(net(crops), kinds)

    def validation():
        return plain.worth(plain.scored(config, net, rows, data.validation), data.validation, "validation")

    losses, seen = plain.trained(config, net, data, loss_of, validation)
    told = plain.plain.log(done.folder)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-6)
    mine = [
        (row["step"], {k: v for k, v in row.items() if "validation" in k}) for row in told if "validation_map" in row
    ]
    assert [step for step, _ in mine] == [step for step, _ in seen]
    assert all(a == pytest.approx(b, abs=1e-6) for (_, a), (_, b) in zip(mine, seen))
    theirs = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(plain.saved(done.folder), theirs, rtol=1e-5, atol=1e-6)
    net.eval()
    expected = plain.worth(plain.scored(config, net, rows, data.test), data.test, "test")
    assert done.metrics == pytest.approx(expected | {"test_proposal_recall": covered(rows, data.test)}, abs=1e-6)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = SMALL | {"steps": 60, "examples": 80, "batch": 16, "width": 8, "learning_rate": 1e-2, "windows": 12}
    done = etude.run("detection/sliding_window", **flags, out=tmp_path / "run")
    config, data, _ = plain.begun("sliding_window", flags)
    net = plain.Plain(etude.load(done.folder).model, data.spec).eval()
    rows = plain.every(32, 14, 5, config.scales, config.aspects)
    expected = plain.worth(plain.scored(config, net, rows, data.test), data.test, "test")
    assert expected["test_map"] > 0.02
    assert done.metrics == pytest.approx(expected | {"test_proposal_recall": covered(rows, data.test)}, abs=2e-3)
