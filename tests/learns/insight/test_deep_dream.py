"""A small photograph in which LeNet comes to see far more than in noise as strong."""

from __future__ import annotations

from pathlib import Path

import etude


def test_the_layer_sees_more_than_in_noise(tmp_path: Path) -> None:
    done = etude.run(
        "insight/deep_dream", size=96, octaves=2, steps=10, train_steps=100, quiet=True, seed=0, out=tmp_path / "run"
    )
    assert done.metrics["rise"] > 1.2 * done.metrics["random_rise"]
    assert done.metrics["least_rise"] > 1.1
