"""The whole run of YOLO against the same training written out with torch's own parts, in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import etude
from etude import cli
from etude.core.checkpoint import list_checkpoints, read
from etude.core.predict import warped
from etude.core.randomness import fold
from etude.detection.parts.scenes import scenes
from etude.detection.yolo import Config, build

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
SMALL = {"size": 32, "examples": 20, "width": 4, "deeper": 1, "steps": 4, "batch": 6, "evaluate_every": 3}
SMALL |= {"quiet": True, "seed": 0, "threads": 1}


class Plain(nn.Module):
    """The same network of torch's own layers, begun with the weights that a run with seed 0 begins with."""

    def __init__(self, config, spec):
        super().__init__()
        torch.manual_seed(fold(0, 0, 0, "init"))
        made = build(config, spec)["model"]
        self.trunk, self.head = plain.layers(made.trunk, spec), made.head.double()

    def forward(self, x):
        return self.head(self.trunk(x)).permute(0, 2, 3, 1)


def found(net, x, boxes, size, least, overlap):
    """Detections of each picture, cell by cell."""
    with torch.no_grad():
        out = net.eval()(x)
    net.train()
    rows, cells = [], out.shape[1]
    for said in out:
        candidates = []
        for row in range(cells):
            for column in range(cells):
                for b in range(boxes):
                    place, y, w, h, c = said[row, column, 5 * b : 5 * b + 5].tolist()
                    x, y = (column + place) * size / cells, (row + y) * size / cells
                    box = [x - w * w * size / 2, y - h * h * size / 2, x + w * w * size / 2, y + h * h * size / 2]
                    box = [min(max(v, 0.0), size) for v in box]
                    classes = enumerate(said[row, column, 5 * boxes :].tolist())
                    candidates += [(box, c * max(p, 0.0), kind) for kind, p in classes]
        rows.append(plain.chosen(candidates, least, overlap))
    return rows


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"clip_norm": 0.5, "flip": True, "coordinate_weight": 2.0, "no_object_weight": 0.1, "objects": 2},
    {"stride": 16, "boxes": 3, "schedule": "constant", "weight_decay": 0.1, "learning_rate": 1e-3, "overlap": 0.1},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, tmp_path):
    """Losses of every step, validation rows and final weights: 4 steps, evaluated after the 3rd and the last."""
    done = etude.run("detection/yolo", **SMALL | flags, out=tmp_path / "run")
    config = Config(**{k: v for k, v in (SMALL | flags).items() if k not in ("quiet", "seed", "threads")})
    data = scenes("digits", 32, 20, config.objects)
    net = Plain(config, data.spec)
    batch = plain.batches(data.train, 6, 0, config.flip)
    constant = config.schedule == "constant"
    rates = [config.learning_rate] * 4 if constant else plain.one_cycle(config.learning_rate, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=config.weight_decay)
    losses, seen, clipped = [], [], 0
    net.train()
    for step in range(4):
        optimizer.param_groups[0]["lr"] = rates[step]
        x, boxes, labels = batch(step)
        weights = (config.coordinate_weight, config.no_object_weight)
        loss = plain.yolo_loss(net(x), boxes, labels, config.boxes, 32, *weights)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm:
            norm = nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            clipped += bool(norm > config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if step in (2, 3):
            part = data.validation
            answers = found(net, part.x.double() / 255, config.boxes, 32, config.least_score, config.overlap)
            seen.append((step + 1, plain.worth(answers, part, "validation")))
    assert bool(clipped) == ("clip_norm" in flags)
    rows = plain.log(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)  # overlaps are taken in float32
    told = [
        (row["step"], {k: v for k, v in row.items() if "validation" in k}) for row in rows if "validation_map" in row
    ]
    for mine, theirs in zip(told, seen, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], abs=1e-6)
    saved = read(list_checkpoints(done.folder / "checkpoints")[-1])["model"]
    mine = torch.cat([v.double().flatten() for k, v in saved.items() if k.endswith(("weight", "bias"))])
    theirs = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    flags = {
        "steps": 60,
        "width": 8,
        "examples": 120,
        "batch": 16,
        "least_score": 0.02,
        "overlap": 0.3,
        "evaluate_every": 0,
    }
    done = etude.run("detection/yolo", **SMALL | flags, learning_rate=1e-2, out=tmp_path / "run")
    loaded, data = etude.load(done.folder), scenes("digits", 32, 120)
    rows = []
    for x in data.test.x:
        rows += found(loaded.model, x[None], 2, 32, 0.02, 0.3)
    expected = plain.worth(rows, data.test, "test")
    assert expected["test_map"] > 0
    assert done.metrics == pytest.approx(expected, abs=2e-3)
    last = plain.log(done.folder)[-1]
    rows = []
    for x in data.validation.x:
        rows += found(loaded.model, x[None], 2, 32, 0.02, 0.3)
    assert {k: v for k, v in last.items() if "validation" in k} == pytest.approx(
        plain.worth(rows, data.validation, "validation"), abs=2e-3
    )


def test_boxes_are_said_in_the_pixels_of_the_file(tmp_path, capsys):
    """A picture twice as wide and three times as high as the network's gets the same boxes, stretched; so says the command."""
    done = etude.run("detection/yolo", **SMALL | {"steps": 40, "batch": 16, "examples": 60}, out=tmp_path / "run")
    loaded, x = etude.load(done.folder), scenes("digits", 32, 60).test.x[0]
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.repeat(np.repeat(x[0].numpy(), 3, 0), 2, 1)).save(tmp_path / "pictures/one.png")
    pixels, sides = warped(tmp_path / "pictures/one.png", True, (32, 32))
    assert sides == (64, 96)
    assert abs(pixels.astype(float) - x.numpy()).mean() < 6
    (array,), (file,) = loaded.detect(pixels.copy()), loaded.detect(tmp_path / "pictures")
    assert array["file"] is None
    assert file["file"] == str(tmp_path / "pictures/one.png")
    assert array["boxes"]
    for mine, theirs in zip(file["boxes"], array["boxes"], strict=True):
        assert mine["box"] == pytest.approx([v * t for v, t in zip(theirs["box"], (2, 3, 2, 3))], abs=1e-3)
        assert (mine["class"], mine["probability"]) == (theirs["class"], pytest.approx(theirs["probability"]))
    assert cli.main(["predict", str(done.folder), str(tmp_path / "pictures")]) == 0
    with Image.open(done.folder / "predicted/000-one.png") as page:
        assert page.size == (64, 96)
    assert "one.png" in capsys.readouterr().out
    Image.fromarray(np.full((30, 40), 20000, np.uint16)).save(tmp_path / "deep.png")  # a third of the way to white
    assert cli.main(["predict", str(done.folder), str(tmp_path / "deep.png")]) == 0
    with Image.open(done.folder / "predicted/000-deep.png") as page:
        assert page.getpixel((0, 0)) == (78, 78, 78)
    # other networks that are no classifiers: tests/facts/blocks/test_sources.py
    for method in ("insight/saliency", "insight/class_images", "insight/guided_backprop", "robustness/fgsm"):
        with pytest.raises(etude.core.errors.UserError, match="holds no classifier of images"):
            etude.run(method, preset="tiny", source=str(done.folder), out=tmp_path / method)
    assert cli.main(["predict", str(done.folder), str(tmp_path / "nowhere.png")]) == 2
    with pytest.raises(etude.core.errors.UserError, match="loaded.detect"):
        loaded.predict(x)
