"""The three GANs find the modes of the ring; image runs resume exactly and can be drawn from."""

import json

import pytest
import torch

import etude
from etude.catalog import find, load_method
from etude.gans.parts import judge, stages

RING = [  # share of 8 modes, and of the samples within 3σ of one; an untrained generator has 0 and 0.01
    ("gans/gan", {"seed": 0, "steps": 1500}, 4, 0.5),
    ("gans/wgan", {"seed": 1, "steps": 1000}, 4, 0.25),
    ("gans/wgan_gp", {"seed": 0, "steps": 300}, 6, 0.3),
]


@pytest.mark.parametrize(("name", "settings", "modes", "share"), RING)
def test_finds_modes(tmp_path, name, settings, modes, share):
    result = etude.run(name, out=tmp_path / "run", quiet=True, evaluate_every=0, **settings)
    print(name, result.metrics)
    assert result.metrics["test_modes"] >= modes
    assert result.metrics["test_share"] >= share


@pytest.mark.parametrize("name", ["gans/gan", "gans/wgan", "gans/wgan_gp"])
def test_images_resume_exactly_and_can_be_drawn(tmp_path, name, monkeypatch):
    """A run cut off after a checkpoint ends in the same numbers and weights, without teaching its judge again."""
    monkeypatch.setattr(judge, "JUDGE_STEPS", 5)
    settings = {"preset": "digits", "width": 8, "batch": 8, "steps": 4, "evaluate_every": 2, "save_every": 1}
    settings |= {"quiet": True, "threads": 1}
    whole = etude.run(name, out=tmp_path / "whole", **settings)
    look = stages.ImageStage.look

    def cut(self, generator, step):
        if step == 4:
            raise RuntimeError("cut")
        return look(self, generator, step)

    with monkeypatch.context() as patched:
        patched.setattr(stages.ImageStage, "look", cut)
        with pytest.raises(RuntimeError, match="cut"):
            etude.run(name, out=tmp_path / "cut", **settings)
    with monkeypatch.context() as patched:
        patched.setattr(judge, "teach", None)
        resumed = etude.resume(tmp_path / "cut")
    assert resumed.metrics == whole.metrics
    rows = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in map(json.loads, rows[0].splitlines()) if "validation_frechet_ratio" in row] == [0, 2, 4]
    loaded = etude.load(tmp_path / "cut")
    for part, weights in etude.load(tmp_path / "whole").modules.items():
        for key, value in weights.state_dict().items():
            assert torch.equal(value, loaded.modules[part].state_dict()[key])
    module = load_method(find(name))
    text = module.sample(loaded, module.Sample(count=9), tmp_path)
    assert "9 samples after 4 steps" in text
    assert (tmp_path / "samples.png").stat().st_size > 500
