"""VGG learns the bundled handwritten digits."""

import etude


def test_learns_digits(tmp_path):
    result = etude.run(
        "vision/vgg", depth=8, steps=60, batch=32, shift=0, evaluate_every=0, out=tmp_path / "run", quiet=True, seed=0
    )
    assert result.metrics["test_accuracy"] >= 0.8
