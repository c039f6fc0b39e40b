"""A whole run of ELMo against loops over letters, words and gates; its numbers counted again, and its splits apart."""

from __future__ import annotations

import json
import math
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.data import texts
from etude.data.batches import Grouped
from etude.language.elmo import Config, build
from etude.language.parts.elmo import Lexicon
from etude.language.parts.tasks import read_task
from etude.language.parts.words import commonest_tags, linear_tags, share

plain = runpy.run_path(str(Path(__file__).with_name("plain_elmo.py")))
SMALL = {
    "vocabulary": 12, "spelling": 3, "filters": (2, 3), "highways": 1, "width": 5, "projection": 4, "layers": 2, "dropout": 0.0,
    "batch": 3, "steps": 4, "learning_rate": 0.05, "warmup_steps": 2, "clip_norm": 0.1, "training_examples": 9,
    "tagging_steps": 3, "tagging_learning_rate": 0.07, "evaluate_every": 2,
}  # fmt: skip


def house(length=2600):
    return texts.house()[:length]


def run(folder, text=None, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text or house(), encoding="utf-8")
    return etude.run(
        "language/elmo", out=folder / "run", seed=3, quiet=True, threads=1, data=str(folder / "text.txt"),
        **{**SMALL, **settings},
    )  # fmt: skip


def rows(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def told(item):
    return [f"={word}" for word in item.first]


def frequencies(items, lexicon):
    """log of the words' shares, each counted once more than it occurs."""
    count = Counter(word if word in lexicon.words else None for item in items for word in item.first)
    often = [count[None] + 1, len(items) + 1, len(items) + 1, *(count[word] + 1 for word in lexicon.words)]
    return [math.log(n / sum(often)) for n in often]


def surprise(weights, items, lexicon, read="letters"):
    """Mean −log p of the words themselves, forwards and backwards."""
    total, words = [0.0, 0.0], sum(len(item.first) for item in items)
    for item in items:
        ahead, back = plain["nats"](weights, told(item), lexicon, read)
        total[0] += sum(float(n) for n in ahead[:-1])
        total[1] += sum(float(n) for n in back[1:])
    return [value / words for value in total]


def moved(parameters, gradients, moments, k, learning_rate):
    """Adam, written out."""
    for name, p in parameters.items():
        g, (m, v) = gradients[name], moments[name]
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        p.sub_(learning_rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))


def factor(step, steps, warmup=0):
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.95 * (step - warmup) / (steps - warmup)


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({}, [0, 1, 2]),
        ({"features": "last", "projection": 5, "clip_norm": 1e9, "training_examples": 0, "warmup_steps": 0}, [2]),
        ({"features": "token", "read": "words", "normalizer": "none"}, [0]),
    ],
)
def test_loop_equals_a_plain_one(settings, features, tmp_path, double):
    """The language models' updates, then those of the tags on what stands still: batches, losses, clipping, Adam, schedules."""
    result = run(tmp_path, **settings)
    config = Config(**{**SMALL, **settings})
    task = read_task(str(tmp_path / "text.txt"), "tags")
    lexicon = Lexicon.of((item.first for item in task.train), 12)
    spec = json.loads((result.folder / "spec.json").read_text())
    torch.manual_seed(fold(3, 0, 0, "init"))
    made = build(config, Spec(classes=task.classes, extra=spec["extra"]))
    weights, tags = (
        {name: p.detach().clone().requires_grad_() for name, p in made[part].named_parameters()}
        for part in ("model", "tags")
    )
    weights["readout.bias"].data = torch.tensor(frequencies(task.train, lexicon))
    drawn = torch.randperm(len(task.train), generator=generator(3, -1, 0, "labelled"))
    labelled = [task.train[i] for i in drawn.tolist()[: config.training_examples or None]]
    orders = [Grouped(np.array([len(i.first) for i in part]), 3, 3) for part in (task.train, labelled)]
    moments = [{n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in part.items()} for part in (weights, tags)]
    logged, read, norm = rows(result), config.read, config.normalizer == "layer"
    assert len(logged) == 7
    for step in range(4):
        pairs = [plain["nats"](weights, told(task.train[i]), lexicon, read) for i in orders[0].indices(step)]
        ahead, back = ([n for pair in pairs for n in pair[side]] for side in (0, 1))
        loss = torch.stack(ahead).mean() / 2 + torch.stack(back).mean() / 2
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)))
        if "spelled.letters.weight" in gradients:
            gradients["spelled.letters.weight"][0] = 0  # no letter
        length = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert length > 0.1
        shrink = min(1.0, config.clip_norm / (length + 1e-6))
        gradients = {name: g * shrink for name, g in gradients.items()}
        with torch.no_grad():
            moved(weights, gradients, moments[0], step + 1, 0.05 * factor(step, 4, config.warmup_steps))
        assert logged[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert ("validation_forward_nats" in logged[step]) == (step in (1, 3))
        if step in (1, 3):
            with torch.no_grad():
                found = surprise(weights, task.validation, lexicon, read)
            said = [logged[step][f"validation_{name}_nats"] for name in ("forward", "backward")]
            assert said == pytest.approx(found, rel=1e-8)
    for step in range(3):
        items = [labelled[i] for i in orders[1].indices(step)]
        with torch.no_grad():
            layers = torch.cat([plain["features"](weights, told(i), lexicon, read) for i in items])
        logits = plain["mixed"](tags, layers[:, features], norm)
        loss = F.cross_entropy(logits, torch.tensor([tag for i in items for tag in i.tags]))
        gradients = dict(zip(tags, torch.autograd.grad(loss, list(tags.values()))))
        with torch.no_grad():
            moved(tags, gradients, moments[1], step + 1, 0.07 * factor(step, 3))
        assert logged[4 + step]["tagging_loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert "loss" not in logged[4 + step]
        if step in (1, 2):
            with torch.no_grad():
                said = [guessed(weights, tags, i, lexicon, features, read, norm) for i in task.validation]
            assert logged[4 + step]["validation_accuracy"] == pytest.approx(share(task.validation, said))
    loaded = etude.load(result.folder)
    for part, name in ((weights, "model"), (tags, "tags")):
        state = loaded.modules[name].state_dict()
        for key, p in part.items():
            torch.testing.assert_close(state[key].double(), p.detach(), rtol=1e-7, atol=1e-9, msg=key)


def guessed(weights, tags, item, lexicon, features, read="letters", norm=True):
    layers = plain["features"](weights, told(item), lexicon, read)[:, features]
    return plain["mixed"](tags, layers, norm).argmax(-1).tolist()


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    """Each word of the test part alone; words that are new, and what needs no network, from the labelled sentences."""
    result = run(tmp_path, dropout=0.4, steps=8, tagging_steps=30)
    task = read_task(str(tmp_path / "text.txt"), "tags")
    drawn = torch.randperm(len(task.train), generator=generator(3, -1, 0, "labelled"))[:9].tolist()
    labelled, loaded = [task.train[i] for i in drawn], etude.load(result.folder)
    known = loaded.spec.extra["lexicon"]
    lexicon = Lexicon(tuple(known["words"]), known["letters"])
    assert lexicon == Lexicon.of((item.first for item in task.train), 12)
    weights, tags = (dict(loaded.modules[name].named_parameters()) for name in ("model", "tags"))
    with torch.no_grad():
        forward, backward = surprise(weights, task.test, lexicon)
        said = [guessed(weights, tags, item, lexicon, [0, 1, 2]) for item in task.test]
    often = frequencies(task.train, lexicon)
    alone = [-often[n] for item in task.test for n in plain["numbers"](told(item), lexicon)[1:-1]]
    unigram = sum(alone) / len(alone)
    pairs = [(w, t, a) for i, row in zip(task.test, said) for w, t, a in zip(i.first, i.tags, row)]
    new = [(t, a) for w, t, a in pairs if w not in {w for item in labelled for w in item.first}]
    assert 0 < len(new) < len(pairs)
    expected = {
        "test_forward_nats": forward,
        "test_backward_nats": backward,
        "test_unigram_nats": unigram,
        "test_gain_nats": unigram - (forward + backward) / 2,
        "test_accuracy": sum(t == a for _, t, a in pairs) / len(pairs),
        "test_new_word_accuracy": sum(t == a for t, a in new) / len(new),
        "test_linear_accuracy": share(task.test, linear_tags(labelled, task.test)),
        "test_commonest_accuracy": share(task.test, commonest_tags(labelled, task.test)),
    }
    assert result.metrics == pytest.approx(expected, rel=2e-5, abs=2e-6)
    word, tag, after, before = etude.sample(result.folder, text="Before we").text.split("\n")[1].split()
    nats = plain["nats"](weights, ["=Before", "=we"], lexicon)
    assert [word, after, before] == ["Before", f"{float(nats[0][0].detach()):.2f}", f"{float(nats[1][1].detach()):.2f}"]
    assert tag in {name or "-" for name in task.classes}


def test_reported_baselines_are_two(tmp_path, monkeypatch):
    learned = []
    for number, name in enumerate(("commonest_tags", "linear_tags")):

        def same(train, test, number=number):
            learned.append(len(train))
            return [[number] * len(item.first) for item in test]

        monkeypatch.setattr(f"etude.language.elmo.{name}", same)
    result = run(tmp_path, steps=1, tagging_steps=1)
    task = read_task(str(tmp_path / "text.txt"), "tags")
    for number, name in enumerate(("commonest", "linear")):
        expected = share(task.test, [[number] * len(i.first) for i in task.test])
        assert result.metrics[f"test_{name}_accuracy"] == pytest.approx(expected)
    assert learned == [9, 9]  # from the labelled sentences alone


def test_the_test_part_is_seen_by_its_own_numbers_only(tmp_path):
    text = house()
    start = len(text) * 19 // 20
    one, two = run(tmp_path / "one", text), run(tmp_path / "two", text[:start] + text[start:].replace("e", "x"))
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(r.folder).modules["model"].state_dict() for r in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.metrics["test_forward_nats"] != two.metrics["test_forward_nats"]


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="a projection makes shorter: 6 is more than the width, 5"):
        run(tmp_path, projection=6)
    with pytest.raises(UserError, match="too few sentences"):
        run(tmp_path, "a line")
    with pytest.raises(UserError, match="no filter"):
        run(tmp_path, filters=(0, 0))
    assert not (tmp_path / "run").exists()
    result = run(tmp_path)
    with pytest.raises(UserError, match="--text is empty"):
        etude.sample(result.folder, text=" ")
