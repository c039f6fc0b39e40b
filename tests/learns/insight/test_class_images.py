"""The class images of a small network are seen as their classes, and smoother than without the priors."""

from __future__ import annotations

from pathlib import Path

import etude


def test_pictures_are_seen_as_their_classes(tmp_path: Path) -> None:
    flags = {"network": "mlp", "train_steps": 150, "steps": 60, "quiet": True, "seed": 0}
    with_priors = etude.run("insight/class_images", **flags, out=tmp_path / "with").metrics
    bare = {"shrink": 0.0, "blur": 0.0, "small_pixels": 0.0}
    without = etude.run("insight/class_images", **flags, **bare, out=tmp_path / "without").metrics
    assert with_priors["confidence"] > 0.9
    assert with_priors["roughness"] < 0.7 * without["roughness"]
    assert with_priors["correlation"] > without["correlation"]
