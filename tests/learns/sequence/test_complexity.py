"""Complexity: nothing is learned; the obvious answer is that at n = 2d half of attention's products are quadratic."""

from __future__ import annotations

import torch

from etude.sequence.complexity import Config, Products, attention, weights


def test_half_of_the_products_are_quadratic_at_twice_the_width():
    """E67, measured: a third at n = d, a half at n = 2d, three quarters at n = 6d, exactly."""
    config = Config(width=8)
    for times, share in ((1, 1 / 3), (2, 1 / 2), (6, 3 / 4)):
        with Products() as counter:
            attention(torch.empty(8 * times, 8, device="meta"), weights(config, "meta"))
        assert counter.by["bmm"] / counter.by.total() == share
