"""LeNet learns the bundled handwritten digits."""

import etude


def test_learns_digits(tmp_path):
    result = etude.run("vision/lenet", steps=200, out=tmp_path / "run", quiet=True, seed=0)
    assert result.metrics["test_accuracy"] >= 0.96  # measured 0.986, 0.989, 0.986 over seeds 0-2


def test_1998_style_learns_digits(tmp_path):
    result = etude.run("vision/lenet", style="1998", steps=200, out=tmp_path / "run", quiet=True, seed=0)
    assert result.metrics["test_accuracy"] >= 0.95  # measured 0.983, 0.967, 0.983 over seeds 0-2
