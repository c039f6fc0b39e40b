"""Batch normalisation is what lets twenty sigmoid layers learn the bundled digits."""

import pytest

import etude


@pytest.mark.long
def test_learns_with_batch_normalisation_only(tmp_path):
    """E15: measured 0.96 with and 0.10 without, after 150 steps."""
    done = etude.run("basics/normalization", out=tmp_path / "run", quiet=True, seed=0, steps=150, evaluate_every=0)
    assert done.metrics["test_accuracy_with"] > 0.88
    assert done.metrics["test_accuracy_without"] < 0.15
