"""The whole run of FCN against the same training written out with torch's own parts, in float64."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import etude
from etude.segmentation.fcn import PRESETS, build

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_masks.py")))
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1, "steps": 3, "width": 2, "head_width": 4}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.segmentation.fcn.pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)
    monkeypatch.setattr("etude.segmentation.fcn.read", lambda *_: plain.few())


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.05, "turns": "all"},
    {"optimizer": "momentum", "learning_rate": 0.02, "padding": "valid", "levels": 1, "fused": 0, "crop": 20, "normalizer": "none"},
    {"optimizer": "adamw", "weight_decay": 0.1, "dropout": 0.5, "turns": "mirror", "upsampling": "fixed", "fused": 1},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, tmp_path):
    """Losses of every step and final weights; validation after the second step."""
    flags = {"schedule": "linear", "evaluate_every": 2} | flags
    done = etude.run("segmentation/fcn", **TINY, **flags, out=tmp_path / "run")
    config = replace(PRESETS["tiny"], steps=3, width=2, head_width=4, **flags)
    model = plain.began(build, config, etude.load(done.folder).spec).double()
    losses, scores = plain.replay(model, config)
    rows = plain.log(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [len(row) > 2 for row in rows] == [False, True, True]
    for name, value in scores.items():
        assert rows[1][f"validation_{name}"] == pytest.approx(value, rel=1e-5), name
    state = plain.state_of(done.folder)
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("_float64")  # where no two classes tie
@pytest.mark.parametrize("flags", [{}, {"tile": 16, "fused": 1}], ids=str)
def test_reported_numbers_are_those_of_the_saved_network(flags, tmp_path):
    done = etude.run("segmentation/fcn", **TINY, **flags, out=tmp_path / "run")
    loaded = etude.load(done.folder)
    assert len(loaded.model.up) == flags.get("fused", 2)
    expected = plain.scores(loaded.model, plain.few().test, loaded.spec)
    assert done.metrics == plain.near(expected, "test_")
    last = plain.log(done.folder)[-1]
    expected = plain.scores(loaded.model, plain.few().validation, loaded.spec)
    assert last == last | plain.near(expected, "validation_")


def test_loop_bends_what_it_is_told_to_bend(tmp_path, monkeypatch):
    seen = []

    def watched(x, y, deviation, generator):
        seen.append(deviation)
        return x.float() / 255, y

    monkeypatch.setattr("etude.segmentation.parts.crops.deformed", watched)
    etude.run("segmentation/fcn", **TINY, elastic=3.0, out=tmp_path / "one")
    assert seen == [3.0] * 3
