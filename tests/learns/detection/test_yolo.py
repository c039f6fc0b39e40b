"""YOLO finds the digits on small canvases."""

import etude


def test_finds_digits(tmp_path):
    flags = {"size": 32, "examples": 400, "width": 8, "deeper": 1, "steps": 120, "batch": 32, "objects": 1}
    done = etude.run("detection/yolo", **flags, learning_rate=1e-2, out=tmp_path / "run", quiet=True, seed=0)
    # measured 0.336 and 0.943
    assert done.metrics["test_map"] >= 0.27
    assert done.metrics["test_recall"] >= 0.85
