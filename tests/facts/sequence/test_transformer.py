"""The Transformer against torch.nn.Transformer, Hugging Face's Marian, exact Jacobians and itself step by step."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from etude.blocks.nn.positional import sinusoids
from etude.blocks.tokens import decoding
from etude.core.errors import UserError
from etude.sequence.parts.translating import BOS, EOS, PAD
from etude.sequence.transformer import Architecture, Transformer
from etude.sequence.transformer.network import Positions
from etude.sequence.transformer.train import Config, rate, smoothed_nats

plain = runpy.run_path(str(Path(__file__).with_name("plain_transformer.py")))
OF = Architecture(vocabulary=11, context=12, layers=2, heads=2, width=8, dropout=0.0)
KINDS = ["sinusoidal", "learned", "concatenated", "appended", "none"]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**changes) -> Transformer:
    model = Transformer(replace(OF, **changes)).eval()
    for parameter in model.parameters():  # zero biases and norms of 1 would hide their misuse
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def pairs(lengths=(5, 2, 4), targets=(3, 6, 1)):
    """source (B, S) with its lengths, and before (B, T), PAD behind the text."""
    source, before = torch.full((len(lengths), max(lengths)), PAD), torch.full((len(targets), max(targets)), PAD)
    for row, (n, m) in enumerate(zip(lengths, targets)):
        source[row, :n] = torch.cat([torch.randint(3, 11, (n - 1,)), torch.tensor([EOS])])
        before[row, :m] = torch.cat([torch.tensor([BOS]), torch.randint(3, 11, (m - 1,))])
    return source, torch.tensor(lengths), before


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", KINDS)
def test_parity_with_torch_transformer(norm, positions):
    """Logits and all gradients of ragged text, computed without its padding, equal torch's on the padded batch.

    E58: queries are made from the layer's own states; E65: the decoder's layers look at the encoder's last.
    """
    model = network(positions=positions, norm_placement=norm)
    theirs = plain["Plain"](model.of).eval()
    theirs.load(model.state_dict())
    source, lengths, before = pairs()
    expected, text = theirs(source, before), before != PAD
    ours = model(source, lengths, before)
    assert (ours - expected)[text].abs().max() < 1e-12
    assert not ours[~text].any()
    flat = model(source, lengths, before, flat=True)
    assert torch.equal(flat, ours[text])
    weight = torch.randn_like(flat)
    own = dict(model.named_parameters())
    other = dict(theirs.named_like_ours())
    assert own.keys() == other.keys()
    mine = torch.autograd.grad((flat * weight).sum(), list(own.values()))
    grads = dict(zip(other, torch.autograd.grad((expected[text] * weight).sum(), list(other.values()))))
    assert all((a - grads[name]).abs().max() < 1e-10 for name, a in zip(own, mine))


def test_parity_with_hugging_face_marian():
    """The paper's network (post-norm, no norm at the end, √D, one table): weights, with the features in Marian's order.

    Marian's sinusoids are [sin half | cos half], ours alternate: feature π(j) here is feature j there.
    """
    marian = pytest.importorskip("transformers.models.marian.modeling_marian", reason="transformers is not installed")
    config = marian.MarianConfig(
        vocab_size=11, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, activation_function="relu", scale_embedding=True, pad_token_id=PAD,
        max_position_embeddings=12, decoder_start_token_id=BOS, eos_token_id=EOS, bos_token_id=BOS, attn_implementation="eager",
        share_encoder_decoder_embeddings=True, forced_eos_token_id=None,
    )  # fmt: skip
    theirs = marian.MarianMTModel(config).eval()
    for name, parameter in theirs.named_parameters():
        if "embed_positions" not in name:
            parameter.data.normal_(std=0.5)
    theirs.tie_weights()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).argsort()  # ours[j] = theirs[order[j]]
    model = Transformer(OF).eval()
    state = {name: value.double() for name, value in theirs.state_dict().items()}
    mine = {"embedding.weight": state["model.shared.weight"][:, order]}
    for side, parts in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        norms = [f"{part}_layer_norm" for part in (*parts, "final")]
        for layer in range(2):
            old, new = f"model.{side}.layers.{layer}.", f"{side}.{layer}."
            for part, name in zip(parts, ("self_attn", "multihead_attn")):
                inner = [state[f"{old}{part}.{p}_proj.weight"][:, order] for p in "qkv"]
                mine[f"{new}{name}.in_proj_weight"] = torch.cat(inner)
                mine[f"{new}{name}.in_proj_bias"] = torch.cat([state[f"{old}{part}.{p}_proj.bias"] for p in "qkv"])
                for kind in ("weight", "bias"):
                    mine[f"{new}{name}.out_proj.{kind}"] = state[f"{old}{part}.out_proj.{kind}"][order]
            for number, norm in enumerate(norms, 1):
                for kind in ("weight", "bias"):
                    mine[f"{new}norm{number}.{kind}"] = state[f"{old}{norm}.{kind}"][order]
            mine |= {
                f"{new}linear1.weight": state[f"{old}fc1.weight"][:, order],
                f"{new}linear1.bias": state[f"{old}fc1.bias"],
            }
            mine |= {f"{new}linear2.{kind}": state[f"{old}fc2.{kind}"][order] for kind in ("weight", "bias")}
    model.load_state_dict(mine)
    source, lengths, before = pairs()
    out = theirs.double()(input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=before)
    expected = out.logits - state["final_logits_bias"]
    text = before != PAD
    # Marian's table of positions is float32
    assert (model(source, lengths, before) - expected)[text].abs().max() < 1e-5


@pytest.mark.parametrize("positions", KINDS)
def test_padding_and_neighbours_change_nothing(positions):
    model = network(positions=positions)
    source, lengths, before = pairs()
    together = model(source, lengths, before)
    wider = torch.cat([source, torch.full((3, 3), PAD)], 1), lengths, torch.cat([before, torch.full((3, 2), PAD)], 1)
    assert (model(*wider)[:, :6] - together).abs().max() < 1e-13
    for row, (n, m) in enumerate(zip((5, 2, 4), (3, 6, 1))):
        alone = model(source[row : row + 1, :n], lengths[row : row + 1], before[row : row + 1, :m])
        assert (alone[0] - together[row, :m]).abs().max() < 1e-13


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_answer_depends_on_a_later_token(norm):
    """∂ logits_l / ∂ x_t is exactly 0 for t > l and is not for t ≤ l; every source token reaches every answer."""
    model = network(norm_placement=norm)
    inputs = {}

    def keep(module, given, out):
        inputs[module] = out
        return out

    for part in (model.source_positions, model.target_positions):
        part.register_forward_hook(keep)
    source, lengths, before = pairs((4,), (5,))
    logits = model(source, lengths, before)[0]
    for place in range(5):
        grads = torch.autograd.grad(logits[place].square().sum(), [*inputs.values()], retain_graph=True)
        read, written = (grad[0].abs().amax(1) for grad in grads)
        assert (written[place + 1 :] == 0).all()
        assert (written[: place + 1] > 0).all()
        assert (read > 0).all()


def test_without_positions_the_encoder_sees_a_set():
    order = torch.tensor([3, 0, 4, 1, 2])
    source, lengths, _ = pairs((5,), (1,))
    for positions, same in (("none", True), ("sinusoidal", False)):
        model = network(positions=positions)
        states = model.encode(source, lengths)[0]
        assert torch.allclose(model.encode(source[:, order], lengths)[0], states[order]) == same


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", KINDS)
def test_teacher_forcing_equals_step_by_step(norm, positions):
    """The logits of the whole target are those that the kept keys and values give token by token."""
    model = network(positions=positions, norm_placement=norm)
    source, lengths, before = pairs(targets=(6, 6, 6))
    whole = model(source, lengths, before).log_softmax(-1)
    targets = torch.cat([before[:, 1:], torch.full((3, 1), EOS)], 1)
    told = decoding.forced(model.step, model.begin(source, lengths), before[:, 0], targets)
    assert (whole.gather(2, targets[..., None])[..., 0] - told).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_weights_laid_out_for_some_rows_say_the_same(norm):
    """In float32, where the third step of as many rows takes the laid out ones: rows copied, swapped and fewer, and the logits
    of what each has read are those of the whole; no state is overwritten."""
    model = network(norm_placement=norm).float()
    source, lengths, before = pairs(targets=(6, 6, 6))
    state, read, states = model.begin(source, lengths), torch.empty(3, 0, dtype=torch.int64), []
    for place, order in enumerate(([0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2], [1, 2])):
        rows, kept = torch.tensor(order), torch.tensor([row in order for row in range(3)]).nonzero()[:, 0]
        if len(rows) < len(read):
            state, read = decoding.select(state, rows, kept), read[rows]
        read = torch.cat([read, before[rows, place : place + 1]], 1)
        states.append((state, read))
        logits, state = model.step(read[:, -1], state)
        whole = model(source[rows], lengths[rows], read)[:, -1]
        assert (logits - whole).abs().max() < 1e-5
    for old, read in states[::-1]:
        again, _ = model.step(read[:, -1], old)
        rows = torch.arange(3)[3 - len(read) :]
        assert (again - model(source[rows], lengths[rows], read)[:, -1]).abs().max() < 1e-5
    two = decoding.select(model.begin(source, lengths), torch.tensor([0, 0, 1, 1, 2, 2]))
    tokens = before[:, :1].repeat_interleave(2, 0)
    tokens[1::2] = 5
    _, two = model.step(tokens[:, 0], two)
    swapped = decoding.select(two, torch.tensor([1, 0, 3, 3, 5, 4]))
    logits, _ = model.step(torch.full((6,), 4), swapped)
    seen = torch.cat([tokens[[1, 0, 3, 3, 5, 4]], torch.full((6, 1), 4)], 1)
    sources = torch.tensor([0, 0, 1, 1, 2, 2])
    assert (logits - model(source[sources], lengths[sources], seen)[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (3, 0.0)])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_kept_keys_and_values_translate_as_full_recomputation(norm, beams, penalty):
    """Beam search over the state, side by side, against torch's Transformer run anew for every hypothesis and token."""
    model = network(norm_placement=norm)
    theirs = plain["Plain"](model.of).eval()
    theirs.load(model.state_dict())
    source, lengths, _ = pairs((5, 2, 4, 3), (1, 1, 1, 1))
    found = decoding.beam_search(
        model.step, model.begin(source, lengths), torch.full((4,), BOS), 7, beams=beams, stop=EOS, pad=PAD,
        length_penalty=penalty,
    )  # fmt: skip
    for row, n in enumerate((5, 2, 4, 3)):
        expected = plain["written"](theirs, source[row, :n], 7, beams, penalty)
        ours = [token for token in found.tokens[row, 0].tolist() if token not in (PAD, EOS)]
        assert ours == [token for token in expected if token != PAD]


def test_looks_are_torchs_weights():
    model = network(norm_placement="pre")
    theirs = plain["Plain"](model.of).eval()
    theirs.load(model.state_dict())
    seen: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": [], "cross": []}
    asked = {"need_weights": True, "average_attn_weights": False}
    for side in ("encoder", "decoder"):
        for layer in getattr(theirs.inner, side).layers:
            for name, part in ((side, layer.self_attn), ("cross", getattr(layer, "multihead_attn", None))):
                if part is not None:
                    part.register_forward_pre_hook(lambda m, a, k: (a, k | asked), with_kwargs=True)
                    part.register_forward_hook(lambda m, a, out, name=name: seen[name].append(out[1]))
    source, lengths, before = pairs()
    theirs(source, before)
    ours = model.looks(source, lengths, before)
    for name, found in ours.items():
        assert len(found) == 2
        for a, b in zip(found, seen[name]):
            assert (a - b).abs().max() < 1e-12
    assert (ours["cross"][0][1, :, :, 2:] == 0).all()  # padding of the source
    assert (ours["decoder"][1].triu(1) == 0).all()


def test_one_table_serves_both_languages_and_the_softmax():
    """Its gradient is the sum of what the three places send; vectors are √D times its rows (E66)."""
    model = network(positions="none", layers=1)
    tables = [name for name, p in model.named_parameters() if p.shape == (11, 8)]
    assert tables == ["embedding.weight"]
    read = {}
    model.source_positions.register_forward_hook(lambda m, given, out: read.update(x=out))
    source, lengths, before = pairs()
    logits = model(source, lengths, before)
    assert torch.equal(read["x"], model.embedding.weight[source] * math.sqrt(8))
    grad = torch.autograd.grad(logits.square().sum(), model.embedding.weight)[0]
    assert (grad.abs().sum(1) > 0).all()  # also tokens that were read nowhere: the softmax asks for all


def test_fresh_weights():
    torch.manual_seed(0)
    model = Transformer(replace(OF, vocabulary=500, width=64, positions="learned"))
    assert float(model.embedding.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(model.source_positions.table.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    matrix = model.encoder[0].linear1.weight.detach()
    assert float(matrix.abs().max()) == pytest.approx(math.sqrt(6 / (64 + 256)), rel=0.01)
    assert not model.encoder[0].linear1.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_positions(kind):
    """Each as its formula; [x; p]W = xW₁ + pW₂; what starts later is what stands there in the whole."""
    places, x = Positions(kind, 9, 6), torch.randn(2, 9, 6)
    out = places(x)
    if kind == "sinusoidal":
        expected = x + sinusoids(9, 6, dtype=torch.float64)
    elif kind == "learned":
        expected = x + places.table.weight
    elif kind == "none":
        expected = x
    else:
        weight, beside = places.join.weight, torch.arange(9.0)[:, None] / 9
        beside = places.table.weight if kind == "concatenated" else beside
        expected = x @ weight[:, :6].T + beside @ weight[:, 6:].T + places.join.bias
    assert out.shape == (2, 9, 6)
    assert (out - expected).abs().max() < 1e-13
    assert (places(x[:, 4:7], start=4) - out[:, 4:7]).abs().max() < 1e-13
    if kind in ("sinusoidal", "none"):
        assert places(torch.zeros(1, 300, 6)).shape == (1, 300, 6)
    else:
        with pytest.raises(ValueError, match="position 9 does not exist"):
            places(x[:, :1], start=9)


def test_sinusoids_follow_the_dtype():
    places = Positions("sinusoidal", 9, 6)
    wide = places(torch.zeros(1, 5, 6))
    assert wide.dtype == torch.float64
    assert places(torch.zeros(1, 5, 6, dtype=torch.float32)).dtype == torch.float32
    assert torch.equal(places(torch.zeros(1, 5, 6)), wide)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothed_nats_is_the_equation_and_torchs_loss(smoothing):
    logits, targets = torch.randn(6, 9, requires_grad=True), torch.randint(9, (6,))
    log_p = [row.detach().log_softmax(0) for row in logits]
    terms = [-(1 - smoothing) * p[y] - smoothing * sum(p) / 9 for p, y in zip(log_p, targets.tolist())]
    assert smoothed_nats(logits, targets, smoothing).item() == pytest.approx(float(sum(terms)) / 6, rel=1e-12)
    ours, theirs = (
        smoothed_nats(logits, targets, smoothing),
        nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, targets),
    )
    assert (ours - theirs).abs() < 1e-14
    a, b = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert (a - b).abs().max() < 1e-15
    low = smoothed_nats(logits.detach().bfloat16(), targets, smoothing)
    assert low.dtype == torch.float32


def test_rate_is_the_papers():
    """E66: D^(−½)·min(k^(−½), k·w^(−3/2)); base model: its peak is at step 4000, 0.0007."""
    config = Config(width=512, warmup_steps=4000)
    for k in (1, 10, 3999, 4000, 4001, 100_000):
        assert rate(k - 1, config) == pytest.approx(512**-0.5 * min(k**-0.5, k * 4000**-1.5), rel=1e-12)
    assert max(rate(k, config) for k in range(3990, 4010)) == rate(3999, config) == pytest.approx(7e-4, rel=0.01)
    assert rate(5, replace(config, learning_rate=2.0)) == pytest.approx(2 * rate(5, config))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="width 8 is not divisible by 3 heads"):
        Transformer(replace(OF, heads=3))
    with pytest.raises(UserError, match="sinusoidal positions need an even width"):
        Transformer(replace(OF, width=9, heads=1))
    Transformer(replace(OF, width=9, heads=1, positions="appended"))
    model = network(positions="learned")
    long = torch.full((1, 13), 5)
    for source, before in ((long, long[:, :2]), (long[:, :2], long)):
        with pytest.raises(UserError, match="a sentence of 13 tokens is longer than the 12 learned positions"):
            model(source, torch.tensor([source.shape[1]]), before)
    network()(long, torch.tensor([13]), long)
