"""U-Net learns to tell a line's two ends apart, which no single pixel shows."""

import torch

import etude
from etude.core.spec import Spec
from etude.segmentation.parts.scenes import Part, Scenes


def bars(count, seed):
    """Horizontal bars on noise: the left half of a bar is class 1, its right half class 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
    y = torch.zeros(count, 16, 16, dtype=torch.uint8)
    for i in range(count):
        top, left = (int(v) for v in torch.randint(1, 7, (2,), generator=generator))
        x[i, 0, top : top + 4, left : left + 8] += 150
        y[i, top : top + 4, left : left + 4], y[i, top : top + 4, left + 4 : left + 8] = 1, 2
    return Part([*x], [*y])


def scenes():
    """Bars in three splits."""
    spec = Spec((1,), ("nothing", "left", "right"), (0.2,), (0.25,), {"segments": True})
    return Scenes("bars", bars(60, 0), bars(4, 1), bars(10, 2), spec, "drawn here")


def test_learns_which_half_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.segmentation.unet.read", lambda *_: scenes())
    done = etude.run("segmentation/unet", steps=60, crop=16, width=6, quiet=True, seed=0, out=tmp_path / "run")
    assert done.metrics["test_mean_iou"] >= 0.8
