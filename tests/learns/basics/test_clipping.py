"""Clipped networks learn the adding problem at a rate that ends the unclipped one."""

import pytest

import etude


@pytest.mark.long
def test_clipped_networks_learn_where_the_unclipped_one_ends(tmp_path):
    """1,000 steps, always answering 1 costs 0.167: measured over four seeds 0.030 to 0.036 by norm; seeds 0, 1 and 3 have
    0.035 to 0.060 by value (seed 2 needs more steps); the unclipped one ended after 16 to 20 steps."""
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=0, steps=1000)
    assert done.metrics["diverged"] == 1
    assert done.metrics["test_loss_norm"] < 0.07
    assert done.metrics["test_loss_value"] < 0.07
