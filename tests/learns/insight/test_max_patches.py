"""Of a network that has learnt the bundled digits, the strongest images of a logit are of its class."""

from __future__ import annotations

from pathlib import Path

import etude


def test_logits_are_shown_their_digits(tmp_path: Path) -> None:
    """Of nine images each; likenesses 0.86 and 0.56 (seed 0)."""
    done = etude.run("insight/max_patches", layer="logits", train_steps=150, quiet=True, seed=0, out=tmp_path / "run")
    assert done.metrics["own_class"] > 0.9
    assert done.metrics["random_purity"] < 0.5
    assert done.metrics["alikeness"] > done.metrics["random_alikeness"] + 0.2
