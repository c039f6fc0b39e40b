"""The Transformer block against torch's encoder and decoder layers, and its position-wise network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.blocks.nn.attention import Text, causal_mask
from etude.blocks.nn.transformer import ACTIVATIONS, Block


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


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_text_alone_equals_the_padded_batch(norm):
    """Whether padding is computed and masked or left out, the text comes out the same."""
    encoder, decoder = Block(8, 2, norm=norm), Block(8, 2, norm=norm, causal=True, cross=True)
    source, target = (
        Text.of(torch.arange(n) < torch.tensor(rows)[:, None]) for n, rows in ((5, [5, 2, 1]), (4, [1, 4, 2]))
    )
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    memory = encoder(x, key_mask=source.mask)
    packed = encoder(source.take(x), text=source)
    assert (source.take(memory) - packed).abs().max() < 1e-12
    whole = decoder(y, memory, memory_key_mask=source.mask)
    alone = decoder(target.take(y), packed, text=target, memory_text=source)
    assert (target.take(whole) - alone).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True])
def test_step_by_step_equals_the_whole(norm, cross):
    """Several rows of a sentence share its memory, which is read once."""
    block, x = Block(8, 2, norm=norm, causal=True, cross=cross), torch.randn(6, 5, 8)
    memory, key = torch.randn(3, 4, 8), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    twice = {"memory": memory.repeat_interleave(2, 0), "memory_key_mask": key.repeat_interleave(2, 0)} if cross else {}
    whole, past, parts = block(x, **twice), None, []
    read = (block.read_memory(memory), key) if cross else ()
    for begin, end in [(0, 2), (2, 3), (3, 5)]:
        out, past = block.advance(x[:, begin:end], past, *read)
        parts.append(out)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    with pytest.raises(ValueError, match="only a causal block"):
        Block(8, 2).advance(x, None)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_looks_are_the_weights_that_torch_takes(norm):
    block, theirs = twin(nn.TransformerDecoderLayer, norm, causal=True, cross=True)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    key = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    seen = {}
    for name, part in (("self", theirs.self_attn), ("cross", theirs.multihead_attn)):
        part.register_forward_pre_hook(lambda m, a, k: (a, k | {"need_weights": True, "average_attn_weights": False}),
                                       with_kwargs=True)  # fmt: skip
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[1]}))
    theirs(x, memory, tgt_mask=~causal_mask(5, 5), memory_key_padding_mask=~key)
    ours = block.looks(x, memory, memory_key_mask=key)
    assert ours.keys() == seen.keys()
    assert all((ours[name] - seen[name]).abs().max() < 1e-12 for name in seen)


def load_marian(block: Block, theirs: nn.Module) -> None:
    """A Marian layer's weights under torch's names."""
    names = {"self_attn": "self_attn", "multihead_attn": "encoder_attn"}
    for ours, other in names.items():
        if (attention := getattr(block, ours)) is not None:
            part = getattr(theirs, other)
            projections = [part.q_proj, part.k_proj, part.v_proj]
            attention.in_proj_weight.data = torch.cat([p.weight for p in projections]).detach()
            attention.in_proj_bias.data = torch.cat([p.bias for p in projections]).detach()
            attention.out_proj.load_state_dict(part.out_proj.state_dict())
    norms = ["self_attn_layer_norm", *(["encoder_attn_layer_norm"] if block.norm3 else []), "final_layer_norm"]
    for number, name in enumerate(norms, 1):
        getattr(block, f"norm{number}").load_state_dict(getattr(theirs, name).state_dict())
    block.linear1.load_state_dict(theirs.fc1.state_dict())
    block.linear2.load_state_dict(theirs.fc2.state_dict())


def test_parity_with_hugging_face_marian_layers():
    """Marian is the paper's network as Hugging Face holds it: post-norm, relu, scale 1/√d."""
    marian = pytest.importorskip("transformers.models.marian.modeling_marian", reason="transformers is not installed")
    config = marian.MarianConfig(
        d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
        activation_function="relu", attn_implementation="eager",
    )  # fmt: skip
    encoder, decoder = (
        kind(config, **more).eval()
        for kind, more in ((marian.MarianEncoderLayer, {}), (marian.MarianDecoderLayer, {"layer_idx": 0}))
    )
    for part in (encoder, decoder):
        for parameter in part.parameters():
            parameter.data.normal_(std=0.5)
    ours = Block(8, 2, 20, norm="post").eval(), Block(8, 2, 20, norm="post", causal=True, cross=True).eval()
    load_marian(ours[0], encoder)
    load_marian(ours[1], decoder)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    key = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)

    def added(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    theirs = first(encoder(x, added(key[:, None, None])))
    mine = ours[0](x, key_mask=key)
    assert (mine - theirs).abs().max() < 1e-12
    theirs = first(
        decoder(y, added(causal_mask(4, 4)[None, None]), encoder_hidden_states=theirs,
                encoder_attention_mask=added(key[:, None, None]))
    )  # fmt: skip
    assert (ours[1](y, mine, memory_key_mask=key) - theirs).abs().max() < 1e-12


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
