"""FCN learns to tell a line's two ends apart, and finer scores draw its rim closer than the coarse ones alone."""

import runpy
from pathlib import Path

import etude

bars = runpy.run_path(str(Path(__file__).parent / "test_unet.py"))["scenes"]


def test_learns_which_half_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.segmentation.fcn.read", lambda *_: bars())
    flags = {"steps": 80, "crop": 16, "levels": 2, "width": 6, "head_width": 32, "quiet": True, "seed": 0}
    fine = etude.run("segmentation/fcn", **flags, fused=1, out=tmp_path / "fine")
    coarse = etude.run("segmentation/fcn", **flags, fused=0, out=tmp_path / "coarse")
    assert fine.metrics["test_mean_iou"] >= 0.75  # 0.86
    assert fine.metrics["test_mean_iou"] >= 0.05 + coarse.metrics["test_mean_iou"]  # 0.74
