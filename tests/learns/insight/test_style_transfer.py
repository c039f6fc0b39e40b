"""A small photograph takes the Gram matrices of another, and stays nearer to itself than that one is."""

from __future__ import annotations

from pathlib import Path

import etude


def test_style_comes_and_content_stays(tmp_path: Path) -> None:
    done = etude.run(
        "insight/style_transfer", size=80, steps=40, train_steps=100, quiet=True, seed=0, out=tmp_path / "run"
    )
    assert done.metrics["style_drop"] > 50
    assert done.metrics["content_ratio"] < 0.6
    assert done.metrics["evaluations"] < 1.3
