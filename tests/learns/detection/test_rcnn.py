"""R-CNN finds and names the digits on small canvases: it sees every region at its full resolution."""

import etude

FLAGS = {
    "size": 32,
    "examples": 300,
    "width": 16,
    "head_width": 64,
    "proposals": 12,
    "objects": 1,
    "batch": 16,
    "quiet": True,
}


def test_finds_digits(tmp_path):
    done = etude.run(
        "detection/rcnn", **FLAGS, steps=100, side=24, learning_rate=8e-3, regions=8, out=tmp_path / "run", seed=0
    )
    # measured 0.97 with 150 steps and 600 pictures
    assert done.metrics["test_map"] >= 0.85
    assert done.metrics["test_recall"] >= 0.95
