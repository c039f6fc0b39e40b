"""A softmax regression's pictures are its own weights, and it answers more strongly to them than to any digit."""

from __future__ import annotations

from pathlib import Path

import pytest

import etude


def test_pictures_of_a_linear_network_are_its_weights(tmp_path: Path) -> None:
    done = etude.run(
        "insight/activation_max", network="softmax", train_steps=150, steps=150, l2=0.5, start="mean", quiet=True, seed=0,
        out=tmp_path / "run",
    )  # fmt: skip
    run = etude.load(done.folder)
    state = run.state["model"]
    weight = next(value for value in state.values() if value.shape == (10, 64)).view(10, 1, 8, 8)
    mean, std = run.spec.mean[0], run.spec.std[0]
    assert (run.state["pictures"]["x"] - mean).flatten().tolist() == pytest.approx(
        (weight / std / (2 * 0.5)).flatten().tolist(), abs=1e-4
    )
    assert done.metrics["score_ratio"] > 1.3
    assert abs(done.metrics["random_ratio"]) < 0.5
