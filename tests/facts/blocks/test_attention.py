"""Attention against its definition, torch's own modules, exact Jacobians, and the cache against the full pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.blocks.nn.attention import (
    Cache,
    MultiHeadAttention,
    Text,
    attend,
    attention_weights,
    causal_mask,
    join_masks,
)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def qkv(queries=5, keys=7, d=4, batch=(2, 3)):
    return torch.randn(*batch, queries, d), torch.randn(*batch, keys, d), torch.randn(*batch, keys, d)


def test_hand_worked_example():
    """Two keys, scores 0 and ln 3 after the scale 1/√1: weights 1/4 and 3/4."""
    q, k, v = torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]).log(), torch.tensor([[0.0], [8.0]])
    assert torch.allclose(attention_weights(q, k), torch.tensor([[0.25, 0.75]]))
    assert torch.allclose(attend(q, k, v), torch.tensor([[6.0]]))


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "broadcast"])
@pytest.mark.parametrize("causal", [False, True])
def test_fast_path_equals_definition(scale, kind, causal):
    q, k, v = qkv()
    mask = {
        "none": None,
        "bool": torch.rand(2, 3, 5, 7) > 0.4,
        "float": torch.randn(5, 7),
        "broadcast": torch.rand(2, 1, 1, 7) > 0.4,
    }[kind]
    expected = attention_weights(q, k, mask, scale, causal) @ v
    assert torch.isfinite(expected).all()
    assert (attend(q, k, v, mask, scale, causal) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("scale", [None, 1.0])
def test_parity_with_sdpa(scale):
    q, k, v = qkv(7, 7)
    mask = torch.rand(7, 7) > 0.3
    mask |= torch.eye(7, dtype=torch.bool)
    for ours, theirs in [({}, {}), ({"causal": True}, {"is_causal": True}), ({"mask": mask}, {"attn_mask": mask})]:
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale, **theirs)
        assert (attention_weights(q, k, scale=scale, **ours) @ v - expected).abs().max() < 1e-13


def test_scale_is_one_over_root_d():
    """E57: without the scale the result differs; with scale=1 it is the notes' form."""
    q, k, v = qkv(d=16)
    plain = torch.softmax(q @ k.mT, -1) @ v
    assert (attend(q, k, v, scale=1.0) - plain).abs().max() < 1e-13
    assert (attend(q, k, v) - torch.softmax(q @ k.mT / 4, -1) @ v).abs().max() < 1e-13
    assert (attend(q, k, v) - plain).abs().max() > 0.1


def test_weights_are_distributions_over_what_the_mask_allows():
    q, k, _ = qkv()
    mask = torch.rand(2, 3, 5, 7) > 0.5
    mask[..., 0] = True
    weights = attention_weights(q, k, mask)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))
    assert (weights[~mask] == 0).all()
    assert (weights[mask] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_row_is_zero_with_finite_gradients(kind, dtype):
    q, k, v = (part.to(dtype).requires_grad_() for part in qkv())
    allowed = torch.ones(5, 7, dtype=torch.bool)
    allowed[2] = False
    mask = allowed if kind == "bool" else torch.zeros(5, 7, dtype=dtype).masked_fill(~allowed, -torch.inf)
    for out in (attend(q, k, v, mask), attention_weights(q, k, mask) @ v):
        assert (out[:, :, 2] == 0).all()
        assert (out[:, :, [0, 1, 3, 4]] != 0).any(-1).all()
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert (grads[0][:, :, 2] == 0).all()


def test_causal_jacobian_is_exactly_zero_above_the_diagonal_and_dense_below():
    q, k, v = qkv(6, 6, 3, ())
    for function in (
        lambda x: attend(x @ q.T, x @ k.T, x @ v.T, causal=True),
        lambda x: attention_weights(x @ q.T, x @ k.T, causal=True) @ (x @ v.T),
    ):
        jacobian = torch.autograd.functional.jacobian(function, torch.randn(6, 3)).abs().amax((1, 3))  # (l, t)
        assert (jacobian.triu(1) == 0).all()
        assert (jacobian.tril() + torch.ones(6, 6).triu(1) > 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (3, 6), (6, 6)])
def test_causal_queries_are_the_last_positions(queries, keys):
    """The last T rows of the full causal pass are what T queries against a cache of S keys must give."""
    q, k, v = qkv(keys, keys)
    full = attend(q, k, v, causal=True)[..., keys - queries :, :]
    assert (attend(q[..., keys - queries :, :], k, v, causal=True) - full).abs().max() < 1e-13
    assert causal_mask(queries, keys).sum() == sum(keys - queries + 1 + i for i in range(queries))


def test_causal_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="at least as many keys"):
        attend(*(part[..., : 3 if i else 4, :] for i, part in enumerate(qkv())), causal=True)


def test_join_masks_mixes_kinds():
    a, b = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    assert join_masks(a, b).tolist() == join_masks(b, a).tolist() == [1.0, -torch.inf]
    assert join_masks(a, torch.tensor([True, True])).tolist() == [True, False]
    assert join_masks(None, b) is b
    assert join_masks(b, b).tolist() == [2.0, 4.0]


def test_permutation_equivariance_without_positions():
    x, order = torch.randn(2, 7, 8), torch.randperm(7)
    module = MultiHeadAttention(8, 2)
    assert (module(x)[:, order] - module(x[:, order])).abs().max() < 1e-13
    assert (module(x, causal=True)[:, order] - module(x[:, order], causal=True)).abs().max() > 1e-3


def test_uniform_attention_is_the_mean():
    """Zero queries make every score 0, so each query gets the average of the values."""
    _, k, v = qkv()
    assert torch.allclose(attend(torch.zeros(2, 3, 5, 4), k, v), v.mean(-2, keepdim=True).expand(2, 3, 5, 4))


def torch_twin(module: MultiHeadAttention, width: int, heads: int, bias: bool = True) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
    with torch.no_grad():
        for parameter in theirs.parameters():  # zero biases would hide their misuse
            parameter.normal_()
    module.load_state_dict(theirs.state_dict())  # the names are the same
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("masks", ["none", "key", "attention", "both", "heads"])
def test_parity_with_torch_self_attention(masks, heads, bias):
    ours = MultiHeadAttention(8, heads, bias=bias)
    theirs = torch_twin(ours, 8, heads, bias)
    x = torch.randn(3, 5, 8)
    key = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    allowed = causal_mask(5, 5)
    mine, other = {}, {}
    if masks in ("key", "both"):
        mine["key_mask"], other["key_padding_mask"] = key, ~key
    if masks in ("attention", "both"):
        mine["mask"], other["attn_mask"] = allowed, ~allowed
    if masks == "heads":
        mine["mask"] = torch.rand(3, heads, 5, 5) > 0.5
        mine["mask"][..., 0] = True
        other["attn_mask"] = ~mine["mask"].flatten(0, 1)
    expected, weights = theirs(x, x, x, average_attn_weights=False, **other)
    assert (ours(x, **mine) - expected).abs().max() < 1e-12
    assert (ours.weights(x, **mine) - weights).abs().max() < 1e-12


@pytest.mark.parametrize("heads", [1, 2])
def test_parity_with_torch_cross_attention(heads):
    ours = MultiHeadAttention(8, heads)
    theirs = torch_twin(ours, 8, heads)
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    key = torch.rand(3, 6) > 0.3
    key[:, 0] = True
    expected, _ = theirs(q, k, v, key_padding_mask=~key)
    assert (ours(q, k, key_mask=key, value=v) - expected).abs().max() < 1e-12
    expected, weights = theirs(q, k, k, key_padding_mask=~key, average_attn_weights=False)
    assert (ours(q, k, key_mask=key) - expected).abs().max() < 1e-12
    assert (ours.weights(q, k, key_mask=key) - weights).abs().max() < 1e-12
    expected, _ = theirs(q, q, v[:, :5])
    assert (ours(q, value=v[:, :5]) - expected).abs().max() < 1e-12


def test_gradients_equal_torch():
    ours = MultiHeadAttention(8, 2)
    theirs = torch_twin(ours, 8, 2)
    x = torch.randn(2, 4, 8, requires_grad=True)
    key = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    mine = torch.autograd.grad(ours(x, key_mask=key).square().sum(), [x, *ours.parameters()])
    other = torch.autograd.grad(theirs(x, x, x, key_padding_mask=~key)[0].square().sum(), [x, *theirs.parameters()])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(mine, other))


def test_one_head_is_plain_attention_then_an_output_projection():
    """E61: concatenated heads are multiplied by W_O; with one head that is all multi-head attention adds to 6.6."""
    module, x = MultiHeadAttention(6, 1, bias=False), torch.randn(2, 4, 6)
    w_q, w_k, w_v = module.in_proj_weight.chunk(3)
    plain = attend(x @ w_q.T, x @ w_k.T, x @ w_v.T)
    assert (module(x) - plain @ module.out_proj.weight.T).abs().max() < 1e-13


def test_padding_does_not_matter():
    """Whatever stands in padded positions, and however many there are, real outputs stay the same."""
    module, x = MultiHeadAttention(8, 2), torch.randn(2, 4, 8)
    alone = module(x)
    padded = torch.cat([x, torch.randn(2, 3, 8) * 100], dim=1)
    key = torch.arange(7)[None] < 4
    assert (module(padded, key_mask=key.expand(2, 7))[:, :4] - alone).abs().max() < 1e-13


def test_cross_attention_is_independent_between_queries():
    module, q, memory = MultiHeadAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    assert (module(q, memory)[:, :3] - module(q[:, :3], memory)).abs().max() < 1e-13
    changed = memory.clone()
    changed[:, 4:] += 10
    key = torch.arange(6)[None].expand(2, 6) < 4
    assert torch.equal(module(q, memory, key_mask=key), module(q, changed, key_mask=key))


def test_dropout_acts_in_training_only():
    module, x = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_text_alone_equals_the_padded_batch():
    """Packed queries and packed memory give, at the places of the text, what padded ones with masks give; gradients too."""
    module, x, y = MultiHeadAttention(8, 2), torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    lengths = torch.tensor([[5, 2, 1], [4, 6, 3]])
    ours, theirs = (Text.of(torch.arange(n) < rows[:, None]) for n, rows in zip((5, 6), lengths))
    x, y = (text.put(text.take(part)).requires_grad_() for part, text in ((x, ours), (y, theirs)))
    pairs = [
        (module(x, key_mask=ours.mask), module(ours.take(x), key_mask=ours.mask, text=ours)),
        (module(x, causal=True), module(ours.take(x), causal=True, text=ours)),
        (
            module(x, y, key_mask=theirs.mask),
            module(ours.take(x), theirs.take(y), key_mask=theirs.mask, text=ours, memory_text=theirs),
        ),
    ]
    weight = torch.randn(8, 8)
    for padded, packed in pairs:
        assert packed.shape == (8, 8)
        assert (ours.take(padded) - packed).abs().max() < 1e-14
        asked = [x, *module.parameters()]
        grads = [torch.autograd.grad((out * weight).sum(), asked) for out in (ours.take(padded), packed)]
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads))


def test_text_is_put_back_where_it_was():
    text = Text.of(torch.tensor([[True, True, False], [True, False, False]]))
    x = torch.arange(1.0, 4.0)[:, None]
    assert text.places.tolist() == [0, 1, 3]
    assert text.put(x)[..., 0].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert torch.equal(text.take(text.put(x)), x)


def test_advance_and_look_equal_the_whole():
    """Keys and values kept from the positions before, and those of a memory read once, give what everything at once gives."""
    module, x, memory = MultiHeadAttention(8, 2), torch.randn(3, 6, 8), torch.randn(3, 4, 8)
    past, parts = None, []
    for begin, end in [(0, 1), (1, 4), (4, 6)]:
        before = past
        out, past = module.advance(x[:, begin:end], past)
        parts.append(out)
        if before is not None:  # a step leaves the past that it was given as it was
            assert torch.equal(module.advance(x[:, begin:end], before)[0], out)
    assert (torch.cat(parts, 1) - module(x, causal=True)).abs().max() < 1e-13
    key = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert (module.look(x, *module.read(memory), key) - module(x, memory, key_mask=key)).abs().max() < 1e-13


def test_width_must_divide():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        MultiHeadAttention(8, 3)


def test_cache_step_by_step_equals_full_pass():
    q, k, v = qkv(6, 6)
    full = attend(q, k, v, causal=True)
    cache, parts = Cache(1, 2, 3, 8, 4, dtype=torch.float64), []
    for begin, end in [(0, 3), (3, 4), (4, 6)]:
        keys, values = cache.extend(0, k[:, :, begin:end], v[:, :, begin:end])
        parts.append(attend(q[:, :, begin:end], keys, values, causal=True))
        cache.length = end
    assert (torch.cat(parts, dim=2) - full).abs().max() < 1e-13


def test_cache_refuses_what_does_not_fit():
    cache = Cache(1, 2, 3, 5, 4)
    cache.length = 4
    with pytest.raises(ValueError, match="holds 5 positions and position 5 does not fit"):
        cache.extend(0, torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4))
