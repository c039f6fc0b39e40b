"""The ring buffer: exactly the last N rows, in order, of the dtype added, drawn uniformly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from etude.blocks.acting.replay import Replay


def rows(first, count):
    """`count` rows whose every field tells the number of the row."""
    number = np.arange(first, first + count)
    return {
        "state": np.repeat(number[:, None], 3, 1).astype(np.float32),
        "action": number.astype(np.int64) + 10,
        "reward": number.astype(np.float64) / 7,
        "terminated": number % 3 == 0,
        "byte": (number % 251).astype(np.uint8),
    }


def empty(capacity):
    return Replay(capacity, state=np.zeros(3, np.float32), action=0, reward=0.0, terminated=False, byte=np.uint8(0))


@settings(max_examples=60)
@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(0, 12), max_size=12))
def test_exactly_the_last_rows_are_kept_in_order(capacity, sizes):
    buffer, added = empty(capacity), 0
    for size in sizes:
        size = min(size, capacity)
        buffer.add(**rows(added, size))
        added += size
        held = min(added, capacity)
        assert len(buffer) == held
        if held:
            got, want = buffer.gather(np.arange(held)), rows(added - held, held)
            for name, column in want.items():
                assert got[name].numpy().dtype == column.dtype
                np.testing.assert_array_equal(got[name].numpy(), column)


@pytest.mark.parametrize("added", [5, 8, 13])
def test_state_survives_and_future_is_equal(added):
    buffer, again = empty(8), empty(8)
    for i in range(added):
        buffer.add(**rows(i, 1))
    again.load_state_dict(buffer.state_dict())
    for each in (buffer, again):
        each.add(**rows(added, 3))
    index = buffer.sample((4, 6), torch.Generator().manual_seed(0))
    for name, column in buffer.gather(index).items():
        assert torch.equal(column, again.gather(index)[name])


def test_many_minibatches_equal_one_at_a_time():
    buffer = empty(50)
    buffer.add(**rows(0, 50))
    index = buffer.sample((5, 7), torch.Generator().manual_seed(1))
    together = buffer.gather(index)
    assert together["state"].shape == (5, 7, 3)
    assert together["action"].dtype == torch.int64
    assert together["terminated"].dtype == torch.bool
    for k in range(5):
        for name, column in buffer.gather(index[k]).items():
            assert torch.equal(together[name][k], column)


def test_gathered_rows_are_copies():
    buffer = empty(4)
    buffer.add(**rows(0, 4))
    buffer.gather(np.arange(4))["state"].zero_()
    assert buffer.gather(np.array([3]))["state"].tolist() == [[3.0, 3.0, 3.0]]


def test_samples_are_uniform_over_the_rows_held():
    buffer = empty(20)
    buffer.add(**rows(0, 20))
    buffer.add(**rows(20, 13))  # wrapped
    index = buffer.sample((40_000,), torch.Generator().manual_seed(2))
    numbers = buffer.gather(index)["action"].numpy() - 10
    counts = np.bincount(numbers, minlength=33)
    assert counts[:13].sum() == 0
    assert chisquare(counts[13:]).pvalue > 1e-3
    young = empty(20)
    young.add(**rows(0, 4))
    assert young.sample((1000,), torch.Generator().manual_seed(3)).max() == 3


def test_wrong_rows_are_refused():
    buffer = empty(4)
    with pytest.raises(ValueError, match="at least 1 row"):
        empty(0)
    with pytest.raises(ValueError, match="5 rows at once"):
        buffer.add(**rows(0, 5))
    with pytest.raises(ValueError, match="equally many rows"):
        buffer.add(state=np.zeros((1, 3), np.float32))
