"""MAML adapts where joint pre-training cannot."""

import etude


def test_adapts_faster_than_pretraining(tmp_path):
    """Errors as a share of pre-training's, seeds 0-5: 0.28 to 0.37 after one step (bar 0.7), 0.18 to 0.21 after ten (0.5).

    At the default rate of 1e-3 this short run leaves 0.42 to 0.66 and 0.27 to 0.48: too near the bars.
    """
    flags = {"steps": 1200, "tasks": 16, "test_tasks": 200, "learning_rate": 3e-3, "quiet": True, "seed": 0}
    meta = etude.run("meta/maml", out=tmp_path / "meta", **flags).metrics
    joint = etude.run("meta/maml", inner_steps=0, out=tmp_path / "joint", **flags).metrics
    assert meta["test_error_10"] < 0.5 * joint["test_error_10"]
    assert meta["test_error_1"] < 0.7 * joint["test_error_1"]
