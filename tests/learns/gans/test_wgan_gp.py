"""WGAN-GP finds modes of the ring."""

import pytest

import etude


@pytest.mark.long
def test_finds_modes(tmp_path):
    result = etude.run("gans/wgan_gp", out=tmp_path / "run", quiet=True, evaluate_every=0, steps=300)
    print(result.metrics)  # measured 8 and 0.47; an untrained generator has 0 and 0.01
    assert result.metrics["test_modes"] >= 6
    assert result.metrics["test_share"] >= 0.37
