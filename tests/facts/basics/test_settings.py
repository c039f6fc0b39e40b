"""Settings of the lessons that leave nothing to measure are refused in one sentence, before a folder is made."""

import pytest

import etude
from etude.core.errors import UserError


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("risk", {"sizes": ()}, "--sizes names none"),
        ("bias_variance", {"degrees": ()}, "--degrees names none"),
        ("descent", {"tolerance": 7.0}, r"--tolerance is 7, but the valley's start is only 2\.01 from its minimum"),
        ("gradient_noise", {"learning_rates": ()}, "--learning-rates names none"),
        (
            "gradient_noise",
            {"learning_rates": (0.1, 2.0)},
            "--learning-rates is .*; it must be a list, each a number between",
        ),
        ("descent", {"kappa": 0.5}, "--kappa is 0.5; it must be a number at least 1"),
        ("gradient_noise", {"examples": 2}, "--examples is 2; it must be a whole number at least 16"),
        ("gradient_noise", {"walkers": 1}, "--walkers is 1; it must be a whole number at least 2"),
        ("regularization", {"values": 1}, "--values is 1; it must be a whole number between 2 and 1000"),
        ("normalization", {"batch": 1}, "--batch is 1; it must be a whole number at least 2"),
    ],
)
def test_nothing_to_measure(name, settings, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        etude.run(f"basics/{name}", preset="tiny", quiet=True, out=tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
