"""LeNet learns the bundled handwritten digits."""

import pytest

import etude


def test_learns_digits(tmp_path):
    result = etude.run("vision/lenet", steps=200, out=tmp_path / "run", quiet=True, seed=0)
    assert result.metrics["test_accuracy"] >= 0.96  # measured 0.986, 0.989, 0.986 over seeds 0-2


def test_1998_style_learns_digits(tmp_path):
    result = etude.run("vision/lenet", style="1998", steps=200, out=tmp_path / "run", quiet=True, seed=0)
    assert result.metrics["test_accuracy"] >= 0.95  # measured 0.983, 0.967, 0.983 over seeds 0-2


@pytest.mark.parametrize(
    "flags",
    [
        {"normalizer": "batch", "ensemble": "heads", "members": 3},
        {"normalizer": "layer", "dropout": 0.2, "clip_norm": 1.0, "optimizer": "momentum", "learning_rate": 0.05},
        {"ensemble": "snapshots", "schedule": "cyclic", "members": 2, "normalizer": "batch", "combine": "weights"},
    ],
)
def test_learns_digits_with_every_kind_of_flag(tmp_path, flags):
    result = etude.run("vision/lenet", steps=100, out=tmp_path / "run", quiet=True, seed=0, **flags)
    assert result.metrics["test_accuracy"] >= 0.92  # measured 0.981, 0.958, 0.983
