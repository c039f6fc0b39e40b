"""A whole run of BERT against a plain loop, its numbers counted again, and its splits apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.data import texts
from etude.language.bert import Config, Sentences, examples, hide
from etude.language.parts.bert import Architecture, PreTraining
from etude.language.parts.wordpiece import WordPiece

SMALL = {
    "vocabulary": 90,
    "layers": 2,
    "heads": 2,
    "width": 8,
    "context": 20,
    "batch": 4,
    "steps": 5,
    "warmup_steps": 2,
}
SMALL |= {
    "learning_rate": 0.02,
    "weight_decay": 0.4,
    "clip_norm": 0.5,
    "dropout": 0.2,
    "evaluate_every": 2,
    "examples": 6,
}


def house(length: int = 4000) -> str:
    return texts.house()[:length]


def run(folder: Path, text: str, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return etude.run(
        "language/bert", out=folder / "run", seed=3, quiet=True, threads=1, data=str(folder / "text.txt"),
        **{**SMALL, **settings},
    )  # fmt: skip


def rows(result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def cut(text: str) -> list[str]:
    a, b = math.floor(0.9 * len(text)), math.floor(0.95 * len(text))
    return [text[:a], text[a:b], text[b:]]


def score(model, text, tokens, name, count, share=0.15) -> tuple[float, float, list[int]]:
    """Each example alone: (nats a chosen token, share of pairs, chosen tokens)."""
    stream, nats, right, chosen = generator(3, -1, 0, name), 0.0, 0, []
    model.eval()
    for begin in range(0, count, 64):
        batch = examples(text, tokens, min(64, count - begin), 20, stream)
        hidden, places = hide(batch.ids, tokens, share, stream)
        for row in range(len(hidden)):
            length = int(batch.mask[row].sum())
            with torch.no_grad():
                words, follows = model(hidden[row : row + 1, :length], batch.types[row : row + 1, :length])
            right += int(follows.argmax()) == int(batch.follows[row])
            for place in places.tolist():
                if place // 20 == row:
                    target = int(batch.ids[row, place % 20])
                    nats -= float(words[0, place % 20].log_softmax(0)[target])
                    chosen.append(target)
    return nats / len(chosen), right / count, chosen


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "extra", [{}, {"masked": 0.5, "dropout": 0.0, "clip_norm": 1e9}, {"warmup_steps": 0, "weight_decay": 0.0}]
)
def test_loop_equals_a_plain_one(extra, tmp_path, double):
    """Examples, hiding, dropout, both losses, clipping, AdamW and its schedule, in plain arithmetic."""
    text, config = house(), Config(**{**SMALL, **extra})
    result = run(tmp_path, text, **extra)
    tokens = WordPiece.learn(cut(text)[0], 90)
    learned, validation, _ = (Sentences.of(part, tokens) for part in cut(text))
    torch.manual_seed(fold(3, 0, 0, "init"))
    model = PreTraining(Architecture(90, 20, 2, 2, 8, 32, dropout=config.dropout, attention_dropout=config.dropout))
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    logged, validations = [], {}
    for step in range(5):
        stream = generator(3, step, 0, "batch")
        batch = examples(learned, tokens, 4, 20, stream)
        hidden, places = hide(batch.ids, tokens, config.masked, stream)
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        model.train()
        words, follows = model(hidden, batch.types, batch.mask)
        target = batch.ids.flatten()[places]
        one = F.cross_entropy(words.flatten(0, 1)[places], target)
        two = F.cross_entropy(follows, batch.follows)
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(one + two, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm > 0.5
        shrink = min(1.0, config.clip_norm / (norm + 1e-6))
        w = config.warmup_steps
        fall = 0.02 * (step + 1) / w if step < w else 0.02 * (5 - step) / (5 - w)
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v), k = gradients[name] * shrink, moments[name], step + 1
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                if name.endswith("weight") and "LayerNorm" not in name:
                    p.mul_(1 - fall * config.weight_decay)
                p.sub_(fall * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-6))
        logged.append((float(one.detach() + two.detach()), float(one.detach()), float(two.detach())))
        if (step + 1) % 2 == 0 or step == 4:
            validations[step + 1] = score(model, validation, tokens, "validation", 6, config.masked)[:2]
    trained = etude.load(result.folder).model.state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(trained[name], p, rtol=1e-9, atol=1e-9, msg=name)
    found = rows(result)
    for row, values in zip(found, logged):
        assert [row["loss"], row["masked_nats"], row["next_nats"]] == pytest.approx(values, rel=1e-9)
    for step, (nats, right) in validations.items():
        assert found[step - 1]["validation_masked_nats"] == pytest.approx(nats, rel=1e-9)
        assert found[step - 1]["validation_next_accuracy"] == pytest.approx(right, abs=1e-6)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    text = house()
    result = run(tmp_path, text, dropout=0.5, examples=70)
    loaded = etude.load(result.folder)
    state = loaded.spec.extra["tokenizer"]
    assert state["tokens"] == WordPiece.learn(cut(text)[0], 90).tokens
    tokens = WordPiece(state["tokens"], state["lower"])
    nats, right, chosen = score(loaded.model, Sentences.of(cut(text)[2], tokens), tokens, "test", 70)
    assert result.metrics["test_masked_nats"] == pytest.approx(nats, rel=1e-5)
    assert result.metrics["test_next_accuracy"] == pytest.approx(right, abs=1e-6)
    ids = Sentences.of(cut(text)[0], tokens).ids.tolist()
    alone = -sum(math.log((ids.count(token) + 1) / (len(ids) + 90)) for token in chosen) / len(chosen)
    assert result.metrics["test_unigram_nats"] == pytest.approx(alone, rel=1e-9)
    gain = result.metrics["test_unigram_nats"] - result.metrics["test_masked_nats"]
    assert result.metrics["test_gain_nats"] == pytest.approx(gain, abs=1e-12)


def test_the_test_part_is_seen_by_its_own_numbers_only(tmp_path):
    text = house()
    start = len(cut(text)[0]) + len(cut(text)[1])
    one = run(tmp_path / "one", text)
    two = run(tmp_path / "two", text[:start] + text[start:].replace("e", "x").replace("t", "Ω"))
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(result.folder).model.state_dict() for result in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.metrics["test_masked_nats"] != two.metrics["test_masked_nats"]


def test_short_texts_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"text.txt is too short: each of its parts"):
        run(tmp_path, "a line\n" * 20)
    assert not (tmp_path / "run").exists()
