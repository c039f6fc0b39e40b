"""Positions: the sinusoid's numbers and rotation property, learned tables' bounds and the add/concatenate identity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.blocks.nn.attention import MultiHeadAttention
from etude.blocks.nn.positional import LearnedPositions, append_step, sinusoids


def test_sinusoid_numbers_of_row_one():
    row = sinusoids(2, 8, dtype=torch.float64)[1]
    expected = [f(1 / 10000 ** (2 * i / 8)) for i in range(4) for f in (math.sin, math.cos)]
    assert row.tolist() == pytest.approx(expected, abs=1e-15)
    assert row[:4].tolist() == pytest.approx([0.84147, 0.54030, 0.09983, 0.99500], abs=5e-6)


def test_first_frequency_is_one():
    """E60: the first pair has period 2π; it does not flip between even and odd positions."""
    table = sinusoids(45, 4, dtype=torch.float64)
    assert abs(float(table[44, 0])) < 0.02  # 44 ≈ 7 · 2π
    assert float(table[44, 1]) > 0.999
    assert float(table[2, 1]) == pytest.approx(math.cos(2))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 400), st.integers(0, 99), st.sampled_from([2, 8, 64]))
def test_shift_is_a_fixed_rotation(shift, position, width):
    table = sinusoids(500, width, dtype=torch.float64).unflatten(1, (-1, 2))
    angle = shift * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    sin, cos = table[position, :, 0], table[position, :, 1]
    rotated = torch.stack([sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()], dim=-1)
    assert (rotated - table[position + shift]).abs().max() < 1e-12


def test_hugging_face_marian_holds_the_same_numbers_in_halves():
    marian = pytest.importorskip("transformers.models.marian.modeling_marian", reason="transformers is not installed")
    theirs = marian.MarianSinusoidalPositionalEmbedding(50, 16)
    theirs.weight.data.copy_(theirs.create_weight())
    ours = sinusoids(50, 16)
    assert (torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1) - theirs.weight).abs().max() < 1e-6


def test_sinusoids_refuse_odd_width():
    with pytest.raises(ValueError, match="even width, got 7"):
        sinusoids(3, 7)


def test_learned_positions_add_their_rows():
    positions = LearnedPositions(6, 4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(positions(x), x + positions.weight[:3])
    assert torch.equal(positions(x, start=3), x + positions.weight[3:6])


@pytest.mark.parametrize(("count", "start"), [(7, 0), (3, 4), (1, 6)])
def test_position_out_of_range_raises(count, start):
    with pytest.raises(ValueError, match=f"position {count + start - 1} does not exist: this model has 6 positions"):
        LearnedPositions(6, 4)(torch.zeros(1, count, 4), start)


def test_adding_and_concatenating_agree_after_a_linear_layer():
    """[x; p]·W = x·W₁ + p·W₂."""
    torch.manual_seed(0)
    positions = LearnedPositions(6, 3, mode="concatenate").double()
    x, weight = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)
    joined = F.linear(positions(x), weight)
    apart = F.linear(x, weight[:, :4]) + F.linear(positions.weight[:5], weight[:, 4:])
    assert (joined - apart).abs().max() < 1e-12


def test_append_step():
    out = append_step(torch.ones(2, 3, 4), length=8, start=2)
    assert out.shape == (2, 3, 5)
    assert out[1, :, 4].tolist() == [2 / 8, 3 / 8, 4 / 8]
    with pytest.raises(ValueError, match="position 8 does not exist"):
        append_step(torch.ones(2, 3, 4), length=8, start=6)


def test_positions_break_permutation_equivariance():
    torch.manual_seed(0)
    attention, positions = MultiHeadAttention(8, 2), LearnedPositions(5, 8)
    x, order = torch.randn(1, 5, 8), torch.tensor([4, 2, 0, 1, 3])
    assert torch.allclose(attention(x)[:, order], attention(x[:, order]), atol=1e-6)
    assert not torch.allclose(attention(positions(x))[:, order], attention(positions(x[:, order])), atol=1e-2)
