"""GPT against Hugging Face's GPT-2 and GPT-1, exact causality, the cache against the full pass, file formats."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from etude.blocks.tokens.decoding import generate, pad_left, stream
from etude.core.errors import UserError
from etude.language.gpt import GPT, Architecture, load_pretrained, next_token_loss, total_nats

SMALL = Architecture(vocabulary=31, context=16, layers=3, heads=4, width=32)


def gpt(seed: int = 0, **changes) -> GPT:
    """A float64 GPT in eval mode whose every parameter is far from its trivial start."""
    torch.manual_seed(seed)
    model = GPT(Architecture(**{**SMALL.__dict__, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def hugging_face(kind: str = "gpt2", **changes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    shape = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
    shape |= {"bos_token_id": 0, "eos_token_id": 0} if kind == "gpt2" else {}
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **changes))
    else:
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**shape, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def store(model, folder, rename=lambda name: name, extra=None) -> None:
    """Write config.json and model.safetensors as the published files have them (no copy of the tied head)."""
    config = {
        key: value for key, value in model.config.to_dict().items() if isinstance(value, str | int | float | bool)
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {rename(k): v.clone().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights | (extra or {}), folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_logits_equal_gpt2(activation, tmp_path):
    theirs = hugging_face(activation_function=activation)
    store(theirs, tmp_path)
    ours, tokens = load_pretrained(tmp_path)
    assert tokens is None
    ids = torch.randint(31, (3, 16))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4  # logits are of size 10 here
        assert (ours.double()(ids) - theirs.double()(ids).logits).abs().max() < 1e-10


def test_logits_equal_gpt2_at_its_own_initialisation(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=64, n_layer=4, n_head=4, n_inner=100, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    theirs.save_pretrained(tmp_path)  # the library's own writer
    ours, _ = load_pretrained(tmp_path)
    ids = torch.randint(97, (2, 64))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
        assert (ours.double()(ids) - theirs.double()(ids).logits).abs().max() < 1e-10
    assert load_pretrained(tmp_path / "model.safetensors")[0].of == ours.of


def test_logits_equal_gpt1(tmp_path):
    """Post-norm, no last layer norm, tables under other names (E75)."""
    theirs = hugging_face("openai-gpt")
    store(theirs, tmp_path)
    ours, _ = load_pretrained(tmp_path)
    assert ours.of.norm_placement == "post"
    ids = torch.randint(31, (3, 16))
    with torch.no_grad():
        assert (ours.double()(ids) - theirs.double()(ids).logits).abs().max() < 1e-10


def test_gradients_equal_gpt2(tmp_path):
    theirs = hugging_face(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    store(theirs, tmp_path)
    ours, theirs = load_pretrained(tmp_path)[0].double(), theirs.double()
    ids = torch.randint(31, (2, 16))
    next_token_loss(ours(ids[:, :-1]), ids[:, 1:]).backward()
    next_token_loss(theirs(ids[:, :-1]).logits, ids[:, 1:]).backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - other[name].grad).abs().max() < 1e-10, name


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_equal_hugging_face_generate(batch, tmp_path):
    theirs = hugging_face()
    store(theirs, tmp_path)
    ours, _ = load_pretrained(tmp_path)
    prompt = torch.randint(1, 31, (batch, 4))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(ours, prompt, 12, greedy=True), expected)


def test_ragged_prompts_equal_hugging_face_generate(tmp_path):
    """Left padding, its mask and its positions: transformers counts positions from the attention mask."""
    theirs = hugging_face()
    store(theirs, tmp_path)
    ours, _ = load_pretrained(tmp_path)
    ids, pads = pad_left([torch.randint(1, 31, (length,)) for length in (2, 5, 1)])
    expected = theirs.generate(
        ids,
        attention_mask=(torch.arange(5) >= pads[:, None]).long(),
        max_new_tokens=11,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(ours, ids, 11, pads=pads, greedy=True), expected)


def test_first_gpt2_files_load(tmp_path):
    """OpenAI's upload: no prefix, causal masks stored as if they were weights."""
    theirs = hugging_face()
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 16, 16).tril() for n in range(3)}
    masks |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(3)}
    store(theirs, tmp_path, lambda name: name.removeprefix("transformer."), masks)
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        assert (load_pretrained(tmp_path)[0].double()(ids) - theirs.double()(ids).logits).abs().max() < 1e-10


def test_sharded_and_half_precision_files_load(tmp_path):
    theirs = hugging_face()
    store(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {k: v.half().clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    ours, _ = load_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        assert (ours(ids) - theirs.half().float()(ids).logits).abs().max() < 1e-4


def change_config(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "needs config.json and model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "needs config.json and model.safetensors"),
        (change_config(model_type="llama"), "type 'llama'"),
        (change_config(n_layer=4), r"missing \['transformer.h.3"),
        (change_config(n_layer=2), r"unknown \['transformer.h.2"),
        (change_config(n_positions=15), r"wpe.weight .* is \(16, 32\), config.json says \(15, 32\)"),
        (change_config(activation_function="swish"), "activation 'swish'"),
        (change_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (change_config(tie_word_embeddings=False), "tie_word_embeddings"),
        (change_config(n_head=None, n_layer="two"), "gives no number for n_layer, n_head"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read .* are they complete"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "are they complete"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json is no tokenizer"),
    ],
)
def test_unfit_files_are_refused_in_one_sentence(damage, message, tmp_path):
    store(hugging_face(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_untied_head_is_refused(tmp_path):
    theirs = hugging_face()
    store(theirs, tmp_path, extra={"lm_head.weight": torch.randn(31, 32)})
    with pytest.raises(UserError, match="output head that differs"):
        load_pretrained(tmp_path)


def test_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    store(hugging_face(), tmp_path)
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(tmp_path))
    assert load_pretrained("someone/their-gpt2")[0].of.layers == 3
    assert asked == ["someone/their-gpt2"]

    def refuse(name, allow_patterns):
        raise OSError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="no folder gpt2, and the Hugging Face hub gave no such model: no connection"):
        load_pretrained("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load_pretrained("gpt2")


# ---------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_later_tokens_leave_earlier_logits_unchanged(norm):
    """Bit for bit: logits before position t do not see token t; from t on they do."""
    model = gpt(norm_placement=norm)
    ids = torch.randint(31, (2, 16))
    with torch.no_grad():
        before = model(ids)
        for t in range(16):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 31
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1, 1, 1), (5, 1, 2, 8), (16,)])
def test_cache_equals_full_pass(cuts, norm):
    model, ids = gpt(norm_placement=norm), torch.randint(31, (2, 16))
    with torch.no_grad():
        full, cache, end = model(ids), model.start(2), 0
        for count in cuts:
            logits = model.advance(ids[:, end : end + count], cache)
            end += count
            assert cache.length == end
            assert (logits - full[:, end - 1]).abs().max() < 1e-12


def test_batch_items_do_not_meet():
    model, ids = gpt(), torch.randint(31, (4, 16))
    with torch.no_grad():
        together = model(ids)
        for b in range(4):
            assert (model(ids[b : b + 1])[0] - together[b]).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padding_is_neither_seen_nor_counted(norm):
    """Rows of different lengths: the logits behind the padding are those of each row alone, cached or not."""
    model, lengths = gpt(norm_placement=norm), (3, 11, 1, 8)
    rows = [torch.randint(31, (length,)) for length in lengths]
    ids, pads = pad_left(rows)
    with torch.no_grad():
        full, cache = model(ids, pads), model.start(4)
        cache.pads, cached = pads, []
        for begin, end in ((0, 9), (9, 10), (10, 11)):  # the first read holds padding only, in two rows
            cached.append(model.advance(ids[:, begin:end], cache))
        filled = model(ids.masked_fill(torch.arange(11) < pads[:, None], 7), pads)
        for b, row in enumerate(rows):
            alone = model(row[None])[0]
            assert (full[b, -len(row) :] - alone).abs().max() < 1e-12
            assert torch.equal(filled[b, -len(row) :], full[b, -len(row) :])  # whatever the padding is
            assert (cached[2][b] - alone[-1]).abs().max() < 1e-12
            if len(row) >= 3:
                assert (cached[0][b] - alone[-3]).abs().max() < 1e-12
    assert full.isfinite().all()


def test_probabilities_of_all_strings_sum_to_one():
    """Σ over all V^T strings of p(string | first token) = 1."""
    model = gpt(vocabulary=3, context=5)
    strings = torch.tensor([(1, *rest) for rest in itertools.product(range(3), repeat=4)])
    with torch.no_grad():
        log_p = model(strings[:, :-1]).log_softmax(-1).gather(2, strings[:, 1:, None]).sum((1, 2))
    assert len(strings) == 81
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_positions_past_the_context_raise():
    model = gpt()
    with pytest.raises(ValueError, match=r"position 16 does not exist: this model has 16 positions \(0 to 15\)"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    cache = model.start(1)
    with torch.no_grad():
        model.advance(torch.zeros(1, 16, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="position 16 does not exist"):
            model.advance(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_generation_goes_on_past_the_context():
    """With keep = context it is the exact sliding window, evaluated from scratch each time."""
    model, ids = gpt(), torch.randint(31, (2, 3))
    out = generate(model, ids, 30, greedy=True, keep=16)
    expected = ids
    with torch.no_grad():
        for _ in range(30):
            expected = torch.cat([expected, model(expected[:, -16:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, expected)
    assert generate(model, ids, 30, greedy=True).shape == (2, 33)


def test_generation_draws_what_the_full_pass_predicts():
    model, ids = gpt(), torch.randint(31, (5, 3))
    tokens = stream(model, ids, 10, temperature=0.7, top_k=9, top_p=0.8, generator=torch.Generator().manual_seed(3))
    seen, again = ids, torch.Generator().manual_seed(3)
    from etude.blocks.tokens.decoding import pick

    with torch.no_grad():
        for token in tokens:
            expected = pick(model(seen)[:, -1], temperature=0.7, top_k=9, top_p=0.8, generator=again)
            assert torch.equal(token, expected)
            seen = torch.cat([seen, token[:, None]], dim=1)
    assert not model.training


def test_initialisation():
    """GPT-2: normal(0, 0.02), residual projections 1/√(2N) smaller, biases 0, layer norms the identity."""
    torch.manual_seed(0)
    model = GPT(Architecture(vocabulary=500, context=64, layers=8, heads=2, width=128))
    for name, parameter in model.state_dict().items():
        if name.endswith("c_proj.weight"):
            assert float(parameter.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.03), name
        elif parameter.ndim == 2:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.03), name
        else:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_an_untrained_model_is_near_uniform_and_random_tokens_cannot_be_beaten():
    """On tokens without structure the loss is at least log V (up to the noise of 8,000 draws)."""
    torch.manual_seed(0)
    ids = torch.randint(31, (500, 17))
    fresh = GPT(SMALL).eval()
    with torch.no_grad():
        assert float(next_token_loss(fresh(ids[:, :-1]), ids[:, 1:])) == pytest.approx(math.log(31), abs=0.03)
        assert float(next_token_loss(gpt()(ids[:, :-1]), ids[:, 1:])) > math.log(31)


def test_loss_is_of_the_following_token():
    logits = torch.full((1, 3, 5), -20.0)
    ids = torch.tensor([[4, 2, 0, 1]])
    logits.scatter_(2, ids[:, 1:, None], 20.0)
    assert float(next_token_loss(logits, ids[:, 1:])) < 1e-6
    assert float(next_token_loss(logits, ids[:, :-1])) > 20


@pytest.mark.parametrize("count", [2, 9, 16, 17, 18, 100, 161])
def test_validation_predicts_every_token_exactly_once(count):
    """Reference: a plain loop over windows; the number of terms is count − 1 whatever the remainder."""
    model, ids = gpt(), torch.randint(31, (count,))
    expected, terms = 0.0, 0
    with torch.no_grad():
        for begin in range(0, count - 1, 16):
            x, y = ids[begin : begin + 16], ids[begin + 1 : begin + 17]
            x = x[: len(y)]
            expected += float(F.cross_entropy(model(x[None])[0], y, reduction="sum"))
            terms += len(y)
    assert terms == count - 1
    assert total_nats(model, ids, batch=3) == pytest.approx(expected, rel=1e-6)


def test_validation_switches_dropout_off_and_back_on():
    model, ids = gpt(dropout=0.5).train(), torch.randint(31, (50,))
    assert total_nats(model, ids) == total_nats(model, ids)
    assert model.training


def test_width_must_divide():
    with pytest.raises(UserError, match="width 32 is not divisible by 5 heads"):
        GPT(Architecture(**{**SMALL.__dict__, "heads": 5}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_decoding_equals_the_full_pass(batch, dtype, tolerance):
    """One token a sequence uses the cache's packed weights, the full pass (48 rows) the other kernel."""
    model, ids = gpt().to(dtype), torch.randint(31, (batch, 16))
    with torch.no_grad():
        full, cache = model(ids).float(), model.start(batch)
        for _ in range(2):  # an emptied cache serves again
            cache.length = 0
            steps = [model.advance(ids[:, t : t + 1], cache).float() for t in range(16)]
            scale = full.abs().max()
            assert (torch.stack(steps, 1) - full).abs().max() < tolerance * scale


def test_the_cached_pass_keeps_no_graph():
    model = gpt()
    logits = model.advance(torch.zeros(2, 3, dtype=torch.int64), model.start(2))
    assert not logits.requires_grad
