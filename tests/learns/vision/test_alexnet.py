"""AlexNet learns the bundled handwritten digits."""

import etude


def test_learns_digits(tmp_path):
    result = etude.run(
        "vision/alexnet", width=6, steps=80, batch=32, shift=0, evaluate_every=0, dropout=0.1, learning_rate=0.05,
        out=tmp_path / "run", quiet=True, seed=0,
    )  # fmt: skip
    assert result.metrics["test_accuracy"] >= 0.6
