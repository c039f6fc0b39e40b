"""The captioner: handwritten digits are spelled."""

from __future__ import annotations

import etude


def test_digits_are_spelled(tmp_path):
    """Measured 0.958 of the bundled digits exactly right (seed 1: 0.961); the commonest caption 0.10."""
    result = etude.run(
        "sequence/captioner", out=tmp_path / "run", seed=0, quiet=True, threads=1, steps=220, batch=32, width=48,
        learning_rate=5e-3, evaluate_every=0,
    )  # fmt: skip
    assert result.metrics["test_accuracy"] > 0.92
    assert result.metrics["test_commonest_accuracy"] < 0.15
