"""Windows and everything over them against torch's kernels and their gradients, to 1e-12 in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from etude.blocks.nn.windows import (
    Window,
    convolve,
    convolve_backward,
    convolve_transposed,
    convolve_transposed_backward,
    fold,
    local_response,
    local_response_backward,
    max_pool,
    max_pool_backward,
    max_unpool,
    max_unpool_backward,
    mean_pool,
    mean_pool_backward,
    unfold,
)

CASES = [
    {}, {"stride": 2}, {"padding": 1}, {"padding": (2, 0), "stride": (1, 3)}, {"dilation": 2, "padding": 2},
    {"groups": 2}, {"groups": 4, "stride": 2, "padding": (1, 2), "dilation": (1, 2)},
]  # fmt: skip


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_and_its_gradients_are_torchs(case):
    x, weight, bias = random(2, 4, 9, 8), random(8, 4 // case.get("groups", 1), 3, 2), random(8)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wanted = F.conv2d(*inputs, **case)
    near(convolve(x, weight, bias, **case), wanted)
    slope = torch.randn_like(wanted)
    for mine, theirs in zip(convolve_backward(slope, x, weight, **case), torch.autograd.grad(wanted, inputs, slope)):
        near(mine, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_convolution_and_its_gradients_are_torchs(case):
    x, weight, bias = random(2, 4, 5, 6), random(4, 8 // case.get("groups", 1), 3, 2), random(8)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    extra = (1, 0) if case.get("stride") == 2 else 0
    wanted = F.conv_transpose2d(*inputs, output_padding=extra, **case)
    near(convolve_transposed(x, weight, bias, output_padding=extra, **case), wanted)
    slope = torch.randn_like(wanted)
    found = convolve_transposed_backward(slope, x, weight, **case)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, inputs, slope)):
        near(mine, theirs)


def test_transposed_convolution_is_the_adjoint():
    x, weight, y = random(1, 3, 8, 7), random(5, 3, 3, 3), random(1, 5, 4, 4)
    forward = convolve(x, weight, stride=2, padding=1)
    back = convolve_transposed(y, weight, stride=2, padding=1, output_padding=(1, 0))
    near((forward * y).sum(), (x * back).sum())


def test_fold_is_the_adjoint_of_unfold_and_both_are_torchs():
    for kernel, stride, padding, dilation in itertools.product(((1, 2), (3, 3)), (1, 2), (0, 1), (1, 2)):
        window = Window.of(kernel, stride, padding, dilation)
        x = random(2, 3, 7, 6)
        seen = unfold(x, window)
        places = window.places(7, 6)
        assert seen.shape == (2, 3, *kernel, *places)
        settings = {"dilation": dilation, "padding": padding, "stride": stride}
        near(seen.reshape(2, -1, places[0] * places[1]), F.unfold(x, kernel, **settings))
        other = torch.randn_like(seen)
        near(fold(other, window, 7, 6), F.fold(other.reshape(2, -1, places[0] * places[1]), (7, 6), kernel, **settings))
        near((seen * other).sum(), (x * fold(other, window, 7, 6)).sum())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, None, 0), (3, 2, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0))]
)
def test_pooling_and_its_gradients_are_torchs(kernel, stride, padding):
    x = random(2, 3, 8, 9).requires_grad_()
    wanted, where = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    y, places = max_pool(x.detach(), kernel, stride, padding)
    assert torch.equal(y, wanted.detach())
    assert torch.equal(places, where)
    slope = torch.randn_like(wanted)
    near(max_pool_backward(slope, places, 8, 9), torch.autograd.grad(wanted, x, slope)[0])
    wanted = F.avg_pool2d(x, kernel, stride, padding)
    near(mean_pool(x.detach(), kernel, stride, padding), wanted.detach())
    near(mean_pool_backward(slope, 8, 9, kernel, stride, padding), torch.autograd.grad(wanted, x, slope)[0])


def test_the_first_of_equal_maxima_counts():
    x = torch.zeros(1, 1, 2, 4)
    assert max_pool(x, 2)[1].tolist() == F.max_pool2d(x, 2, return_indices=True)[1].tolist() == [[[[0, 2]]]]


def test_un_pooling_is_torchs_and_undoes_pooling():
    x = random(2, 3, 6, 8)
    y, places = max_pool(x, 2)
    y = y.requires_grad_()
    wanted = F.max_unpool2d(y, places, 2, output_size=(6, 8))
    near(max_unpool(y.detach(), places, 6, 8), wanted.detach())
    slope = torch.randn_like(wanted)
    near(max_unpool_backward(slope, places), torch.autograd.grad(wanted, y, slope)[0])
    assert torch.equal(max_pool(max_unpool(y.detach().abs(), places, 6, 8), 2)[1], places)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_local_response_normalisation_is_torchs(size):
    x = random(2, 7, 3, 4).requires_grad_()
    settings = {"size": size, "alpha": 0.5, "beta": 0.6, "k": 2.0}
    wanted = F.local_response_norm(x, **settings)
    near(local_response(x.detach(), **settings), wanted.detach())
    slope = torch.randn_like(wanted)
    near(local_response_backward(slope, x.detach(), **settings), torch.autograd.grad(wanted, x, slope)[0])


def test_the_size_stays_only_with_this_padding_and_stride_one():  # E25
    for k, d in ((3, 1), (5, 1), (3, 2)):
        assert Window.of(k, 1, d * (k - 1) // 2, d).places(11, 8) == (11, 8)
    assert Window.of(3).places(11, 8) == (9, 6)
    assert Window.of(3, 2, 1).places(11, 8) == (6, 4)


def test_refusals():
    with pytest.raises(ValueError, match="does not fit"):
        Window.of(5).places(4, 9)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        Window.of(3, 0)
    with pytest.raises(ValueError, match="3 channels cannot be split into 2 groups"):
        convolve(torch.zeros(1, 3, 4, 4), torch.zeros(2, 1, 3, 3), groups=2)
    with pytest.raises(ValueError, match=r"has \(2, 2\) windows, not \(3, 3\)"):
        fold(torch.zeros(1, 1, 3, 3, 3, 3), Window.of(3), 4, 4)
