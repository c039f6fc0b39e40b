"""The weights of a softmax regression become smooth pictures; the same weights in other places do not, nor does a first guess."""

from __future__ import annotations

from pathlib import Path

import etude


def test_filters_become_smooth(tmp_path: Path) -> None:
    flags = {"quiet": True, "seed": 0, "draw_every": 0}
    learnt = etude.run("insight/filters", **flags, train_steps=400, out=tmp_path / "learnt").metrics
    begun = etude.run("insight/filters", **flags, train_steps=1, out=tmp_path / "begun").metrics
    assert learnt["smoothness"] > 0.12
    assert learnt["shuffled_smoothness"] < 0.06
    assert begun["smoothness"] < 0.06
