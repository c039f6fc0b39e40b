"""With few examples a penalty is worth having: the λ that validation chooses beats no penalty and too much of it."""

import pytest

import etude


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("preset", "gain"), [pytest.param("default", 0.2, marks=pytest.mark.long), ("breast_cancer", 0.45)]
)
def test_the_best_penalty_lies_inside(tmp_path, preset, gain, seed):
    flags = {"splits": 4, "values": 15}
    result = etude.run("basics/regularization", preset=preset, out=tmp_path / "run", quiet=True, seed=seed, **flags)
    assert result.metrics["test_gain"] >= gain  # measured 0.29, 0.38 on diabetes and 0.61, 0.62 on breast cancer
    assert 1e-3 < result.metrics["best_l2"] < 1e4
    assert result.metrics["norm_ratio"] < 1
