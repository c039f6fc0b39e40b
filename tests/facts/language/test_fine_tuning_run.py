"""Whole runs of fine-tuning against a plain loop, their numbers counted again, and their splits apart."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.data import texts
from etude.data.batches import Stream
from etude.language.fine_tuning import Config
from etude.language.parts.bert import Architecture
from etude.language.parts.heads import Model
from etude.language.parts.tasks import answer_f1, encode, exact_match, read_task
from etude.language.parts.wordpiece import WordPiece

SMALL = {
    "vocabulary": 90,
    "layers": 2,
    "heads": 2,
    "width": 8,
    "context": 24,
    "batch": 5,
    "steps": 5,
    "warmup_steps": 2,
}
SMALL |= {"learning_rate": 0.02, "weight_decay": 0.4, "clip_norm": 0.4, "dropout": 0.2, "evaluate_every": 2}


def write(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "text.txt")


def run(folder: Path, text: str, **settings):
    return etude.run(
        "language/fine_tuning", out=folder / "run", seed=3, quiet=True, threads=1, data=write(folder, text),
        **{**SMALL, **settings},
    )  # fmt: skip


def house(length: int = 4000) -> str:
    return texts.house()[:length]


def rows(result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def told(model, item, tokens, kind):
    """What the model says of one item, read alone, window by window."""
    model.eval()
    best = (-math.inf, (0, 0))
    for window in encode(item, tokens, 24, kind, 6 if kind == "span" else 0):
        with torch.no_grad():
            logits = model(window.ids[None], window.types[None])[0]
        if kind in ("sentence", "pair"):
            return int(logits.argmax())
        if kind == "tags":
            tags = [int(logits[place].argmax()) for place in window.places.tolist()]
            return tags + [0] * (len(item.first) - len(tags))
        for i in range(len(window.places)):
            for j in range(i, min(i + 30, len(window.places))):
                total = float(logits[window.places[i], 0] + logits[window.ends[j], 1])
                best = max(best, (total, (int(window.words[i]), int(window.words[j]))), key=lambda found: found[0])
    return best[1]


def accuracy(model, items, tokens, kind) -> float:
    said = [told(model, item, tokens, kind) for item in items]
    if kind == "span":
        return sum(exact_match(" ".join(i.second[a : b + 1]), i.answers) for i, (a, b) in zip(items, said)) / len(items)
    if kind == "tags":
        pairs = [pair for item, tags in zip(items, said) for pair in zip(item.tags, tags)]
    else:
        pairs = [(item.label, answer) for item, answer in zip(items, said)]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"task": "pair", "warmup_steps": 0, "clip_norm": 1e9},
        {"task": "tags", "dropout": 0.0, "features": "mixture"},
        {"task": "span", "weight_decay": 0.0, "training_examples": 8},
        {"features": "concatenate_last_four"},
    ],
)
def test_loop_equals_a_plain_one(extra, tmp_path, double):
    """Batches, dropout, the loss of each row read with its padding, clipping, AdamW and its schedule."""
    text, config = house(), Config(**{**SMALL, **extra})
    kind = config.task
    result = run(tmp_path, text, **extra)
    task = read_task(write(tmp_path, text), kind, config.training_examples)
    tokens = WordPiece.learn("\n".join(" ".join(i.first + i.second) for i in task.train), 90)
    torch.manual_seed(fold(3, 0, 0, "init"))
    of = Architecture(90, 24, 2, 2, 8, 32, dropout=config.dropout, attention_dropout=config.dropout)
    model = Model(of, kind, len(task.classes), config.features, config.dropout)
    windows = [(i, w) for i in task.train for w in encode(i, tokens, 24, kind, 6 if kind == "span" else 0)]
    order = Stream(len(windows), 5, 3)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("bert.") == (config.features == "fine_tune") for name in parameters if "bert" in name)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    losses, validations = [], {}
    for step in range(5):
        chosen = [windows[i] for i in order.indices(step).tolist()]
        longest = max(len(w.ids) for _, w in chosen)
        ids, types = torch.full((5, longest), tokens.pad), torch.zeros(5, longest, dtype=torch.int64)
        for row, (_, w) in enumerate(chosen):
            ids[row, : len(w.ids)], types[row, : len(w.ids)] = w.ids, w.types
        mask = torch.stack([torch.arange(longest) < len(w.ids) for _, w in chosen])
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        model.train()
        logits = model(ids, types, mask)
        parts = []
        for row, (item, w) in enumerate(chosen):
            if kind in ("sentence", "pair"):
                parts.append(-logits[row].log_softmax(0)[item.label])
            elif kind == "tags":
                parts += [-logits[row, p].log_softmax(0)[tag] for p, tag in zip(w.places.tolist(), item.tags)]
            else:
                known = w.words.tolist()
                there = all(word in known for word in item.span)
                start = int(w.places[known.index(item.span[0])]) if there else 0
                end = int(w.ends[known.index(item.span[1])]) if there else 0
                inside = logits[row, : len(w.ids)].log_softmax(0)
                parts.append(-(inside[start, 0] + inside[end, 1]) / 2)
        loss = torch.stack(parts).mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink = min(1.0, config.clip_norm / (norm + 1e-6))
        w = config.warmup_steps
        fall = 0.02 * (step + 1) / w if step < w else 0.02 * (5 - step) / (5 - w)
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v), k = gradients[name] * shrink, moments[name], step + 1
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                if p.ndim > 1:
                    p.mul_(1 - fall * config.weight_decay)
                p.sub_(fall * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-6))
        losses.append(float(loss.detach()))
        if (step + 1) % 2 == 0 or step == 4:
            validations[step + 1] = accuracy(model, task.validation, tokens, kind)
    trained = etude.load(result.folder).model.state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(trained[name], p, rtol=1e-8, atol=1e-8, msg=name)
    assert [row["loss"] for row in rows(result)] == pytest.approx(losses, rel=1e-8)
    found = {row["step"]: row["validation_accuracy"] for row in rows(result) if len(row) > 2}
    assert found == pytest.approx(validations, abs=1e-9)


@pytest.mark.parametrize("kind", ["sentence", "pair", "tags", "span"])
def test_reported_numbers_are_those_of_the_saved_network(kind, tmp_path):
    text = house(8000)
    result = run(tmp_path, text, task=kind)
    loaded = etude.load(result.folder)
    state = loaded.spec.extra["tokenizer"]
    tokens, model = WordPiece(state["tokens"], state["lower"]), loaded.model
    task = read_task(str(tmp_path / "text.txt"), kind)
    assert result.metrics["test_accuracy"] == pytest.approx(accuracy(model, task.test, tokens, kind))
    said = [told(model, item, tokens, kind) for item in task.test]
    if kind == "span":
        f1 = [answer_f1(" ".join(i.second[a : b + 1]), i.answers) for i, (a, b) in zip(task.test, said)]
        assert result.metrics["test_f1"] == pytest.approx(sum(f1) / len(f1))
        first = sum(exact_match(item.second[0], item.answers) for item in task.test) / len(task.test)
        assert result.metrics["test_majority_accuracy"] == pytest.approx(first)
        return
    if kind == "tags":
        pairs = [pair for item, tags in zip(task.test, said) for pair in zip(item.tags, tags)]
        by_word = {
            w: Counter(t for i in task.train for v, t in zip(i.first, i.tags) if v == w)
            for i in task.train
            for w in i.first
        }
        every = Counter(t for i in task.train for t in i.tags)
        guess = [by_word.get(w, every).most_common(1)[0][0] == t for i in task.test for w, t in zip(i.first, i.tags)]
    else:
        pairs = [(item.label, answer) for item, answer in zip(task.test, said)]
        often = Counter(item.label for item in task.train).most_common(1)[0][0]
        guess = [item.label == often for item in task.test]
    assert result.metrics["test_majority_accuracy"] == pytest.approx(sum(guess) / len(guess))
    scores = []
    for c in range(len(task.classes)):
        hits = sum(a == b == c for a, b in pairs)
        whole = sum(a == c for a, _ in pairs) + sum(b == c for _, b in pairs)
        if whole:
            scores.append(2 * hits / whole)
    assert result.metrics["test_f1"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_the_test_part_is_seen_by_its_own_numbers_only(tmp_path):
    text = house()
    start = math.floor(0.95 * len(text))
    one = run(tmp_path / "one", text)
    two = run(tmp_path / "two", text[:start] + text[start:].replace("e", "x").replace(",", "."))
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(result.folder).model.state_dict() for result in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bad_input_ends_in_a_sentence(tmp_path):
    for settings, match in (
        ({"context": 4}, "holds no example"),
        ({"init": str(tmp_path / "nowhere")}, "there is no folder or file"),
        ({"data": str(tmp_path)}, "train.tsv is not there"),
    ):
        with pytest.raises(UserError, match=match):
            etude.run(
                "language/fine_tuning",
                out=tmp_path / "run",
                quiet=True,
                **{"data": write(tmp_path / "t", house()), **SMALL, **settings},
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="too few examples"):
        run(tmp_path / "short", "a line without\n" * 30)
