"""Clipped networks learn the adding problem at a rate that ends the unclipped one."""

import etude


def test_clipped_networks_learn_where_the_unclipped_one_ends(tmp_path):
    """T = 20, 1,500 steps: measured 0.042 by norm and 0.102 by value; always answering 1 costs 0.167."""
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=0, length=20, steps=1500)
    assert done.metrics["diverged"] == 1
    assert done.metrics["test_loss_norm"] < 0.07
    assert done.metrics["test_loss_value"] < 0.13
