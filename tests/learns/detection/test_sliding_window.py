"""Sliding windows find and name the digits on small canvases."""

import etude


def test_finds_digits(tmp_path):
    flags = {"size": 40, "examples": 300, "side": 20, "scales": (0.3, 0.41), "aspects": (1.4,), "objects": 1}
    own = {"width": 8, "windows": 12, "steps": 300, "learning_rate": 1e-2}
    done = etude.run("detection/sliding_window", **flags, **own, out=tmp_path / "run", quiet=True, seed=0)
    # measured 0.73 and 0.75
    assert done.metrics["test_map"] >= 0.66
    assert done.metrics["test_localisation"] >= 0.69
