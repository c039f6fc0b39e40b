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


@pytest.mark.parametrize("normalizer", ["none", "batch"])
@pytest.mark.long
def test_a_deep_sigmoid_network_needs_batch_normalisation(tmp_path, normalizer):
    flags = {
        "widths": (64,) * 12,
        "activation": "sigmoid",
        "initializer": "glorot",
        "steps": 200,
        "learning_rate": 3e-3,
    }
    result = etude.run("basics/mlp", out=tmp_path / "run", quiet=True, seed=0, normalizer=normalizer, **flags)
    if normalizer == "batch":
        assert result.metrics["test_accuracy"] >= 0.9  # measured 0.950
    else:
        assert result.metrics["test_accuracy"] <= 0.3  # measured 0.100: chance


@pytest.mark.parametrize(
    "flags",
    [  # measured 0.964, 0.964, 0.958, 0.969, 0.950
        {"initializer": "orthogonal", "initial_bias": 0.1, "clip_norm": 1.0},
        {"clip_value": 0.01, "schedule": "cyclic"},
        {"dropout": 0.3, "dropout_style": "classic", "normalizer": "layer"},
        {"ensemble": "heads", "combine": "vote", "members": 3},
        {"ensemble": "snapshots", "schedule": "cyclic", "combine": "weights", "normalizer": "batch"},
    ],
)
def test_learns_digits_with_every_kind_of_flag(tmp_path, flags):
    result = etude.run("basics/mlp", out=tmp_path / "run", quiet=True, seed=0, steps=150, **flags)
    assert result.metrics["test_accuracy"] >= 0.92
