"""The tagger: torch's bidirectional LSTM on packed input, what padding and the two directions may not see, its files and numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import etude
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.data import tagged
from etude.data.batches import Stream
from etude.data.tagged import Sentence
from etude.sequence.parts.baselines import commonest_tags, linear_tags
from etude.sequence.parts.tagging import Lexicon, Tagger, answers, collate, share
from etude.sequence.tagger import Config, build

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SMALL = {"width": 5, "embedding": 4, "spelling": 3, "batch": 3, "steps": 5, "clip_norm": 0.5, "learning_rate": 0.02}
SMALL |= {"evaluate_every": 3, "dropout": 0.0}
ROWS = [
    ("the cat sleeps", "DET NOUN VERB"), ("dogs bark", "NOUN VERB"), ("a very old dog barks loudly", "DET ADV ADJ NOUN VERB ADV"),
    ("they sleep", "PRON VERB"), ("the old cat walks", "DET ADJ NOUN VERB"), ("a dog", "DET NOUN"),
    ("walk", "VERB"), ("the cats walk here", "DET NOUN VERB ADV"), ("a bird sings", "DET NOUN VERB"),
    ("the zebra sings oddly !", "DET NOUN VERB ADV PUNCT"),
]  # fmt: skip


def write(folder, rows=ROWS, times=2):
    """A CoNLL-U file of these rows, over and over: of each ten one validates and one is the test."""
    folder.mkdir(exist_ok=True)
    lines = []
    for words, tags in rows * times:
        lines += [
            f"{i}\t{w}\t_\t{t}\t{t[0]}\t_\t_\tr{t}\t_\t_"
            for i, (w, t) in enumerate(zip(words.split(), tags.split()), 1)
        ]
        lines.append("")
    (folder / "own.conllu").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "own.conllu")


def run(folder, seed=3, **settings):
    return etude.run(
        "sequence/tagger", out=folder / "run", seed=seed, quiet=True, threads=1,
        **{"data": write(folder), **SMALL, **settings},
    )  # fmt: skip


class Plain(nn.Module):
    """The same network from torch's modules, each sentence by itself: no padding anywhere."""

    def __init__(self, of: Tagger, cell="lstm", layers=1, both=True, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(of.embedding.weight.detach().clone(), freeze=False)
        x = of.embedding.embedding_dim
        if hasattr(of, "letters"):
            self.letters = nn.Embedding.from_pretrained(of.letters.weight.detach().clone(), freeze=False)
            size = of.letters.embedding_dim
            self.spelling, x = nn.LSTM(size, size, batch_first=True, bidirectional=True), x + 2 * size
        chance = dropout if layers > 1 else 0.0
        self.recurrent = KINDS[cell](
            x, of.recurrent.width, layers, batch_first=True, bidirectional=both, dropout=chance
        )
        self.readout, self.chance = nn.Linear(of.recurrent.width * (1 + both), of.readout.out_features), dropout
        self.to(of.readout.weight.dtype).load_state_dict(of.state_dict())

    def vector(self, word, lexicon, number=None):
        known = dict(zip(lexicon.words, itertools.count(1)))
        x = self.embedding.weight[known.get(word, 0) if number is None else number]
        if hasattr(self, "letters"):
            ids = torch.tensor([[1 + lexicon.letters.index(a) if a in lexicon.letters else 0 for a in word[-20:]]])
            out, _ = self.spelling(self.letters(ids))
            size = out.shape[-1] // 2
            x = torch.cat([x, out[0, -1, :size], out[0, 0, size:]])
        return x

    def forward(self, sentences, lexicon, numbers=None):
        """Logits of all words, one sentence behind the other."""
        given = [
            torch.stack(
                [
                    self.vector(w, lexicon, None if numbers is None else int(numbers[i, t]))
                    for t, w in enumerate(s.words)
                ]
            )
            for i, s in enumerate(sentences)
        ]
        x = nn.utils.rnn.pad_sequence(given, batch_first=True)
        lengths = torch.tensor([len(s.words) for s in sentences])
        x = F.dropout(x, self.chance, self.training)
        packed, _ = self.recurrent(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        h = F.dropout(pad_packed_sequence(packed, batch_first=True)[0], self.chance, self.training)
        return torch.cat([self.readout(row[:n]) for row, n in zip(h, lengths)])


def network(**settings):
    torch.manual_seed(0)
    data = tagged.numbered([[list(zip(w.split(), t.split())) for w, t in ROWS]] * 3, "", "")
    lexicon = Lexicon.of(data.train)
    config = Config(**{**SMALL, **settings})
    model = build(config, Spec(classes=data.classes, extra={"lexicon": lexicon.state()}))["model"].double()
    return model, data, lexicon


@pytest.mark.parametrize(
    ("cell", "layers", "both", "spelling"),
    [("lstm", 1, True, 3), ("lstm", 2, True, 0), ("gru", 2, False, 3), ("rnn", 2, True, 2)],
)
def test_it_equals_torch_on_packed_sentences(cell, layers, both, spelling):
    """Logits and gradients; the words are spelled one by one there, the sentences packed as torch packs them."""
    model, data, lexicon = network(cell=cell, layers=layers, bidirectional=both, spelling=spelling)
    plain = Plain(model, cell, layers, both)
    batch = collate(data.train, lexicon)
    tags = batch.tags[batch.tags >= 0]
    inside = torch.arange(batch.words.shape[1]) < batch.lengths[:, None]
    ours, theirs = model(batch)[inside], plain(data.train, lexicon)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    found = [
        torch.autograd.grad(F.cross_entropy(logits, tags), [p for _, p in sorted(which.named_parameters())])
        for logits, which in ((ours, model), (theirs, plain))
    ]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_sentence_gets_what_it_gets_alone():
    model, data, lexicon = network(layers=2)
    together = model(collate(data.train, lexicon))
    for row, sentence in zip(together, data.train):
        alone = model(collate([sentence], lexicon))[0]
        torch.testing.assert_close(row[: len(sentence.words)], alone, rtol=1e-12, atol=1e-12)
    assert answers(model, data.train, lexicon) == [
        row[: len(s.words)].argmax(-1).tolist() for row, s in zip(together, data.train)
    ]


def test_the_directions_are_independent_passes_over_the_same_input():
    """E51: →h_t sees no word behind t, ←h_t none before it (exact zeros); a reversed layer on a forward one is another network."""
    model, _, _ = network(spelling=0)
    net = model.recurrent
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, None, torch.tensor([6]))[0], x)[0, :, :, 0]
    reach = jacobian.abs().amax(-1)  # (T, 2D, T)
    for t in range(6):
        assert not reach[t, :5, t + 1 :].any()
        assert not reach[t, 5:, :t].any()
        assert (reach[t, :5, : t + 1] > 0).all()
        assert (reach[t, 5:, t:] > 0).all()
    forwards, backwards = nn.LSTM(4, 5, batch_first=True).double(), nn.LSTM(5, 5, batch_first=True).double()
    h, _ = forwards(x)
    stacked = backwards(h.flip(1))[0].flip(1)
    through = torch.autograd.functional.jacobian(
        lambda x: backwards(forwards(x)[0].flip(1))[0].flip(1), x
    )[0, :, :, 0].abs().amax(-1)  # fmt: skip
    assert stacked.shape == (1, 6, 5)
    assert (through[3, :, :3] > 0).all()  # it sees what stands before t too


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cell": "gru", "bidirectional": False, "spelling": 0, "training_examples": 7},
        {"layers": 2, "dropout": 0.3, "unknown": 0.9, "clip_norm": 100.0},
    ],
)
def test_loop_equals_a_plain_one(settings, tmp_path):
    """Five updates with torch's modules, sentence by sentence, Adam written out, on the same batches and dropout."""
    result = run(tmp_path, **settings)
    config = Config(**{"data": write(tmp_path), **SMALL, **settings})
    data = tagged.read(config.data)
    learned = data.train[: config.training_examples or None]
    lexicon = Lexicon.of(learned)
    torch.manual_seed(fold(3, 0, 0, "init"))
    ours = build(config, Spec(classes=data.classes, extra={"lexicon": lexicon.state()}))["model"].double()
    model = Plain(ours, config.cell, config.layers, config.bidirectional, config.dropout)
    order = Stream(len(learned), 3, 3)
    count = Counter(w for s in learned for w in s.words)
    moments = {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in model.named_parameters()}
    losses, validations = [], {}
    for step in range(5):
        sentences = [learned[i] for i in order.indices(step).tolist()]
        longest = max(len(s.words) for s in sentences)
        drawn = torch.rand(len(sentences), longest, generator=generator(3, step, 0, "unknown"))
        numbers = torch.zeros(len(sentences), longest, dtype=torch.int64)
        for i, s in enumerate(sentences):
            for t, w in enumerate(s.words):
                gone = count[w] == 1 and drawn[i, t] < config.unknown
                numbers[i, t] = 0 if gone else 1 + lexicon.words.index(w)
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        model.train()
        logits = model(sentences, lexicon, numbers)
        loss = F.cross_entropy(logits, torch.tensor([t for s in sentences for t in s.tags]))
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink, k = min(1.0, config.clip_norm / (norm + 1e-6)), step + 1
        rate = config.learning_rate * (1 - (1 - config.final_learning_rate) * step / 5)
        with torch.no_grad():
            for key, p in parameters.items():
                g, (m, v) = gradients[key] * shrink, moments[key]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
        if k in (3, 5):
            model.eval()
            said = model(data.validation, lexicon).argmax(-1).tolist()
            true = [t for s in data.validation for t in s.tags]
            validations[k] = sum(a == b for a, b in zip(said, true)) / len(true)
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in model.state_dict().items():
        torch.testing.assert_close(trained[key], p, rtol=1e-8, atol=1e-9, msg=key)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
    assert {row["step"]: row["validation_accuracy"] for row in rows if len(row) > 2} == pytest.approx(validations)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    """Word by word from the saved weights; words that are new, and tags that the training part does not show, are told apart."""
    result = run(tmp_path, training_examples=12)
    loaded, data = etude.load(result.folder), tagged.read(write(tmp_path))
    lexicon = Lexicon(**loaded.spec.extra["lexicon"])
    model = Plain(loaded.model).eval()
    with torch.no_grad():
        said = model(data.test, lexicon).argmax(-1).tolist()
    pairs = [(w, t, a) for (w, t), a in zip([(w, t) for s in data.test for w, t in zip(*s)], said) if t >= 0]
    new = [(t, a) for w, t, a in pairs if w not in {w for s in data.train[:12] for w in s.words}]
    expected = {
        "test_accuracy": sum(t == a for _, t, a in pairs) / len(pairs),
        "test_new_word_accuracy": sum(t == a for t, a in new) / len(new),
        "test_commonest_accuracy": share(data.test, commonest_tags(data.train[:12], data.test)),
        "test_linear_accuracy": share(data.test, linear_tags(data.train[:12], data.test)),
    }
    assert result.metrics == pytest.approx(expected)
    text = (result.folder / "artifacts" / "examples.txt").read_text(encoding="utf-8")
    assert text.split("\n")[0].startswith("the/")


def test_reported_baselines_are_two(tmp_path, monkeypatch):
    """What the linear classifier says is what is scored as the linear one, and the commonest tags as theirs."""
    for number, name in enumerate(("commonest_tags", "linear_tags")):
        monkeypatch.setattr(
            f"etude.sequence.tagger.{name}", lambda train, test, n=number: [[3 + n] * len(s.words) for s in test]
        )
    result, data = run(tmp_path, steps=1), tagged.read(write(tmp_path))
    for number, name in enumerate(("commonest", "linear")):
        expected = share(data.test, [[3 + number] * len(s.words) for s in data.test])
        assert result.metrics[f"test_{name}_accuracy"] == pytest.approx(expected)
    assert result.metrics["test_commonest_accuracy"] != result.metrics["test_linear_accuracy"]


def test_files_and_sentences_are_tagged(tmp_path):
    result = run(tmp_path)
    loaded = etude.load(result.folder)
    told = etude.sample(result.folder, text="the dog barks").text.split("\n")
    assert [line.split()[0] for line in told] == ["the", "dog", "barks"]
    (tmp_path / "own.txt").write_text("The dog, here.\n\nA bird", encoding="utf-8")
    rows = loaded.predict([tmp_path / "own.txt", write(tmp_path)])
    assert (rows[0]["sentences"], rows[0]["words"]) == (2, 7)
    assert sum(rows[0]["tags"].values()) == pytest.approx(1)
    assert "accuracy" not in rows[0]
    written = [line.split("\t") for line in Path(rows[0]["tagged"]).read_text(encoding="utf-8").split("\n")]
    assert [line[0] for line in written] == ["The", "dog", ",", "here", ".", "", "A", "bird", ""]
    given = tagged.sentences(tmp_path / "own.conllu")
    place = {name: i for i, name in enumerate(loaded.spec.classes)}
    asked = [Sentence(tuple(w for w, _ in s), tuple(place.get(t, -100) for _, t in s)) for s in given]
    said = answers(loaded.model, asked, Lexicon(**loaded.spec.extra["lexicon"]))
    assert rows[1]["accuracy"] == pytest.approx(share(asked, said))
    with pytest.raises(UserError, match="--text is empty"):
        etude.sample(result.folder, text=" ")
    with pytest.raises(UserError, match="name a text file"):
        loaded.predict(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="is a folder"):
        loaded.predict(tmp_path)
