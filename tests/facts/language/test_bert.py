"""BERT against Hugging Face's, padding invariance, how tokens are chosen and hidden, pairs of sentences, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import stats

from etude.core.errors import UserError
from etude.language.bert import Config, Sentences, examples, fill, hide, rate
from etude.language.parts.bert import Architecture, Bert, PreTraining, load_pretrained, read_published
from etude.language.parts.wordpiece import SPECIALS, WordPiece

SMALL = Architecture(31, 16, 3, 4, 32, 48)
LETTERS = WordPiece([*SPECIALS, *"abcdefghijklmnopqrstuvwxyz"])


def hugging_face(kind: str = "BertForPreTraining", **changes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    shape = {"vocab_size": 31, "max_position_embeddings": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    model = getattr(transformers, kind)(transformers.BertConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def loaded(theirs, folder, of=PreTraining):
    theirs.save_pretrained(folder)
    architecture, weights, _ = read_published(folder)
    ours = of(architecture)
    load_pretrained(ours, weights, folder)
    return ours.eval(), architecture


def batch():
    ids, types = torch.randint(5, 31, (3, 16)), (torch.arange(16) > 6).long().expand(3, 16)
    mask = torch.arange(16) < torch.tensor([16, 5, 11])[:, None]
    return ids, types, mask


# ---------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_logits_loss_and_gradients_equal_hugging_face(activation, tmp_path):
    theirs = hugging_face(hidden_act=activation)
    ours, _ = loaded(theirs, tmp_path)
    own, other = ours.state_dict(), theirs.state_dict()
    assert other.keys() - own.keys() == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
    assert own.keys() <= other.keys()
    ours, theirs = ours.double(), theirs.double()
    ids, types, mask = batch()
    words, follows = ours(ids, types, mask)
    expected = theirs(ids, token_type_ids=types, attention_mask=mask.long())
    assert (words - expected.prediction_logits)[mask].abs().max() < 1e-10
    assert (follows - expected.seq_relationship_logits).abs().max() < 1e-10
    places = torch.tensor([1, 4, 18, 33])
    labels = torch.full((48,), -100)
    labels[places] = ids.flatten()[places]
    asked = torch.tensor([0, 1, 1])
    expected = theirs(
        ids, token_type_ids=types, attention_mask=mask.long(), labels=labels.view(3, 16), next_sentence_label=asked
    )
    words, follows = ours(ids, types, mask, places)
    loss = F.cross_entropy(words, ids.flatten()[places]) + F.cross_entropy(follows, asked)
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), abs=1e-10)
    loss.backward()
    expected.loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        theirs_grad = theirs.get_parameter(name).grad
        if theirs_grad is None:  # the bias that is tied to the decoder's
            theirs_grad = theirs.get_parameter("cls.predictions.decoder.bias").grad
        assert (parameter.grad - theirs_grad).abs().max() < 1e-9, name


def test_hidden_states_of_all_layers_equal_hugging_face(tmp_path):
    """N + 1 tensors; in float32 too."""
    theirs = hugging_face("BertModel")
    ours, _ = loaded(theirs, tmp_path, Body)
    ids, types, mask = batch()
    with torch.no_grad():
        found = ours.bert.states(ids, types, mask)
        expected = theirs(ids, token_type_ids=types, attention_mask=mask.long(), output_hidden_states=True)
        assert len(found) == len(expected.hidden_states) == 4
        for a, b in zip(found, expected.hidden_states):
            assert (a - b)[mask].abs().max() < 1e-5 * float(b.abs().max())
            assert (a[~mask] == 0).all()
        assert torch.equal(ours.bert(ids, types, mask), found[-1])
        pooled = ours.bert.pooled(found[-1])
        assert (pooled - expected.pooler_output).abs().max() < 1e-5


class Body(torch.nn.Module):
    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.bert = Bert(of)


def test_padding_changes_nothing():
    """Each text alone equals the text in a padded batch, whatever stands in the padding; train mode without dropout, too."""
    torch.manual_seed(0)
    model = PreTraining(Architecture(31, 16, 2, 4, 32, 48, dropout=0.0, attention_dropout=0.0)).double()
    ids, types, mask = batch()
    for _ in range(2):
        words, follows = model(ids, types, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone, asked = model(ids[row : row + 1, :length], types[row : row + 1, :length])
            assert (words[row, :length] - alone[0]).abs().max() < 1e-12
            assert (follows[row] - asked[0]).abs().max() < 1e-12
        ids = ids.where(mask, 7)
        model.eval()


def test_every_position_sees_both_ways():
    model = Bert(SMALL).eval()
    x = torch.randint(5, 31, (1, 8))
    table = model.embeddings.word_embeddings.weight
    for place in (0, 3, 7):
        grad = torch.autograd.grad(model(x)[0, place].square().sum(), table)[0]
        assert (grad[x[0]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("form", ["plain", "no prefix", "old names", "one file"])
def test_published_spellings_load(form, tmp_path):
    theirs = hugging_face("BertModel" if form == "no prefix" else "BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    if form == "old names":
        names = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v.clone()
            for k, v in theirs.state_dict().items()
        }
        save_file(names, tmp_path / "model.safetensors")
    source = tmp_path / "model.safetensors" if form == "one file" else tmp_path
    architecture, weights, tokens = read_published(source)
    assert tokens is None
    ours = PreTraining(architecture)
    missing = load_pretrained(ours, weights, source)
    assert bool(missing) == (form == "no prefix")
    ids, types, mask = batch()
    body = theirs if form == "no prefix" else theirs.bert
    with torch.no_grad():
        expected = body(ids, token_type_ids=types, attention_mask=mask.long()).last_hidden_state
        assert (ours.eval().bert(ids, types, mask) - expected)[mask].abs().max() < 1e-4


def test_what_is_no_bert_is_refused(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**settings) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | settings))
        with pytest.raises(UserError) as caught:
            attempt()
        return str(caught.value)

    def attempt() -> None:
        architecture, weights, _ = read_published(tmp_path)
        load_pretrained(PreTraining(architecture), weights, tmp_path)

    assert "a model of type 'roberta'" in changed(model_type="roberta")
    assert "gives no number for hidden_size" in changed(hidden_size=None)
    assert "uses the activation 'swish'" in changed(hidden_act="swish")
    assert "has relative positions" in changed(position_embedding_type="relative")
    assert "is (31, 32), and (30, 32) is wanted" in changed(vocab_size=30)
    assert "(16 of the encoder's weights are missing)" in changed(num_hidden_layers=4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path)
    with pytest.raises(UserError, match="no BERT weights in"):
        read_published(tmp_path.parent)
    with pytest.raises(UserError, match="there is no folder or file"):
        read_published(tmp_path / "none")


def test_width_must_divide():
    with pytest.raises(UserError, match="width 30 is not divisible by 4 heads"):
        Bert(Architecture(31, 16, 1, 4, 30, 48))


# -------------------------------------------------------------------------------------------------------- hidden tokens


def test_chosen_tokens_are_hidden_as_the_paper_says():
    """E71, E73: 15 % chosen; 80/10/10 by χ²; uniform over places; random tokens over all but the special ones; no pad chosen."""
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 31, (4000, 24))
    ids[:, 0], ids[:, 21], ids[:, 22:] = LETTERS.cls, LETTERS.sep, LETTERS.pad
    hidden, places = hide(ids, LETTERS, 0.15, stream)
    chosen = torch.zeros(ids.numel(), dtype=torch.bool)
    chosen[places] = True
    chosen = chosen.view_as(ids)
    assert (chosen.sum(1) == 3).all()  # 15 % of 20
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert not chosen[:, [0, 21, 22, 23]].any()
    assert stats.chisquare(chosen.sum(0)[1:21].numpy()).pvalue > 0.001
    before, after = ids[chosen], hidden[chosen]
    masked, same = after == LETTERS.mask, after == before
    total = len(after)
    found = [int(masked.sum()), int((~masked & ~same).sum()), int(same.sum())]
    expected = np.array([0.8, 0.1 * 25 / 26, 0.1 + 0.1 / 26]) * total  # a random token may be the token itself
    assert stats.chisquare(found, expected).pvalue > 0.001
    random = after[~masked & ~same]
    assert int(random.min()) >= 5
    assert stats.chisquare(np.bincount(random.numpy() - 5, minlength=26)).pvalue > 0.001
    again, same_places = hide(ids, LETTERS, 0.15, torch.Generator().manual_seed(0))
    assert torch.equal(again, hidden)
    assert torch.equal(same_places, places)


def test_at_least_one_is_chosen_and_none_where_there_is_none():
    ids = torch.tensor([[LETTERS.cls, 7, LETTERS.sep, 0], [LETTERS.cls, LETTERS.sep, 0, 0]])
    _, places = hide(ids, LETTERS, 0.15, torch.Generator())
    assert places.tolist() == [1]
    _, places = hide(torch.full((1, 10), 9), LETTERS, 1.0, torch.Generator())
    assert places.tolist() == list(range(10))


LINES = ["abc", "de", "f", "ghijklmnop", "qr", "stu"]


def spelled(row, mask) -> str:
    names = [LETTERS.tokens[i] for i, there in zip(row.tolist(), mask.tolist()) if there]
    return "".join({"[CLS]": "<", "[SEP]": "|"}.get(name, name) for name in names)


@pytest.mark.parametrize("context", [8, 12, 40])
def test_pairs_of_sentences(context):
    """E72: half of the Bs go on where A ends, the others begin at a sentence that is not the next; in the order A, B always."""
    text = Sentences.of("\n".join(" ".join(line) for line in LINES) + "\n\n", LETTERS)
    assert text.starts.tolist() == [0, 3, 5, 6, 16, 18, 21]
    whole, begins = "".join(LINES), text.starts.tolist()
    found = examples(text, LETTERS, 2000, context, torch.Generator().manual_seed(1))
    assert found.ids.shape == (2000, context)
    assert stats.binomtest(int(found.follows.sum()), 2000, 0.5).pvalue > 0.001
    room = context - 3
    firsts, others = set(), set()
    for row, types, mask, follows in zip(*found):
        text_ = spelled(row, mask)
        a, b = text_[1:-1].split("|")
        assert text_[0] == "<"
        assert text_[-1] == "|"
        assert len(text_) <= context
        assert types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (context - len(text_))
        assert (row[~mask] == LETTERS.pad).all()
        start = whole.index(a)
        firsts.add(start)
        assert start in begins[:-2]  # one that has a sentence behind it
        fit = [end for end in begins[:-1] if start < end <= start + max(1, room // 2)]
        end = max(fit) if fit else start + max(1, room // 2)
        assert a == whole[start:end]
        after = min(i for i in begins[:-1] if i >= end)
        begin_b = whole.index(b)
        assert b
        assert len(a) + len(b) <= room
        if int(follows) == 0:
            assert begin_b == after
        else:
            assert begin_b in begins[:-1]
            assert begin_b != after
            others.add(begin_b)
    assert firsts == set(begins[:-2])
    assert others >= set(begins[:-2])


def test_learning_rate():
    config = Config(steps=10, warmup_steps=4, learning_rate=1.0)
    assert [rate(step, config) for step in (0, 3, 4, 5, 9)] == pytest.approx([0.25, 1, 1, 5 / 6, 1 / 6])
    assert rate(0, Config(steps=10, warmup_steps=0, learning_rate=1.0)) == 1


def test_fillings_are_the_networks_own():
    torch.manual_seed(0)
    model = PreTraining(SMALL).eval()
    (first, order), (second, _) = fill(model, LETTERS, LETTERS.encode("a b [MASK] d [MASK]"))
    ids = torch.tensor([[LETTERS.cls, 5, 6, LETTERS.mask, 8, LETTERS.mask, LETTERS.sep]])
    with torch.no_grad():
        logits = model(ids)[0][0]
    logits[:, :5] = -torch.inf
    torch.testing.assert_close(first, logits[3].log_softmax(0).sort(descending=True).values)
    torch.testing.assert_close(second, logits[5].log_softmax(0).sort(descending=True).values)
    assert not set(order[:26].tolist()) & set(range(5))
    with pytest.raises(UserError, match="nothing to fill in"):
        fill(model, LETTERS, LETTERS.encode("a b"))
    with pytest.raises(UserError, match="18 tokens long, and the network has 16"):
        fill(model, LETTERS, LETTERS.encode("[MASK] " * 16))
