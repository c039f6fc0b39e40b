"""The Transformer block against torch's encoder and decoder layers, and its position-wise network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.blocks.nn.attention import causal_mask
from etude.blocks.nn.transformer import ACTIVATIONS, Block, affine, pack


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def twin(kind: type[nn.Module], norm: str, activation: str = "relu", **ours) -> tuple[Block, nn.Module]:
    theirs = kind(8, 2, 20, dropout=0.0, activation=ACTIVATIONS[activation], batch_first=True, norm_first=norm == "pre")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    block = Block(8, 2, 20, norm=norm, activation=activation, **ours)
    block.load_state_dict(theirs.state_dict())  # same names, same shapes
    return block, theirs


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parity_with_torch_encoder_layer(norm, activation):
    block, theirs = twin(nn.TransformerEncoderLayer, norm, activation)
    x, key = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert (block(x, key_mask=key) - theirs(x, src_key_padding_mask=~key)).abs().max() < 1e-12
    block.causal = True
    assert (block(x) - theirs(x, src_mask=~causal_mask(5, 5))).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parity_with_torch_decoder_layer(norm):  # E65: one memory, the last encoder layer's
    block, theirs = twin(nn.TransformerDecoderLayer, norm, causal=True, cross=True)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    key = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    expected = theirs(x, memory, tgt_mask=~causal_mask(5, 5), memory_key_padding_mask=~key)
    assert (block(x, memory, memory_key_mask=key) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_equal_torch(norm):
    block, theirs = twin(nn.TransformerEncoderLayer, norm)
    x = torch.randn(2, 4, 8, requires_grad=True)
    names = dict(theirs.named_parameters())
    mine = torch.autograd.grad(block(x).square().sum(), [block.get_parameter(n) for n in names])
    other = torch.autograd.grad(theirs(x).square().sum(), list(names.values()))
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(mine, other))


def test_norm_orders_are_the_papers_not_the_notes():
    """E64: post is LN(x + Sub(x)), pre is x + Sub(LN(x)); x + LN(Sub(x)) is neither."""
    for norm in ("pre", "post"):
        block = Block(8, 2, norm=norm)
        x = torch.randn(2, 4, 8)

        def network(h, block=block):
            return block.linear2(F.relu(block.linear1(h)))

        a, one, two = block.self_attn, block.norm1, block.norm2
        if norm == "pre":
            h = x + a(one(x))
            expected = h + network(two(h))
        else:
            h = one(x + a(x))
            expected = two(h + network(h))
        notes = x + one(a(x))
        notes = notes + two(network(notes))
        assert (block(x) - expected).abs().max() < 1e-12
        assert (block(x) - notes).abs().max() > 0.1


def test_position_wise_network_is_two_one_by_one_convolutions():
    """E62: Linear–ReLU–Linear at each position alone, hidden width 4·D by default."""
    block, x = Block(8, 2), torch.randn(2, 5, 8)
    assert block.linear1.weight.shape == (32, 8)
    hidden = F.relu(F.conv1d(x.mT, block.linear1.weight[:, :, None], block.linear1.bias))
    expected = F.conv1d(hidden, block.linear2.weight[:, :, None], block.linear2.bias).mT
    assert (block._network(x) - expected).abs().max() < 1e-12
    order = torch.randperm(5)
    assert (block._network(x)[:, order] - block._network(x[:, order])).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_stack_keeps_shape_and_causality(norm):
    blocks = nn.ModuleList(Block(6, 2, norm=norm, causal=True) for _ in range(3))

    def stack(x):
        for block in blocks:
            x = block(x[None])[0]
        return x

    jacobian = torch.autograd.functional.jacobian(stack, torch.randn(5, 6)).abs().amax((1, 3))
    assert jacobian.shape == (5, 5)
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian.tril() + torch.ones(5, 5).triu(1) > 0).all()


def test_dropout_in_training_only():
    block, x = Block(8, 2, dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_memory_and_norm_are_checked():
    x = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match="memory goes with cross=True"):
        Block(8, 2)(x, x)
    with pytest.raises(ValueError, match="memory goes with cross=True"):
        Block(8, 2, cross=True)(x)
    with pytest.raises(ValueError, match="norm must be"):
        Block(8, 2, norm="middle")


# ------------------------------------------------------------------------------------------- affine and pack


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
