"""Both ways up learn to tell a line's two ends apart."""

import runpy
from pathlib import Path

import pytest

import etude

bars = runpy.run_path(str(Path(__file__).parent / "test_unet.py"))["scenes"]


@pytest.mark.parametrize("decoder", ["convolution", "transposed"])
def test_learns_which_half_is_left(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("etude.segmentation.bottleneck.read", lambda *_: bars())
    done = etude.run(
        "segmentation/bottleneck",
        decoder=decoder,
        steps=150,
        crop=16,
        width=6,
        quiet=True,
        seed=0,
        out=tmp_path / "run",
    )
    assert (
        done.metrics["test_mean_iou"] >= {"convolution": 0.85, "transposed": 0.55}[decoder]
    )  # 0.98 and 0.66; nothing: 0.29
