"""MAML adapts where joint pre-training cannot."""

import etude


def test_adapts_faster_than_pretraining(tmp_path):
    flags = {"steps": 1200, "tasks": 16, "test_tasks": 200, "quiet": True, "seed": 0}
    meta = etude.run("meta/maml", out=tmp_path / "meta", **flags).metrics
    joint = etude.run("meta/maml", order="none", out=tmp_path / "joint", **flags).metrics
    assert meta["test_error_10"] < 0.5 * joint["test_error_10"]
    assert meta["test_error_1"] < 0.7 * joint["test_error_1"]
