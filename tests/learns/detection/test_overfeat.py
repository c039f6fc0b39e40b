"""OverFeat finds and names the digits on small canvases, and its boxes fit."""

import etude


def test_finds_digits(tmp_path):
    flags = {"size": 40, "examples": 300, "side": 20, "scales": (0.36, 0.48), "objects": 1}
    own = {"width": 8, "windows": 12, "steps": 300, "learning_rate": 1e-2}
    done = etude.run("detection/overfeat", **flags, **own, out=tmp_path / "run", quiet=True, seed=0)
    # measured 0.88 and 0.87
    assert done.metrics["test_map"] >= 0.85
    assert done.metrics["test_localisation"] >= 0.83
