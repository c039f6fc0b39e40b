"""Real data that need no download: scikit-learn's handwritten digits and its two photographs."""

from __future__ import annotations

import numpy as np

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


def stratified(labels: np.ndarray, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices of `labels` into (train, test), sorted, `test` of them for testing, classes in proportion.

    Each class gives floor(test · share) and the classes with the largest remainders give one more, so the total is
    exact. Within a class the members with the smallest keys of a Philox stream are chosen: equal on every machine.
    """
    keys = np.random.Philox(key=seed).random_raw(len(labels))
    kinds, counts = np.unique(labels, return_counts=True)
    exact = counts * (test / len(labels))
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: test - quota.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for kind, count in zip(kinds, quota):
        members = np.flatnonzero(labels == kind)
        chosen[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
