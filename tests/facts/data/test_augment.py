"""Batched augmentation against a loop over images, and its distribution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from etude.data.augment import crop, flip, shift


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_crop_equals_a_loop(dtype):
    x = torch.randint(1, 255, (6, 3, 7, 9), generator=make(0)).to(dtype)
    got = crop(x, 2, make(5))
    g = make(5)
    top, left = torch.randint(5, (6,), generator=g), torch.randint(5, (6,), generator=g)
    for image, row, column, result in zip(x, top, left, got):
        padded = torch.zeros(3, 11, 13, dtype=dtype)
        padded[:, 2:9, 2:11] = image
        assert torch.equal(result, padded[:, row : row + 7, column : column + 9])
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert got.is_contiguous()


def test_crop_to_another_size_and_impossible_sizes():
    x = torch.arange(2 * 36.0).view(2, 1, 6, 6)
    got = crop(x, 0, make(0), size=4)
    windows = F.unfold(x[:1], 4)[0].T.reshape(-1, 4, 4)
    assert got.shape == (2, 1, 4, 4)
    assert (windows == got[0, 0]).flatten(1).all(1).sum() == 1
    with pytest.raises(ValueError, match="cannot cut 9×9 from 8×8"):
        crop(x, 1, make(0), size=9)


def test_shift_moves_a_point_uniformly_and_fills_with_zeros():
    x = torch.zeros(10_000, 1, 7, 7)
    x[:, :, 3, 3] = 1
    moved = shift(x, 2, make(1))
    counts = moved.sum((0, 1))
    assert moved.sum() == len(x)  # no point is lost or doubled
    assert counts[1:6, 1:6].sum() == len(x)
    expected = len(x) / 25
    assert ((counts[1:6, 1:6] - expected) ** 2 / expected).sum() < 58  # chi-square, 24 degrees, 99.99 % point 60
    ones = shift(torch.ones(500, 1, 5, 5), 2, make(2))
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    assert ones.flatten(1).sum(1).unique().tolist() == [9.0, 12.0, 15.0, 16.0, 20.0, 25.0]  # (5−a)(5−b)


def test_flip_mirrors_left_to_right_about_half():
    x = torch.randint(0, 255, (4000, 1, 2, 3), generator=make(3), dtype=torch.uint8)
    x[:, :, 0, 0], x[:, :, 0, 2] = 1, 2
    got = flip(x, make(4))
    turned = got[:, 0, 0, 0] == 2
    assert torch.equal(got[turned], x[turned].flip(-1))
    assert torch.equal(got[~turned], x[~turned])
    assert 0.45 < turned.float().mean() < 0.55
    assert torch.equal(flip(x, make(4), 0.0), x)
    assert torch.equal(flip(x, make(4), 1.0), x.flip(-1))


def test_same_generator_same_pictures_and_the_input_is_untouched():
    x = torch.rand(5, 1, 6, 6, generator=make(0))
    kept = x.clone()
    for change in (lambda g: shift(x, 2, g), lambda g: crop(x, 1, g), lambda g: flip(x, g)):
        assert torch.equal(change(make(7)), change(make(7)))
        assert any(not torch.equal(change(make(7)), change(make(seed))) for seed in range(8, 12))
    assert torch.equal(x, kept)
