"""Batches as a function of (seed, step): against the naive concatenation of epochs, over ranks, and over processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.core.errors import UserError
from etude.data.batches import Stream, permutation

sizes = {
    "n": st.integers(1, 40),
    "batch": st.integers(1, 50),
    "world": st.integers(1, 4),
    "seed": st.integers(-5, 2**62),
}


@settings(max_examples=80)
@given(**sizes, steps=st.integers(1, 8))
def test_equals_the_concatenation_of_the_epochs(n, batch, world, seed, steps):
    """Brute force: write the infinite list out, cut it."""
    need = steps * batch * world
    order = np.concatenate([permutation(n, seed, epoch) for epoch in range(need // n + 1)])
    ranks = [Stream(n, batch, seed, rank, world) for rank in range(world)]
    for step in range(steps):
        cut = order[step * batch * world : (step + 1) * batch * world]
        got = [stream.indices(step) for stream in ranks]
        assert all(part.shape == (batch,) and part.dtype == torch.int64 for part in got)
        np.testing.assert_array_equal(torch.cat(got).numpy(), cut)
        assert ranks[0].epoch(step) == step * batch * world // n


@settings(max_examples=40)
@given(**sizes)
def test_two_ranks_are_one_process_with_twice_the_batch(n, batch, world, seed):
    one = Stream(n, 2 * batch, seed)
    two = [Stream(n, batch, seed, rank, 2) for rank in (0, 1)]
    for step in (0, 1, 7):
        assert torch.equal(one.indices(step), torch.cat([stream.indices(step) for stream in two]))


def test_every_sample_once_an_epoch_and_every_epoch_in_another_order():
    n, batch = 103, 10  # batches straddle the ends of the epochs
    stream = Stream(n, batch, seed=3)
    drawn = torch.cat([stream.indices(step) for step in range(n)]).view(batch, n)  # 103 steps of 10 are 10 epochs
    assert all(epoch.sort().values.equal(torch.arange(n)) for epoch in drawn)
    assert len({tuple(epoch.tolist()) for epoch in drawn}) == batch


def test_any_step_in_any_order_and_from_a_fresh_object():
    stream, steps = Stream(50, 16, seed=1), [0, 1, 2, 3, 40, 3, 2, 41, 0, 100_000, 1]
    for step in steps:
        assert torch.equal(stream.indices(step), Stream(50, 16, seed=1).indices(step))
        assert len(stream._kept) <= 2


def test_seeds_ranks_and_steps_differ():
    base = Stream(1000, 64, seed=0)
    assert not torch.equal(base.indices(0), Stream(1000, 64, seed=1).indices(0))
    assert not torch.equal(base.indices(0), base.indices(1))
    ranks = [set(Stream(1000, 64, 0, rank, 2).indices(0).tolist()) for rank in (0, 1)]
    assert not ranks[0] & ranks[1]


def test_permutations_are_uniform():
    """All 24 orders of four samples, chi-square over 4,800 seeds: 23 degrees of freedom, 99.99 % point 58.6."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(permutation(4, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 58.6


def test_the_order_is_the_same_in_every_process_and_pinned():
    """A changed order would silently change every recorded run."""
    code = "from etude.data.batches import permutation as p; print(p(8, 0, 0).tolist(), p(8, 0, 1).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[7, 1, 5, 6, 2, 0, 4, 3] [7, 4, 6, 5, 3, 2, 0, 1]"


def test_steps_of_epochs():
    assert Stream(100, 10, 0).steps(1) == 10
    assert Stream(101, 10, 0).steps(1) == 11
    assert Stream(101, 5, 0, 0, 2).steps(3) == 31
    assert Stream(100, 10, 0).steps(0.5) == 5


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"rank": 2, "world": 2}, {"rank": -1}, {"world": 0}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(UserError, match="No batches can be made"):
        Stream(**{"n": 5, "batch": 2, "seed": 0, **wrong})
    with pytest.raises(ValueError, match="negative"):
        Stream(5, 2, 0).indices(-1)
