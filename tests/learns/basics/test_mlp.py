"""The feed-forward network learns the bundled handwritten digits, by every optimizer's name."""

import pytest

import etude


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("sgd", 0.1),
        ("momentum", 0.02),
        ("nesterov", 0.02),
        ("rmsprop", 1e-3),
        ("adagrad", 1e-2),
        ("adam", 1e-3),
        ("adamw", 1e-3),
    ],
)
def test_learns_digits(tmp_path, optimizer, rate):
    flags = {"optimizer": optimizer, "learning_rate": rate, "steps": 150}
    result = etude.run("basics/mlp", out=tmp_path / "run", quiet=True, seed=0, **flags)
    assert result.metrics["test_accuracy"] >= 0.9
