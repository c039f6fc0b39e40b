"""Real data that need no download: scikit-learn's handwritten digits and its two photographs."""

from __future__ import annotations

import numpy as np

from etude.data.sets import stratified

TEST = 360
"""Test images of the digits; the other 1,437 train."""


def digits() -> tuple[np.ndarray, ...]:
    """Return (train x, train y, test x, test y): uint8 (N, 1, 8, 8) in 0 to 255 (ink is bright), int64 (N,).

    The scans have 17 grey levels, 0 to 16; they become round(255 v / 16). The split is stratified and fixed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    y = bunch.target.astype(np.int64)
    train, test = stratified(y, TEST)
    return x[train], y[train], x[test], y[test]


def photographs() -> dict[str, np.ndarray]:
    """Return {"china": …, "flower": …}, uint8 RGB (427, 640, 3)."""
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    return {
        name.rpartition("/")[2].removesuffix(".jpg"): np.ascontiguousarray(image)
        for name, image in zip((name.replace("\\", "/") for name in bunch.filenames), bunch.images)
    }
