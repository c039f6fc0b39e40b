"""Attention against loops over it, the network against torch's cells one step after another, and what may not be seen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from etude.blocks.tokens.decoding import beam_search, forced
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.sequence import seq2seq
from etude.sequence.parts.translating import BOS, EOS, PAD, token_nats
from etude.sequence.seq2seq import Attention, Memory, attend

KINDS = ["identity", "general", "additive", "values"]
PLACES = ["readout", "state", "layer"]


def network(vocabulary=9, seed=0, **settings):
    """A small network in float64, its weights large enough for every part to matter."""
    torch.manual_seed(seed)
    config = seq2seq.Config(**{"width": 6, "embedding": 5, **settings})
    model = seq2seq.build(config, Spec(extra={"vocabulary": vocabulary}))["model"].double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    return model


def pairs(lengths=(5, 2, 4), targets=(3, 5, 1), vocabulary=9):
    """Sources, their lengths and targets behind BOS, with EOS where each ends."""
    source, before = (
        torch.zeros(3, max(lengths), dtype=torch.int64),
        torch.zeros(3, max(targets) + 1, dtype=torch.int64),
    )
    after = before.clone()
    for b, (s, t) in enumerate(zip(lengths, targets)):
        source[b, : s - 1], source[b, s - 1] = torch.randint(3, vocabulary, (s - 1,)), EOS
        row = torch.randint(3, vocabulary, (t,))
        before[b, 0], before[b, 1 : t + 1], after[b, :t], after[b, t] = BOS, row, row, EOS
    return source, torch.tensor(lengths), before, after


def plain_attention(model, h, s):
    """§6.5.2 and 6.5.3 for one sentence: e_t by the definition, softmax over the ENCODING times (E56), Σ α v(h)."""
    e = []
    for h_t in h:
        if model.kind == "identity":
            e.append(h_t @ s)
        elif model.kind == "additive":
            e.append(
                model.weigh.weight[0] @ torch.tanh(model.key.weight @ h_t + model.key.bias + model.query.weight @ s)
            )
        else:
            e.append((model.key.weight @ h_t) @ s)
    raised = torch.stack(e).exp()
    weights = raised / raised.sum()
    values = [model.value.weight @ h_t + model.value.bias if model.kind == "values" else h_t for h_t in h]
    return sum(w * v for w, v in zip(weights, values)), weights


@pytest.fixture
def scene():
    """h (2, 4, 5) of which the second sentence has two times of padding, and s (2, 3, 5)."""
    torch.manual_seed(0)
    blank = torch.tensor([[False] * 4, [False, False, True, True]])
    return torch.randn(2, 4, 5).double(), torch.randn(2, 3, 5).double(), blank


@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_its_definition(kind, scene):
    """E56: the weights are over the encoding's times t, and what is read is read with the decoder's s_l of the same step."""
    h, s, blank = scene
    model = Attention(kind, 5).double()
    a, weights = model(s, model.remember(h, blank))
    for b, real in enumerate((4, 2)):
        for step in range(3):
            expected, told = plain_attention(model, h[b, :real], s[b, step])
            torch.testing.assert_close(a[b, step], expected)
            torch.testing.assert_close(weights[b, step, :real], told)
            assert (weights[b, step, real:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3).double())


@pytest.mark.parametrize("kind", KINDS)
def test_attention_follows_the_order_of_its_source(kind, scene):
    h, s, blank = scene
    model, order = Attention(kind, 5).double(), torch.tensor([2, 0, 3, 1])
    a, weights = model(s, model.remember(h, blank))
    turned, moved = model(s, model.remember(h[:, order], blank[:, order]))
    torch.testing.assert_close(turned, a)
    torch.testing.assert_close(moved, weights[..., order])


def test_one_matrix_is_as_good_as_two(scene):
    """e = (W_k h)·(W_q s) = hᵀ W_e s with W_e = W_kᵀ W_q."""
    h, s, blank = scene
    key, query = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    model = Attention("general", 5).double()
    model.key.weight.data = (key.t() @ query).t()
    two = torch.einsum("bsk,blk->bls", h @ key.t(), s @ query.t())
    torch.testing.assert_close(model(s, model.remember(h, blank))[1], attend(two, Memory(h, h, blank))[1])


def test_a_large_scale_chooses_one(scene):
    h, s, blank = scene
    model = Attention("identity", 5).double()
    e = (s @ h.transpose(1, 2)).masked_fill(blank[:, None], -torch.inf)
    a, weights = model(1e4 * s, model.remember(h, blank))
    torch.testing.assert_close(weights, nn.functional.one_hot(e.argmax(-1), 4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(a, h.gather(1, e.argmax(-1)[..., None].expand(-1, -1, 5)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_attention(kind, scene):
    h, s, blank = scene
    model = Attention(kind, 5).double()
    torch.autograd.gradcheck(
        lambda h, s: model(s, model.remember(h, blank)), (h[:, :, :].requires_grad_(), s.requires_grad_())
    )


def cells_of(module, kind, layer, reverse=""):
    """torch's cell with the weights of one layer."""
    cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](module.input_size if not layer else 1, module.width).double()
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, part, getattr(module, f"{part}_l{layer}{reverse}"))
    return cell


def first_of(state):
    return state[0] if isinstance(state, tuple) else state


def plain_encoder(model, kind, source):
    """One sentence without padding: the states h (S, D) of the last layer, and the last state of each layer."""
    x, finals = list(model.source.weight[source]), []
    for layer in range(model.encoder.num_layers):
        outputs, lasts = [], []
        for reverse in ("", "_reverse")[: 1 + model.encoder.bidirectional]:
            cell, state, told = cells_of(model.encoder, kind, layer, reverse), None, []
            for vector in x[::-1] if reverse else x:
                state = cell(vector[None], state)
                told.append(first_of(state)[0])
            outputs.append(told[::-1] if reverse else told)
            lasts.append(state)
        x = [torch.cat(both) for both in zip(*outputs)]
        parts = zip(*[last if isinstance(last, tuple) else (last,) for last in lasts])
        joined = [torch.cat(part, -1) for part in parts]
        finals.append(tuple(joined) if kind == "lstm" else joined[0])
    return torch.stack(x), finals


def plain_logits(model, kind, source, before):
    """The equations for one sentence, one step after another, with torch's cells: logits (T, V)."""
    h, states = plain_encoder(model, kind, source)
    cells = [cells_of(model.decoder, kind, layer) for layer in range(model.decoder.num_layers)]
    upper, above, logits = None if model.upper is None else cells_of(model.upper, kind, 0), None, []
    for token in before:
        x = model.target.weight[token]
        if model.read_in == "state":
            x = torch.cat([x, plain_attention(model.attention, h, first_of(states[-1])[0])[0]])
        for layer, cell in enumerate(cells):
            states[layer] = cell(x[None], states[layer])
            x = first_of(states[layer])[0]
        s = x
        if model.read_in in ("readout", "layer"):
            s = torch.cat([s, plain_attention(model.attention, h, s)[0]])
        if upper is not None:
            above = upper(s[None], above)
            s = first_of(above)[0]
        logits.append(model.readout.weight @ torch.tanh(model.join.weight @ s + model.join.bias) + model.readout.bias)
    return torch.stack(logits)


VARIANTS = [
    *({"attention": kind, "read_in": place} for kind, place in itertools.product(KINDS, PLACES)),
    {"attention": "none"},
    {"cell": "lstm", "layers": 2},
    {"cell": "lstm", "read_in": "state", "bidirectional": False},
    {"layers": 2, "read_in": "state"},
    {"cell": "lstm", "read_in": "layer", "attention": "values"},
    {"attention": "none", "bidirectional": False, "layers": 2},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_network_equals_its_equations_step_by_step(settings):
    """With padding in the batch and none in the reference: neither side's padding has an effect."""
    model = network(**settings)
    source, lengths, before, after = pairs()
    logits = model(source, lengths, before)
    for b in range(3):
        real = int((after[b] != PAD).sum())
        expected = plain_logits(model, settings.get("cell", "gru"), source[b, : lengths[b]], before[b, :real])
        torch.testing.assert_close(logits[b, :real], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", VARIANTS[:4] + VARIANTS[12:15], ids=str)
def test_the_loss_is_the_probability_of_each_token_in_its_turn(settings):
    """Rows 6.3.1 and 6.4.1: the teacher-forced loss is −Σ log p from the step function; and Σ p over all strings is 1."""
    model = network(**settings)
    source, lengths, before, after = pairs()
    loss = token_nats(model(source, lengths, before), after)
    each = forced(model.step, model.begin(source, lengths), before[:, 0], after)
    real = after != PAD
    torch.testing.assert_close(loss, -each[real].sum() / real.sum())
    model, (source, lengths, _, _) = network(vocabulary=4, **settings), pairs(vocabulary=4)
    strings = torch.tensor(list(itertools.product(range(4), repeat=3)))
    many = len(strings)
    state = model.begin(source[:1].expand(many, -1), lengths[:1].expand(many))
    whole = forced(model.step, state, torch.full((many,), BOS), strings).sum(1).exp().sum()
    torch.testing.assert_close(whole, torch.ones(()).double())


@pytest.mark.parametrize("settings", VARIANTS[:4] + VARIANTS[12:15], ids=str)
def test_nothing_behind_the_end_of_a_source_is_seen(settings):
    model = network(**settings)
    source, lengths, before, _ = pairs()
    expected = model(source, lengths, before)
    longer = nn.functional.pad(source, (0, 3))
    torch.testing.assert_close(model(longer, lengths, before), expected)
    with torch.no_grad():  # what the vector of padding holds has no part either
        model.source.weight[PAD] = 1e3
    torch.testing.assert_close(model(source, lengths, before), expected)


@pytest.mark.parametrize("settings", VARIANTS[:4] + VARIANTS[12:15], ids=str)
def test_no_later_token_of_the_target_is_seen(settings):
    model = network(**settings)
    source, lengths, before, _ = pairs()
    logits = model(source, lengths, before)
    for t in range(1, before.shape[1]):
        changed = before.clone()
        changed[:, t:] = torch.randint(3, 9, changed[:, t:].shape)
        moved = model(source, lengths, changed)
        torch.testing.assert_close(moved[:, :t], logits[:, :t], rtol=0, atol=1e-12)
        assert (moved[:, t:] - logits[:, t:]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", VARIANTS[:4] + VARIANTS[12:15], ids=str)
def test_beams_share_the_source_and_keep_their_own_states(settings):
    """Against a search that reads the whole prefix of every hypothesis anew, with a copy of its source beside it."""
    model = network(**settings)
    source, lengths, _, _ = pairs()

    def anew(tokens, state):
        before = torch.cat([state["before"], tokens[:, None]], 1)
        return model(state["source"], state["lengths"], before)[:, -1], {**state, "before": before}

    begin, rules = torch.full((3,), BOS), {"beams": 4, "stop": EOS, "best": 3}
    empty = torch.empty(3, 0, dtype=torch.int64)
    expected = beam_search(anew, {"source": source, "lengths": lengths, "before": empty}, begin, 7, **rules)
    found = beam_search(model.step, model.begin(source, lengths), begin, 7, **rules)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores)
    state = model.begin(source, lengths).select(torch.tensor([0, 0, 1, 1, 2, 2]), None)
    assert state.memory is None or len(state.memory.keys) == 3


def test_without_attention_the_last_state_is_all_that_is_known():
    """The bottleneck: two sources with one last state could not be told apart; with attention they are."""
    for attention, same in (("none", True), ("general", False)):
        model = network(attention=attention, bidirectional=False)
        source, lengths, before, _ = pairs()
        state = model.begin(source, lengths)
        for part in state.states:
            part[:] = 0.3
        logits = model.write(before[:1].expand(3, -1), state)[0]
        assert bool((logits[0] - logits[1]).abs().max() < 1e-12) == same


def test_the_pictured_weights_are_those_of_the_network():
    from etude.sequence.parts.translating import read_task

    task = read_task("reversal", "en-de", 300, 6, 4, 0)
    model = network(vocabulary=task.tokens.size).train()
    weights, written, read = model.looked(task, "abc", "xy")
    assert written == ["x", "y", "⏎"]
    assert read == ["a", "b", "c", "⏎"]
    h, states = plain_encoder(model, "gru", task.tokens.encode("abc"))
    s = cells_of(model.decoder, "gru", 0)(model.target.weight[BOS][None], states[0])
    torch.testing.assert_close(weights[0], plain_attention(model.attention, h, s[0])[1])
    assert model.training


def test_an_odd_width_has_no_halves():
    with pytest.raises(UserError, match="a width of 7 cannot be halved"):
        network(width=7)
    assert network(width=7, bidirectional=False).decoder.width == 7


def test_uniform_logits_are_log_v():
    model = network()
    with torch.no_grad():
        model.readout.weight.zero_()
        model.readout.bias.zero_()
    source, lengths, before, after = pairs()
    assert float(token_nats(model(source, lengths, before), after).detach()) == pytest.approx(math.log(9))
