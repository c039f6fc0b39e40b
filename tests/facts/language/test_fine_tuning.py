"""Heads against Hugging Face's, spans by brute force, encodings, readers of official files, SQuAD's rules."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from etude.core.errors import UserError
from etude.data import texts
from etude.language.fine_tuning import Config, rate
from etude.language.parts.bert import load_pretrained, read_published
from etude.language.parts.heads import Model, answers, best_span, collate, label_of, loss_of, majority, score
from etude.language.parts.tasks import Item, answer_f1, encode, exact_match, read_task
from etude.language.parts.wordpiece import SPECIALS, WordPiece

TOKENS = WordPiece([*SPECIALS, *"abcdefghij", *("##" + c for c in "abcdefghij"), "."])


def hugging_face(kind: str, folder, labels: int = 3):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=31, max_position_embeddings=16, num_hidden_layers=3, num_attention_heads=4, hidden_size=32,
        intermediate_size=48, num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder)
    return model.double()


def ours(task, classes, folder, **settings) -> Model:
    of, weights, _ = read_published(folder)
    model = Model(of, task, classes, **settings)
    assert load_pretrained(model, weights, folder) == (
        [] if not settings else [n for n in model.state_dict() if n not in weights]
    )
    return model.double().eval()


def batch():
    ids, types = torch.randint(5, 31, (3, 16)), (torch.arange(16) > 6).long().expand(3, 16)
    mask = torch.arange(16) < torch.tensor([16, 5, 11])[:, None]
    return ids, types, mask


# ---------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("sentence", "BertForSequenceClassification"),
        ("tags", "BertForTokenClassification"),
        ("span", "BertForQuestionAnswering"),
    ],
)
def test_logits_and_loss_equal_hugging_face(task, kind, tmp_path):
    theirs = hugging_face(kind, tmp_path, 2 if task == "span" else 3)
    model = ours(task, 3, tmp_path)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    ids, types, mask = batch()
    asked = {"token_type_ids": types, "attention_mask": mask.long()}
    logits = model(ids, types, mask)
    if task == "sentence":
        labels = torch.tensor([0, 2, 1])
        expected = theirs(ids, **asked, labels=labels)
        assert (logits - expected.logits).abs().max() < 1e-10
    elif task == "tags":
        labels = torch.randint(3, (3, 16)).masked_fill(~mask | (torch.arange(16) % 3 > 0), -100)
        expected = theirs(ids, **asked, labels=labels)
        assert (logits - expected.logits)[mask].abs().max() < 1e-10
    else:
        labels = torch.tensor([[1, 3], [0, 0], [4, 9]])
        theirs_logits = theirs(ids, **asked)
        for k, name in enumerate(("start_logits", "end_logits")):
            assert (logits[..., k] - theirs_logits[name])[mask].abs().max() < 1e-10
        rows = [theirs(i[None, : int(m.sum())], token_type_ids=t[None, : int(m.sum())], start_positions=p[:1], end_positions=p[1:])
                for i, t, m, p in zip(ids, types, mask, labels)]  # fmt: skip
        loss = sum(row.loss for row in rows) / 3  # each alone: Hugging Face lets padding compete
        assert float(loss_of(logits, labels, mask, task).detach()) == pytest.approx(float(loss.detach()), abs=1e-10)
        return
    assert float(loss_of(logits, labels, mask, task).detach()) == pytest.approx(
        float(expected.loss.detach()), abs=1e-10
    )


@pytest.mark.parametrize("features", ["last", "second_to_last", "sum_last_four", "concatenate_last_four", "mixture"])
def test_features_are_read_from_the_layers_of_a_frozen_encoder(features, tmp_path):
    """hidden_states of Hugging Face, and no gradient in the encoder; s = 0 gives γ times the mean (E70's form)."""
    theirs = hugging_face("BertModel", tmp_path)
    model = ours("tags", 3, tmp_path, features=features, dropout=0.0)
    ids, types, mask = batch()
    states = theirs(ids, token_type_ids=types, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    expected = {
        "last": states[3],
        "second_to_last": states[2],
        "sum_last_four": sum(states),
        "concatenate_last_four": torch.cat(states, -1),
        "mixture": sum(states) / 4,
    }[features]
    found = model.read(model.bert.states(ids, types, mask))
    assert (found - expected)[mask].abs().max() < 1e-10
    model.train()(ids, types, mask).sum().backward()
    assert all(p.grad is None for p in model.bert.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("bert."))


def test_a_frozen_encoder_drops_nothing():
    from etude.language.parts.bert import Architecture

    of = Architecture(31, 16, 2, 4, 32, 48, dropout=0.5, attention_dropout=0.5)
    ids, types, mask = batch()
    frozen = Model(of, "sentence", 3, "last", 0.0).train()
    assert torch.equal(frozen(ids, types, mask), frozen(ids, types, mask))
    assert frozen.bert.training
    assert not torch.equal(*(Model(of, "sentence", 3).train()(ids, types, mask) for _ in range(2)))


# ------------------------------------------------------------------------------------------------------------- spans


def test_best_span_equals_brute_force():
    for longest, size in itertools.product((1, 2, 30), (1, 2, 7)):
        start, end = torch.randn(size), torch.randn(size)
        low, high, total = max(
            ((i, j, float(start[i] + end[j])) for i in range(size) for j in range(i, min(size, i + longest))),
            key=lambda found: found[2],
        )
        assert best_span(start, end, longest) == (low, high, pytest.approx(total))


def test_the_rules_of_squad():
    """The examples of the official script's documentation, by hand."""
    assert exact_match("The Denver Broncos!", ["denver broncos"]) == 1
    assert exact_match("Broncos", ["denver broncos", "Carolina"]) == 0
    assert answer_f1("the Broncos", ["denver broncos"]) == pytest.approx(2 / 3)
    assert answer_f1("a b c c", ["b c d", "c"]) == pytest.approx(
        2 * (2 / 3) * (2 / 3) / (4 / 3)
    )  # without the article a
    assert answer_f1("x", ["y"]) == 0
    assert answer_f1("c", ["b c d", "c"]) == exact_match("c", ["b c d", "c"]) == 1  # the best of what people answered
    assert answer_f1("24–10", ["24–10"]) == 1


class Pointing(torch.nn.Module):
    """A model whose scores are those of a table by token."""

    def __init__(self, table, task="span"):
        super().__init__()
        self.table, self.task = torch.nn.Parameter(table, requires_grad=False), task

    def forward(self, ids, types, mask):
        return self.table[ids]


@pytest.mark.parametrize("word", ["b", "j", "hh"])
def test_answers_at_the_edges_and_in_later_windows(word):
    """The answer is the first, the last or a middle word of a passage that takes several windows."""
    passage = ("b", "c", "d.", "ee", "f", "g", "hh", "i", "j")
    table = torch.zeros(TOKENS.size, 2)
    table[TOKENS.pieces(word)[0], 0] = 5.0
    table[TOKENS.pieces(word)[-1], 1] += 5.0
    item = Item(("a", "aa"), passage)
    assert len(encode(item, TOKENS, 12, "span", 2)) > 1
    (found,) = answers(Pointing(table), [item], TOKENS, 12)
    assert found == (passage.index(word),) * 2


# --------------------------------------------------------------------------------------------------------- encodings


def test_encoding_and_labels_by_hand():
    """E74: a tag stands at the first piece of its word; start at a first piece, end at a last one."""
    item = Item(("ab", "c", "d."), label=2, tags=(1, 2, 0))
    (window,) = encode(item, TOKENS, 16, "tags")
    assert [TOKENS.tokens[i] for i in window.ids.tolist()] == ["[CLS]", "a", "##b", "c", "d", ".", "[SEP]"]
    assert window.places.tolist() == [1, 3, 4]
    assert window.ends.tolist() == [2, 3, 5]
    assert label_of(item, window, "tags") == [-100, 1, -100, 2, 0, -100, -100]
    assert label_of(item, window, "sentence") == [2]
    pair = Item(("ab", "c"), ("d", "e", "ff"), span=(1, 2))
    (window,) = encode(pair, TOKENS, 16, "pair")
    assert window.types.tolist() == [0] * 5 + [1] * 5
    (window,) = encode(pair, TOKENS, 8, "pair")  # five pieces fit: the longer text is cut, whole words
    assert [TOKENS.tokens[i] for i in window.ids.tolist()] == ["[CLS]", "a", "##b", "c", "[SEP]", "d", "e", "[SEP]"]
    windows = encode(pair, TOKENS, 16, "span", 1)
    assert len(windows) == 1
    assert label_of(pair, windows[0], "span") == [6, 8]
    windows = encode(Item(("a",), ("b", "c", "d", "e", "f", "g"), span=(4, 4)), TOKENS, 7, "span", 2)
    assert [w.words.tolist() for w in windows] == [[0, 1, 2], [2, 3, 4], [4, 5]]
    assert [label_of(Item(("a",), span=(4, 4)), w, "span") for w in windows] == [[0, 0], [5, 5], [3, 3]]
    batch = collate(windows[:1] + [window], [[1, 2], [0, 0]], "span", TOKENS.pad)
    assert batch.ids.shape == batch.mask.shape == (2, 8)
    assert batch.mask.sum(1).tolist() == [7, 8]
    batch = collate([window], [[3]], "sentence", 0)
    assert batch.labels.tolist() == [3]


def test_numbers_of_answers_by_hand():
    table = torch.zeros(TOKENS.size, 3)
    table[TOKENS.number["a"], 1], table[TOKENS.number["b"], 2], table[:, 0] = 9.0, 9.0, 1.0
    model = Pointing(table, "tags")
    model.classifier = torch.nn.Linear(1, 3)
    items = [Item(("a", "b", "c"), tags=(1, 1, -100)), Item(("c", "a"), tags=(0, 0))]
    assert answers(model, items, TOKENS, 16) == [[1, 2, 0], [0, 1]]
    accuracy, f1, (truth, said) = score(model, items, TOKENS, 16)
    assert (truth, said) == ([1, 1, 0, 0], [1, 2, 0, 1])
    assert accuracy == 0.5
    assert f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert answers(model, [Item(tuple("a" * 20), tags=(1,) * 20)], TOKENS, 8) == [[1] * 6 + [0] * 14]
    train = [Item(("a", "b"), tags=(1, 2)), Item(("a",), tags=(1,))]
    assert majority(train, items, "tags") == pytest.approx(1 / 4)
    assert majority([Item((), label=1)] * 2 + [Item(())], [Item((), label=1), Item(())], "sentence") == 0.5
    assert majority([], [Item((), ("The", "x"), answers=("the!",)), Item((), ("y",), answers=("z",))], "span") == 0.5


def test_learning_rate():
    config = Config(steps=10, warmup_steps=4, learning_rate=1.0)
    assert [rate(step, config) for step in (0, 3, 4, 5, 9)] == pytest.approx([0.25, 1, 1, 5 / 6, 1 / 6])


# ----------------------------------------------------------------------------------------------------------- readers


def test_sst2_files(tmp_path):
    folder = tmp_path / "glue"
    folder.mkdir()
    rows = [f'a "quoted word {i}\t{i % 2}' for i in range(41)]
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\nfine .\t1\n")
    task = read_task(str(folder), "sentence")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [38, 3, 1]
    assert [item.first[-1] for item in task.validation] == ["0", "20", "40"]
    assert task.test == [Item(("fine", "."), label=1)]
    assert task.train[0].first == ("a", '"quoted', "word", "1")
    assert len(read_task(str(folder), "sentence", 5).train) == 5
    (folder / "dev.tsv").write_text("sentence\tlabel\nfine\n")
    with pytest.raises(UserError, match="no sentence and label"):
        read_task(str(folder), "sentence")
    (folder / "dev.tsv").write_text("x\ty\n")
    with pytest.raises(UserError, match="does not begin with the line"):
        read_task(str(folder), "sentence")
    with pytest.raises(UserError, match="no reader knows"):
        read_task(str(folder), "pair")
    with pytest.raises(UserError, match="is not there"):
        read_task(str(folder), "span")


def test_conllu_files(tmp_path):
    row = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_"
    text = "\n".join(["# text", row.format("1-2", "don't", "_"), row.format(1, "do", "AUX"), row.format(2, "n't", "PART"),
                      row.format("2.1", "x", "X"), "", row.format(1, "Go", "VERB"), ""])  # fmt: skip
    for split in ("train", "dev"):
        with gzip.open(tmp_path / f"en-ud-{split}.conllu.gz", "wt") as file:
            file.write(text)
    (tmp_path / "en-ud-test.conllu").write_text(text + "\n" + row.format(1, "new", "SYM") + "\n")
    task = read_task(str(tmp_path), "tags")
    assert task.classes == ("AUX", "PART", "VERB")
    assert task.train == [Item(("do", "n't"), tags=(0, 1)), Item(("Go",), tags=(2,))]
    assert task.test[-1] == Item(("new",), tags=(-100,))
    (tmp_path / "en-ud-test.conllu").write_text("1\tx\n")
    with pytest.raises(UserError, match="a line of 2 columns"):
        read_task(str(tmp_path), "tags")


def test_squad_files(tmp_path):
    def article(i):
        answer = {"answer_start": 8, "text": "24–10"}
        asked = [{"question": f"What {i} ?", "answers": [answer, {"answer_start": 4, "text": "was 24–10"}]}]
        return {"title": str(i), "paragraphs": [{"context": "It  was (24–10), they said.", "qas": asked}]}

    whole = {"data": [article(i) for i in range(10)]}
    whole["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 9
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(whole))
    task = read_task(str(tmp_path), "span")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [7, 1, 2]
    assert task.train[0] == Item(
        ("What", "0", "?"), ("It", "was", "(24–10),", "they", "said."), span=(2, 2), answers=("24–10", "was 24–10")
    )
    assert [item.first[1] for item in task.test] == ["8", "9"]
    (tmp_path / "dev-v1.1.json").write_text('{"data": [{}]}')
    with pytest.raises(UserError, match=r"no file of SQuAD 1.1 \(KeyError"):
        read_task(str(tmp_path), "span")


def test_tasks_that_a_text_sets(tmp_path):
    lines = ["one two, three four five.", "who goes there?", "a b c d e f;", "-- ! no", "last line here"] * 40
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "x").mkdir()
    task = read_task(str(tmp_path / "text.txt"), "sentence")
    assert task.train[0] == Item(("one", "two", "three", "four", "five"), label=0)
    assert task.classes[task.train[1].label] == "?"
    task = read_task(str(tmp_path / "text.txt"), "tags")
    assert task.train[0].tags == (0, 2, 0, 0, 1)
    task = read_task(str(tmp_path / "text.txt"), "span")
    assert task.train[0].first == ("a", "b", "c")
    low, high = task.train[0].span
    assert task.train[0].second[low : high + 1] == ("d", "e", "f;")
    assert task.train[0].answers == ("d e f;",)
    task = read_task("house_text", "pair")
    stems = [tuple(word.rstrip(".,;:?!") for word in line.split()) for line in texts.house().split("\n")]
    stems = [line for line in stems if line]
    follows = set(itertools.pairwise(stems))
    assert {item.label for item in task.test} == {0, 1}
    next_ones = [(item.first, item.second) in follows for item in task.train[:-1] if item.label == 0]  # the last is cut
    assert all(next_ones)
    assert len(next_ones) > 100
    assert (
        sum((item.first, item.second) in follows for item in task.train if item.label == 1) < 10
    )  # lines that come twice


def test_losses_of_spans_ignore_padding():
    logits = torch.randn(2, 5, 2)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    labels = torch.tensor([[0, 4], [1, 2]])
    expected = [F.cross_entropy(logits[b, : 5 - 2 * b, k][None], labels[b : b + 1, k]) for b in (0, 1) for k in (0, 1)]
    assert float(loss_of(logits, labels, mask, "span")) == pytest.approx(float(sum(expected)) / 4)
