"""YOLO finds the digits on small canvases."""

import etude


def test_finds_digits(tmp_path):
    flags = {"size": 32, "examples": 400, "width": 8, "deeper": 1, "steps": 120, "batch": 32, "objects": 1}
    done = etude.run("detection/yolo", **flags, learning_rate=1e-2, out=tmp_path / "run", quiet=True, seed=0)
    assert done.metrics["test_map"] >= 0.3  # to be measured
