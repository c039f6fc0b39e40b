"""Pairs as tokens, batches as a function of (seed, step), and the scores of a translator that is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import sacrebleu
import torch

from etude import data
from etude.core.errors import UserError
from etude.data.batches import Grouped
from etude.sequence.parts import translating as of
from etude.sequence.parts.translating import BOS, EOS, PAD


class Reverser(torch.nn.Module):
    """Writes the source backwards, with p = .9 for the right token; of some sources (`spoiled`) a wrong first letter."""

    def __init__(self, tokens, spoiled=()):
        super().__init__()
        self.tokens, self.spoiled = tokens, spoiled
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def wanted(self, source, lengths):
        rows = []
        for row, length in zip(source, lengths.tolist()):
            assert row[length - 1] == EOS
            assert (row[length:] == PAD).all()
            back = row[: length - 1].flip(0)
            if self.tokens.decode(row) in self.spoiled:
                back[0] = 3 + (back[0] - 3 + 1) % 26
            rows.append(torch.cat([back, torch.full((40,), EOS)]))
        return torch.stack([row[:40] for row in rows])

    def logits(self, wanted):
        p = torch.full((*wanted.shape, self.tokens.size), 0.1 / (self.tokens.size - 1), dtype=torch.float64)
        return p.scatter(-1, wanted[..., None], 0.9).log()

    def forward(self, source, lengths, before):
        return self.logits(self.wanted(source, lengths)[:, : before.shape[1]])

    def begin(self, source, lengths):
        assert not self.training, "dropout would be left on in translation"
        return {"wanted": self.wanted(source, lengths), "place": torch.zeros(len(source), dtype=torch.int64)}

    def step(self, tokens, state):
        logits = self.logits(state["wanted"].gather(1, state["place"][:, None])[:, 0])
        return logits, {"wanted": state["wanted"], "place": state["place"] + 1}


def task(**changes):
    return of.read_task(
        **{
            "name": "reversal",
            "languages": "en-de",
            "vocabulary": 300,
            "longest": 10,
            "batch": 16,
            "seed": 0,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """The first 3,000 captions of Multi30k as a folder of one's own."""
    folder = tmp_path_factory.mktemp("captions")
    pairs = data.parallel("multi30k").train[:3000]
    for side, language in enumerate(("en", "de")):
        (folder / f"captions.{language}").write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return task(name=str(folder), vocabulary=1000, longest=40, batch=32)


def test_special_tokens_stand_before_the_others():
    tokens = task().tokens
    assert tokens.size == 29
    assert tokens.encode("abz").tolist() == [3, 4, 28, EOS]
    assert tokens.decode([BOS, 3, 4, 28, EOS, 3, PAD]) == "abz"
    assert tokens.decode(torch.tensor([EOS])) == ""


def test_a_batch_of_reversals():
    batch = task()(3)
    tokens = task().tokens
    assert (batch.source.shape[0], batch.lengths.max()) == (16, batch.source.shape[1])
    for source, length, before, after in zip(*batch):
        text = tokens.decode(source)
        assert 1 <= len(text) <= 10
        assert length == len(text) + 1
        assert source[length - 1] == EOS
        assert (source[length:] == PAD).all()
        assert after[:length].tolist() == tokens.encode(text[::-1]).tolist()
        assert (after[length:] == PAD).all()
        assert before[:length].tolist() == [BOS, *tokens.encode(text[::-1]).tolist()[:-1]]
        assert (before[length:] == PAD).all()


def test_a_batch_is_a_function_of_seed_step_and_rank():
    def same(a, b):
        return a.source.shape == b.source.shape and all(torch.equal(x, y) for x, y in zip(a, b))

    assert same(task()(5), task()(5))
    assert not same(task()(5), task()(6))
    assert not same(task()(5), task(seed=1)(5))
    assert not same(task()(5), task(rank=1, world=2)(5))
    assert task(seed=1).test == task().test
    assert (
        len({source for source, _ in task().test} & {source for source, _ in task().validation if len(source) > 4}) == 0
    )


def test_lengths_and_letters_are_uniform():
    pairs = of.reversals(20_000, 10, torch.Generator().manual_seed(0))
    lengths = np.bincount([len(source) for source, _ in pairs], minlength=11)[1:]
    assert abs(lengths - 2000).max() < 4.5 * math.sqrt(2000 * 0.9)
    letters = np.bincount([ord(letter) - 97 for source, _ in pairs for letter in source], minlength=26)
    assert abs(letters / letters.sum() - 1 / 26).max() < 4.5 * math.sqrt(1 / 26 / letters.sum())
    assert all(target == source[::-1] for source, target in pairs)


def test_captions_as_batches(captions):
    """The tokens decode to the sentences; every pair comes once an epoch; little of a batch is padding."""
    assert captions.tokens.size == 1003
    steps, seen, filled, whole = captions.groups.per_epoch, 0, 0, 0
    for step in range(steps):
        batch = captions(step)
        seen += len(batch.lengths)
        filled += int((batch.source != PAD).sum() + (batch.after != PAD).sum())
        whole += batch.source.numel() + batch.after.numel()
    assert seen == len(captions.learned) > 2300
    assert filled / whole > 0.8  # .57 of batches in random order
    first = captions(0)
    known = set(captions.content.train)
    for source, after in zip(first.source, first.after):
        assert (captions.tokens.decode(source), captions.tokens.decode(after)) in known
    assert max(max(len(a), len(b)) for a, b in captions.learned) == 41
    assert (len(captions.validation), len(captions.test)) == (150, 150)


@pytest.mark.parametrize(("n", "batch", "world"), [(103, 10, 1), (103, 10, 3), (7, 10, 2), (1000, 8, 2)])
def test_grouped_batches_hold_every_sample_once_an_epoch(n, batch, world):
    lengths = np.random.default_rng(0).integers(1, 50, n)
    ranks = [Grouped(lengths, batch, 3, rank, world, pool=5) for rank in range(world)]
    per_epoch = -(-n // batch)
    drawn = [ranks[i % world].indices(i // world) for i in range(3 * per_epoch)]
    epochs = [np.concatenate(drawn[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    held = [{frozenset(part.tolist()) for part in drawn[i * per_epoch : (i + 1) * per_epoch]} for i in range(2)]
    assert n < 20 or not held[0] & held[1]  # other batches, not only another order of them
    assert max(map(len, drawn)) <= batch
    if n == 1000:  # batches are alike in length: a quarter of the spread; and they come in no order of it
        means = np.array([lengths[part].mean() for part in drawn[:per_epoch]]).reshape(-1, 5)
        assert (np.diff(means) < 0).mean() > 0.25
        assert np.mean([lengths[part].std() for part in drawn]) < lengths.std() / 4
    fresh = Grouped(lengths, batch, 3, 0, world, pool=5)
    for step in (2, 0, 7):
        np.testing.assert_array_equal(fresh.indices(step), ranks[0].indices(step))


def test_grouped_batches_need_samples():
    with pytest.raises(UserError, match="No batches can be made of 0 samples"):
        Grouped(np.empty(0), 4, 0)


def test_the_scores_of_a_known_translator(monkeypatch):
    """Three of four right: exact match .75, BLEU as sacrebleu's, and −log .9 for each token that it agrees with."""
    given = task()
    pairs = [(text, text[::-1]) for text in ("abcdefgh", "b", "hello", "wxyz")]
    model = Reverser(given.tokens, spoiled=("hello",)).train()
    found = of.scores(model, given, pairs)
    told = [target for _, target in pairs[:2]] + ["plleh", pairs[3][1]]
    assert of.translate(model, given, [a for a, _ in pairs], longest=10) == told
    assert found["exact_match"] == 0.75
    assert "bleu" not in found  # strings have no words
    words = dataclasses.replace(given, content=None)
    expected = sacrebleu.corpus_bleu(told, [[b for _, b in pairs]]).score
    assert of.scores(model, words, pairs)["bleu"] == pytest.approx(expected)
    tokens = sum(len(target) + 1 for _, target in pairs)
    assert found["nats_per_token"] == pytest.approx(
        -((tokens - 1) * math.log(0.9) + math.log(0.1 / 28)) / tokens, rel=1e-5
    )
    assert model.training
    targets = ["a man in a red hat", "a man in a green hat", "two dogs run on the grass", "a man with a red hat runs"]
    monkeypatch.setattr(of, "translate", lambda *_, **__: targets)  # perfect, and near to the next target
    monkeypatch.setattr(of, "forced_nats", lambda *_: 0.0)
    found = of.scores(model, words, [(text, target) for (text, _), target in zip(pairs, targets)])
    assert found["bleu"] == pytest.approx(100)
    others = sacrebleu.corpus_bleu(targets, [targets[1:] + targets[:1]]).score
    assert found["unrelated_bleu"] == pytest.approx(others)
    assert 5 < others < 50


@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_are_translated_as_they_would_be_alone(beams):
    given = task()
    model, sources = Reverser(given.tokens), [source for source, _ in given.test[:23]]
    together = of.translate(model, given, sources, longest=10, beams=beams, batch=7)
    assert together == [of.translate(model, given, [source], longest=10, beams=beams)[0] for source in sources]
    assert together == [target for _, target in given.test[:23]]
    assert of.translate(model, given, ["abcdef"], longest=3) == [
        "fedc"
    ]  # as many tokens as allowed, and one for the end


def test_padding_has_no_part_in_the_loss():
    logits = torch.randn(2, 4, 9, dtype=torch.float64)
    after = torch.tensor([[3, 4, EOS, PAD], [5, EOS, PAD, PAD]])
    real = [(0, 0, 3), (0, 1, 4), (0, 2, EOS), (1, 0, 5), (1, 1, EOS)]
    log_p = logits.log_softmax(-1)
    assert of.token_nats(logits, after) == pytest.approx(-sum(float(log_p[place]) for place in real) / 5)
    smooth = -sum(0.9 * float(log_p[place]) + 0.1 * float(log_p[place[:2]].mean()) for place in real) / 5
    assert of.token_nats(logits, after, 0.1) == pytest.approx(smooth)
    longer = torch.nn.functional.pad(after, (0, 3))
    assert of.token_nats(torch.cat([logits, torch.randn(2, 3, 9).double()], 1), longer, 0.1) == pytest.approx(smooth)


@pytest.mark.parametrize("wrong", ["en", "en-", "-de", ""])
def test_languages_are_two(wrong):
    with pytest.raises(UserError, match="languages are source and target"):
        task(name="multi30k", languages=wrong)


def test_sentences_that_are_too_long_for_all(tmp_path):
    for name in ("a.xx", "a.yy"):
        (tmp_path / name).write_text("a long sentence of many words\n" * 20)
    with pytest.raises(UserError, match="no training pair of .* has at most 2 tokens"):
        task(name=str(tmp_path), languages="xx-yy", vocabulary=256, longest=2)
