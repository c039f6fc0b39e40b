"""Products by oneDNN against float64, forwards and backwards; weights laid out once."""

from __future__ import annotations

import pytest
import torch

from etude.blocks.nn.affine import Linear, affine, pack


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((40,), 24, 70), ((4, 10), 70, 24), ((3,), 8, 5), ((33,), 1, 1)]
)
def test_affine_and_its_gradients_equal_float64(rows, inputs, outputs, bias):
    """float32 (whichever kernel takes it) against plain float64 products, forwards and backwards."""
    x, weight = torch.randn(*rows, inputs, dtype=torch.float32), torch.randn(inputs, outputs, dtype=torch.float32)
    shift = torch.randn(outputs, dtype=torch.float32) if bias else None
    grad = torch.randn(*rows, outputs, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, shift) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = affine(*leaves)
    reference = exact[0] @ exact[1] + (exact[2] if bias else 0)
    assert out.dtype == torch.float32
    assert (out - reference).abs().max() < 1e-5 * inputs**0.5 * 3
    out.backward(grad)
    reference.backward(grad.double())
    for ours, theirs in zip(leaves, exact):
        assert ours.grad is not None
        assert ours.grad.shape == theirs.grad.shape
        assert (ours.grad - theirs.grad).abs().max() < 1e-4


def test_linear_is_torchs():
    ours, theirs, x = Linear(8, 5), torch.nn.Linear(8, 5), torch.randn(3, 40, 8)
    ours.load_state_dict(theirs.state_dict())
    assert (ours(x) - theirs(x)).abs().max() < 1e-14


def test_affine_takes_transposed_and_expanded_operands():
    """A tied head is a transposed table, and the gradient of a sum is an expanded scalar."""
    x, table = torch.randn(40, 8, dtype=torch.float32), torch.randn(20, 8, dtype=torch.float32, requires_grad=True)
    affine(x, table.t()).sum().backward()
    assert (table.grad - x.sum(0).expand(20, 8)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_affine_in_other_precisions(dtype):
    x, weight, bias = torch.randn(40, 8).to(dtype), torch.randn(8, 5).to(dtype), torch.randn(5).to(dtype)
    out = affine(x, weight, bias)
    assert out.dtype == dtype
    assert (out.double() - (x.double() @ weight.double() + bias.double())).abs().max() < (
        1e-12 if dtype == torch.float64 else 0.1
    )


def test_affine_follows_autocast():
    x, weight = torch.randn(40, 8, dtype=torch.float32), torch.randn(8, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(x, weight, torch.zeros(5, dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_packed_weights_give_the_same_product(rows, dtype):
    x, weight, bias = torch.randn(rows, 1, 24).to(dtype), torch.randn(24, 70).to(dtype), torch.randn(70).to(dtype)
    packed = pack(weight, rows)
    error = (affine(x, weight, bias, packed).double() - affine(x.double(), weight.double(), bias.double())).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.3)
    kept = affine(x, weight, bias, packed).clone()
    weight.zero_()
    assert packed is None or torch.equal(affine(x, weight, bias, packed), kept)  # a copy, as documented


def test_pack_declines_bfloat16_on_processors_without_it(monkeypatch):
    """oneDNN raises there, as on one with AVX2 only."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack(torch.randn(8, 5, dtype=torch.bfloat16), 4) is None
    assert pack(torch.randn(8, 5, dtype=torch.float32), 4) is not None


def test_pack_declines_what_it_would_not_speed_up():
    assert pack(torch.randn(8, 5, dtype=torch.float64), 4) is None
    assert pack(torch.randn(8, 5, dtype=torch.float32), 1) is None
