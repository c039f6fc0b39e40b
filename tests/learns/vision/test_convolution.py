"""vision/convolution learns the bundled handwritten digits with gradients written by hand."""

import etude


def test_learns_digits(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.vision.convolution.show", lambda *_: None)
    result = etude.run("vision/convolution", steps=100, evaluate_every=0, out=tmp_path / "run", quiet=True, seed=0)
    assert result.metrics["test_accuracy"] >= 0.9  # measured 0.95
