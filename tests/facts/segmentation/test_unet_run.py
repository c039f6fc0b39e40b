"""The whole run of U-Net against the same training written out with torch's own parts, in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import etude
from etude.blocks.nn.dropout import Dropout
from etude.core.run import Run
from etude.segmentation.unet import Config, build

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_masks.py")))
TINY = {"preset": "tiny", "quiet": True, "seed": 0, "threads": 1, "steps": 3, "width": 2}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("etude.segmentation.unet.pictures", lambda *_: None)
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)
    monkeypatch.setattr("etude.segmentation.unet.read", lambda *_: plain.few())


OPTIMIZERS = {
    "sgd": lambda p, **s: torch.optim.SGD(p, **s),
    "momentum": lambda p, **s: torch.optim.SGD(p, momentum=0.9, **s),
    "adam": lambda p, **s: torch.optim.Adam(p, **s),
    "adamw": lambda p, **s: torch.optim.AdamW(p, **s),
}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", [
    {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.05, "turns": "all"},
    {"optimizer": "momentum", "learning_rate": 0.02, "padding": "valid", "levels": 1, "crop": 20, "normalizer": "none"},
    {"optimizer": "adamw", "weight_decay": 0.1, "dropout": 0.5, "turns": "mirror", "normalizer": "none"},
], ids=str)  # fmt: skip
def test_loop_is_the_one_written_out(flags, tmp_path):
    """Losses of every step and final weights; validation after the second and the last."""
    flags = {"schedule": "linear", "evaluate_every": 2} | flags
    done = etude.run("segmentation/unet", **TINY, **flags, out=tmp_path / "run")
    spec = etude.load(done.folder).spec
    config = Config(**{k: v for k, v in (TINY | {"batch": 2, "width": 2, "crop": 32} | flags).items() if k not in ("preset", "quiet", "seed", "threads")})  # fmt: skip
    model = (
        plain.began(build, config, spec).double().to(memory_format=torch.channels_last)
    )  # dropout draws in its order
    for name, part in [*model.named_modules()]:
        if isinstance(part, Dropout):
            setattr(model, name, nn.Dropout(part.p))
    optimizer = OPTIMIZERS[config.optimizer](
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    data, losses, rows = plain.few(), [], plain.log(done.folder)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / 3)
        x, y = plain.batch(data.train, step, 2, config.crop, model.margin, config.turns)
        torch.manual_seed(etude.core.randomness.fold(0, step, 0, "step"))
        loss = plain.loss_of(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1 and config.padding == "same":
            expected = plain.scores(model.eval(), data.validation, spec)
            for name, value in expected.items():
                assert rows[1][f"validation_{name}"] == pytest.approx(value, rel=1e-5), name
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [len(row) > 2 for row in rows] == [False, True, True]
    state = plain.state_of(done.folder)
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("_float64")  # where no two classes tie
@pytest.mark.parametrize("flags", [{}, {"tile": 16, "skips": "cut"}], ids=str)
def test_reported_numbers_are_those_of_the_saved_network(flags, tmp_path):
    done = etude.run("segmentation/unet", **TINY, **flags, out=tmp_path / "run")
    loaded = etude.load(done.folder)
    assert loaded.model.skips == flags.get("skips", "concat")
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
    one = etude.run("segmentation/unet", **TINY, elastic=3.0, out=tmp_path / "one")
    assert seen == [3.0] * 3
    two = etude.run("segmentation/unet", **TINY, out=tmp_path / "two")
    assert len(seen) == 3
    assert [r["loss"] for r in plain.log(one.folder)] == pytest.approx(
        [r["loss"] for r in plain.log(two.folder)], rel=1e-5
    )


def test_loop_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    flags = TINY | {"dropout": 0.3, "elastic": 2.0}
    whole = etude.run("segmentation/unet", **flags, out=tmp_path / "whole")
    average = Run.average

    def dying(run, *modules, **scalars):
        if run.step == 1:
            raise SystemExit
        return average(run, *modules, **scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "average", dying)
        with pytest.raises(SystemExit):
            etude.run("segmentation/unet", **flags, save_every=1, out=tmp_path / "killed")
    again = etude.resume(tmp_path / "killed")
    assert plain.log(whole.folder) == plain.log(again.folder)
    assert whole.metrics == again.metrics
