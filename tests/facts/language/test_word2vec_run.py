"""Whole runs of word2vec against a plain loop over pairs, their numbers counted again, and what is drawn from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.data import texts
from etude.language.word2vec import objective, read_vectors, split_words, train
from etude.language.word2vec.pairs import Noise

SMALL = {"width": 6, "window": 3, "batch": 60, "steps": 5, "negatives": 2, "shared_negatives": 4, "subsample": 0.02}
SMALL |= {"learning_rate": 0.2, "final_learning_rate": 0.5, "evaluate_every": 2}


def house(length: int = 1500) -> str:
    return texts.house()[:length]


def run(folder: Path, text: str, seed: int = 3, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return etude.run(
        "language/word2vec", out=folder / "run", seed=seed, quiet=True, data=str(folder / "text.txt"),
        **{"threads": 1, **SMALL, **settings},
    )  # fmt: skip


def rows(result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def cut(text: str) -> list[list[str]]:
    a, b = math.floor(0.9 * len(text)), math.floor(0.95 * len(text))
    return [split_words(part) for part in (text[:a], text[a:b], text[b:])]


def draws(key: int, count: int, probability: list[float]) -> list[int]:
    """Proved in plain integers in test_word2vec.py."""
    return Noise(torch.tensor(probability, dtype=torch.float64)).draw(count, key).tolist()


class Text:
    """Words, counts and probabilities of a text's first part, by dictionaries."""

    def __init__(self, text: str, least: int = 2, subsample: float = 0.02, power: float = 0.75) -> None:
        self.parts = cut(text)
        counts = Counter(self.parts[0])
        self.words = sorted((w for w, c in counts.items() if c >= least), key=lambda w: (-counts[w], w))
        self.counts = [counts[w] for w in self.words]
        total = sum(self.counts)
        keep = [
            1.0 if not subsample else min(1, math.sqrt(subsample * total / c) + subsample * total / c)
            for c in self.counts
        ]
        self.keep, weight = keep, [c**power for c in self.counts]
        self.noise = [w / sum(weight) for w in weight]
        kept = [c * k for c, k in zip(self.counts, keep)]
        self.share = [k / sum(kept) for k in kept]
        self.ids = [[self.words.index(w) for w in part if w in self.words] for part in self.parts]

    def kept(self, ids: list[int], stream: torch.Generator) -> list[bool]:
        dice = torch.rand(len(ids), generator=stream, dtype=torch.float64).tolist()
        return [d < self.keep[w] for d, w in zip(dice, ids)]

    def held_out(self, part: int, name: str, window: int, dynamic: bool = True) -> list[tuple[int, int]]:
        stream = generator(3, 0, 0, name + " pairs")
        ids = self.ids[part]
        ids = [w for w, stays in zip(ids, self.kept(ids, stream)) if stays]
        reach = torch.randint(1, window + 1, (len(ids),), generator=stream).tolist() if dynamic else [window] * len(ids)
        return [(ids[i], ids[j]) for i in range(len(ids)) for j in range(len(ids)) if 0 < abs(i - j) <= reach[i]]


def nats(v, u, pairs, offset) -> float:
    logits = (v.double() @ u.double().t() + offset).log_softmax(1)
    return -sum(float(logits[c, o]) for c, o in pairs) / len(pairs)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"shared_negatives": 0, "dynamic_window": False},
        {"objective": "softmax", "learning_rate": 0.02},
        {"subsample": 0.0, "noise_power": 1.0, "least_count": 3, "shared_negatives": 7},
    ],
)
def test_loop_equals_a_plain_one(extra, tmp_path):
    """Subsampling, reach, pairs, noise, autograd's gradient, the words' own rates: five batches, over the end of a pass."""
    text, of = house(), {**SMALL, **extra}
    result = run(tmp_path, text, **extra)
    known = Text(text, of.get("least_count", 2), of["subsample"], of.get("noise_power", 0.75))
    ids, size, width = known.ids[0], len(known.words), of["width"]
    assert len(ids) < 60 * 5
    torch.manual_seed(fold(3, 0, 0, "init"))
    v = torch.empty(size, width).uniform_(-0.5 / width, 0.5 / width)
    u = torch.zeros(size, width)
    softmax, dynamic, window, shared = (
        "objective" in of,
        of.get("dynamic_window", True),
        of["window"],
        of["shared_negatives"],
    )
    if softmax:
        log = torch.tensor(known.share, dtype=torch.float64).log()
        v[:, 0], u[:, 0] = 1, (log - log.mean()).float()
    v, u = v.double().requires_grad_(), u.double().requires_grad_()
    adam = torch.optim.Adam([v, u], 0.02)
    pairs_of_a_batch = 60 * 2 * ((1 + window) / 2 if dynamic else window)
    n_v = torch.tensor([pairs_of_a_batch * 3 * s for s in known.share])
    n_u = torch.tensor([pairs_of_a_batch * (s + 2 * p) for s, p in zip(known.share, known.noise)])
    losses, validations = [], {}
    offset = 0 if softmax else torch.tensor(known.noise, dtype=torch.float64).log()
    for step in range(5):
        turn, part = divmod(step, -(-len(ids) // 60))
        stays = known.kept(ids, generator(3, turn, 0, "subsampling"))
        places = [i for i, s in enumerate(stays) if s]
        line = [ids[i] for i in places]
        centres = [at for at, i in enumerate(places) if part * 60 <= i < (part + 1) * 60]
        stream = generator(3, step, 0, "reach")
        reach = (
            torch.randint(1, window + 1, (len(centres),), generator=stream).tolist()
            if dynamic
            else [window] * len(centres)
        )
        found = [
            (place, line[i], line[j])
            for place, i in enumerate(centres)
            for j in range(len(line))
            if 0 < abs(i - j) <= reach[place]
        ]
        assert len(found) > 30
        blocks = -(-len(centres) // shared) if shared else 0
        drawn = draws(fold(3, step, 0, "noise"), blocks * shared or 2 * len(found), known.noise)
        total = torch.zeros((), dtype=torch.float64)
        for number, (place, c, o) in enumerate(found):
            if softmax:
                total = total + (u @ v[c]).log_softmax(0)[o]
                continue
            total = total + F.logsigmoid(u[o] @ v[c])
            if shared:
                block = place // shared
                noise = drawn[block * shared : (block + 1) * shared]
                total = total + F.logsigmoid(-u[noise] @ v[c]).sum() * 2 / shared
            else:
                total = total + F.logsigmoid(-u[drawn[2 * number : 2 * number + 2]] @ v[c]).sum()
        fall = max(1 - step / 5, 0.5)
        loss = -total / len(found)
        losses.append(float(loss.detach()))
        if softmax:
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = 0.02 * fall
            adam.step()
        else:
            by_v, by_u = torch.autograd.grad(total, [v, u])
            with torch.no_grad():
                v += (0.2 * fall / (1 + 0.2 * n_v / 4))[:, None] * by_v
                u += (0.2 * fall / (1 + 0.2 * n_u / 4))[:, None] * by_u
        if (step + 1) % 2 == 0 or step == 4:
            with torch.no_grad():
                validations[step + 1] = nats(v, u, known.held_out(1, "validation", window, dynamic), offset)
    trained = etude.load(result.folder).model
    torch.testing.assert_close(trained.vectors.detach(), v.detach().float(), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(trained.contexts.detach(), u.detach().float(), rtol=1e-4, atol=2e-6)
    assert [row["loss"] for row in rows(result)] == pytest.approx(losses, rel=1e-5)
    logged = {row["step"]: row["validation_nats_per_context"] for row in rows(result) if len(row) > 2}
    assert logged == pytest.approx(validations, rel=1e-5)


def test_reported_numbers_are_those_of_the_saved_vectors(tmp_path):
    text = house(6000)
    result = run(tmp_path, text, steps=40)
    known, model = Text(text), etude.load(result.folder).model
    v, u = model.vectors.detach(), model.contexts.detach()
    pairs = known.held_out(2, "test", 3)
    expected = nats(v, u, pairs, torch.tensor(known.noise, dtype=torch.float64).log())
    assert result.metrics["test_nats_per_context"] == pytest.approx(expected, rel=1e-5)
    alone = -sum(math.log(known.share[o]) for _, o in pairs) / len(pairs)
    assert result.metrics["test_unigram_nats_per_context"] == pytest.approx(alone, rel=1e-9)
    gain = result.metrics["test_unigram_nats_per_context"] - result.metrics["test_nats_per_context"]
    assert result.metrics["test_gain_nats"] == pytest.approx(gain, abs=1e-12)
    ids, size = known.ids[0], min(500, len(known.words))
    table = np.zeros((size, size))
    for i, a in enumerate(ids):
        for j in range(max(0, i - 3), min(len(ids), i + 4)):
            if i != j and a < size and ids[j] < size:
                table[a, ids[j]] += (4 - abs(i - j)) / 3
    single = table.sum(1)
    with np.errstate(divide="ignore"):
        pmi = np.maximum(np.log(table * table.sum() / np.outer(single, single)), 0)
    left, value, _ = np.linalg.svd(pmi)
    sides = []
    for vectors in (left[:, :6] * np.sqrt(value[:6]), v[:size].double().numpy()):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        sides.append((unit @ unit.T)[np.triu_indices(size, 1)])
    rho = stats.spearmanr(*sides).statistic
    assert result.metrics["ppmi_spearman"] == pytest.approx(rho, abs=0.01)  # ties of a small table break by rounding


def test_the_test_part_is_seen_by_its_own_number_only(tmp_path):
    text = house(3000)
    start = math.floor(0.95 * len(text))
    one = run(tmp_path / "one", text)
    two = run(tmp_path / "two", text[:start] + text[start:].replace(" ", " a ")[: len(text) - start])
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(result.folder).model.state_dict() for result in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.metrics["test_nats_per_context"] != two.metrics["test_nats_per_context"]


@pytest.mark.parametrize("extra", [{}, {"shared_negatives": 0}, {"objective": "softmax"}])
def test_every_mode_moves_every_word(extra, tmp_path):
    """The text's last word too, which comes only there, after the 10,000th word."""
    text = "to be or not to be that is the question " * 1100 + "zounds zounds "
    padded = text + "to be or not " * math.ceil(len(text) / 9 / 13)
    assert "zounds" in cut(padded)[0][10_000:]
    result = run(tmp_path, padded, batch=2000, subsample=0.0, steps=8, **extra)
    loaded = etude.load(result.folder)
    torch.manual_seed(fold(3, 0, 0, "init"))
    first = torch.empty(len(loaded.spec.extra["words"]), 6).uniform_(-0.5 / 6, 0.5 / 6)
    moved = (loaded.model.vectors.detach() - first)[:, 1:].abs().sum(1) > 0
    assert moved.all()
    assert (loaded.model.contexts.detach().abs().sum(1) > 0).all()


@pytest.mark.parametrize("extra", [{}, {"shared_negatives": 0}, {"objective": "softmax"}])
def test_machine_code_and_the_definition_learn_the_same(extra, tmp_path, monkeypatch):
    """The definition in tensors is what other devices compute; two threads change no number."""
    done = [run(tmp_path / "one", house(), **extra), run(tmp_path / "two", house(), threads=2, **extra)]
    monkeypatch.setattr(train, "Kernels", lambda threads: objective)
    done.append(run(tmp_path / "other", house(), **extra))
    one, two, other = (etude.load(result.folder).model.vectors.detach() for result in done)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert rows(done[0])[-1]["loss"] == pytest.approx(rows(done[2])[-1]["loss"], rel=1e-5)


def test_sparse_batches_and_short_texts(tmp_path):
    """Batches in which no word is kept, or one; texts too short are refused in a sentence."""
    result = run(tmp_path / "sparse", house(6000), subsample=3e-4, batch=3, steps=30)
    assert min(row["loss"] for row in rows(result)) == 0
    for text, match in (("one two three", "fewer than two words"), ("aa bb " * 20 + "cc " * 8, "too short")):
        with pytest.raises(UserError, match=match):
            run(tmp_path / "short", text)
        assert not (tmp_path / "short" / "run").exists()


def test_sample_names_neighbours_scores_files_and_writes_vectors(tmp_path):
    result = run(tmp_path, house(6000))
    loaded = etude.load(result.folder)
    words, v = loaded.spec.extra["words"], F.normalize(loaded.model.vectors.detach(), dim=1)
    drawn = etude.sample(result.folder, text=f"{words[3]} - {words[5]} + {words[8]}", count=3)
    cosine = v @ F.normalize(v[3] - v[5] + v[8], dim=0)
    order = [i for i in cosine.argsort(descending=True).tolist() if i not in (3, 5, 8)][:3]
    assert [line.split()[0] for line in drawn.text.splitlines()[1:]] == [words[i] for i in order]
    assert drawn.files == []
    (tmp_path / "pairs").write_text(f"a,b,c\n{words[0]},{words[1]},1\n{words[0]},{words[0]},9\n")
    (tmp_path / "questions").write_text(f": all of them\n{words[0]} {words[1]} {words[2]} {words[3]}\n")
    drawn = etude.sample(
        result.folder, similarity=str(tmp_path / "pairs"), analogies=str(tmp_path / "questions"), save="binary"
    )
    assert drawn.text.splitlines()[0] == "word similarity: Spearman 1.000 on 2 pairs"
    assert drawn.text.splitlines()[1].startswith("analogies all of them: ")
    assert torch.equal(read_vectors(drawn.files[0], binary=True)[1], loaded.model.vectors.detach())
    text = etude.sample(result.folder, save="text", out=tmp_path / "out")
    assert torch.equal(read_vectors(text.files[0])[1], loaded.model.vectors.detach())
    assert etude.sample(result.folder).text.splitlines()[0] == next(word for word in words if len(word) > 3)
