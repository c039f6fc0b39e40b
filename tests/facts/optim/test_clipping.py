"""Clipping by value and by norm against torch.nn.utils and by hand (E21)."""

import math

import pytest
import torch
from torch import nn

from etude.optim.clipping import clip_by_norm, clip_by_value, clip_norm_, clip_value_, global_norm


def with_gradients(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2,))]
    for parameter in params[:2]:
        parameter.grad = scale * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return params  # the last has no gradient


def test_by_value_equals_torch():
    ours, theirs = with_gradients(), with_gradients()
    pure = clip_by_value([p.grad for p in ours[:2]], 0.3)
    clip_value_(ours, 0.3)
    nn.utils.clip_grad_value_(theirs, 0.3)
    for mine, result, expected in zip(ours, pure, theirs, strict=False):
        assert torch.equal(mine.grad, expected.grad)
        assert torch.equal(result, expected.grad)
    assert ours[2].grad is None


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_by_norm_equals_torch_with_its_epsilon(limit):
    ours, theirs = with_gradients(), with_gradients()
    pure = clip_by_norm([p.grad for p in ours[:2]], limit, eps=1e-6)
    norm = clip_norm_(ours, limit, eps=1e-6)
    expected_norm = nn.utils.clip_grad_norm_(theirs, limit)
    assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-14)
    for mine, result, expected in zip(ours, pure, theirs, strict=False):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-13, atol=0)
        torch.testing.assert_close(result, expected.grad, rtol=1e-13, atol=0)
    assert ours[2].grad is None


def test_three_and_four():
    """‖(3, 4)‖ = 5: exactly (0.6, 0.8) here; norm 0.9999998 with torch's ε."""
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert clip_by_norm([g], 1.0)[0].tolist() == pytest.approx([0.6, 0.8], abs=1e-15)
    assert clip_by_norm([g], 1.0, eps=1e-6)[0].norm().item() == pytest.approx(0.9999998, abs=1e-9)


def test_one_norm_over_all_parameters_keeps_the_direction():
    """E21: clipping (3) and (4) one by one would give (1, 1)."""
    a, b = torch.tensor([3.0]), torch.tensor([4.0])
    clipped = clip_by_norm([a, b], 1.0)
    assert [t.item() for t in clipped] == pytest.approx([0.6, 0.8])
    assert global_norm(clipped).item() == pytest.approx(1.0)


def test_small_and_zero_gradients_are_left_alone():
    g = torch.tensor([0.3, 0.4])
    assert torch.equal(clip_by_norm([g], 1.0)[0], g)
    assert torch.equal(clip_by_norm([torch.zeros(3)], 1.0)[0], torch.zeros(3))
    assert global_norm([]).item() == 0.0
    assert clip_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


def test_mixed_precision_gradients_keep_their_dtype():
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for p in params:
        p.grad = torch.full_like(p, 10.0)
    clip_norm_(params, 2.0)
    assert [p.grad.dtype for p in params] == [torch.float32, torch.bfloat16]
    assert [p.grad[0].item() for p in params] == pytest.approx([1.0, 1.0], rel=1e-2)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_must_be_positive(limit):
    for function in (clip_value_, clip_norm_):
        with pytest.raises(ValueError, match="limit must be > 0"):
            function(with_gradients(), limit)


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_saves_a_recurrent_net_that_explodes_without(clip):
    """h ← tanh(W h + x) with a large W over 50 steps: SGD at rate 1 keeps its weights bounded only when clipped."""
    torch.manual_seed(0)
    cell, out = nn.RNN(2, 16, batch_first=True), nn.Linear(16, 1)
    nn.init.orthogonal_(cell.weight_hh_l0, gain=1.7)
    params = [*cell.parameters(), *out.parameters()]
    optimizer = torch.optim.SGD(params, lr=1.0)
    largest = 0.0
    for _ in range(30):
        x = torch.randn(16, 50, 2)
        optimizer.zero_grad()
        loss = (out(cell(x)[0][:, -1]) - x[..., 0].sum(1, keepdim=True)).square().mean()
        loss.backward()
        norm = clip_norm_(params, 1.0).item() if clip else global_norm(p.grad for p in params).item()
        largest = max(largest, norm if math.isfinite(norm) else math.inf)
        optimizer.step()
        if not math.isfinite(loss.item()):
            break
    assert largest > 100  # gradients do explode in both runs
    finite = all(p.isfinite().all() for p in params) and global_norm(params) < 60  # 30 steps of at most 1
    assert finite == clip
