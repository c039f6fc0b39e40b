"""A whole run of GPT against a plain loop, its numbers counted again, its splits apart, and the texts it writes."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import etude
from etude.blocks.tokens.decoding import pick
from etude.blocks.tokens.text import tokenizer
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.data import texts
from etude.language.gpt import GPT, Architecture
from etude.language.gpt.train import Config, Sample, generate, sample

SMALL = {"layers": 2, "heads": 2, "width": 8, "context": 8, "batch": 3, "steps": 6, "warmup_steps": 3}
SMALL |= {"final_learning_rate": 0.3, "learning_rate": 0.02, "weight_decay": 0.4, "clip_norm": 0.5, "dropout": 0.2}
SMALL |= {"evaluate_every": 2, "sample_every": 4}


def house(length: int = 900) -> str:
    return texts.house()[:length]


def write(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "text.txt")


def run(folder: Path, text: str, seed: int = 3, **settings):
    return etude.run(
        "language/gpt", out=folder / "run", seed=seed, quiet=True, threads=1, data=write(folder, text),
        **{**SMALL, **settings},
    )  # fmt: skip


def rows(result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def cut(text: str) -> tuple[str, str, str]:
    a, b = math.floor(0.9 * len(text)), math.floor(0.95 * len(text))
    return text[:a], text[a:b], text[b:]


def nats_of(model: GPT, ids: list[int], begin: int) -> float:
    """−Σ log p of ids[begin:], read in windows of one context that begin with the token before."""
    total, context = 0.0, model.context
    model.eval()
    with torch.no_grad():
        for start in range(begin - 1, len(ids) - 1, context):
            x, y = ids[start : start + context], ids[start + 1 : start + context + 1]
            logits = model(torch.tensor([x[: len(y)]]))[0]
            total -= sum(float(logits[t].log_softmax(-1)[y[t]]) for t in range(len(y)))
    return total


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"norm_placement": "post"},
        {"clip_norm": 1e9, "dropout": 0.0},
        {"warmup_steps": 0, "beta2": 0.9, "weight_decay": 0.0},
        {"warmup_steps": 6, "final_learning_rate": 0.0},
    ],
)
def test_loop_equals_a_plain_one(extra, tmp_path, double):
    """Every update of a float64 run in plain arithmetic: batches, dropout, gradient, clipping, AdamW, its schedule."""
    text, config = house(), Config(**{**SMALL, **extra})
    result = run(tmp_path, text, **extra)

    learned = cut(text)[0]
    code = {letter: i for i, letter in enumerate(sorted({*learned, "\ufffd"}))}
    ids = [code.get(letter, code["\ufffd"]) for letter in text]
    end, held = len(learned), len(learned) + len(cut(text)[1])
    torch.manual_seed(fold(3, 0, 0, "init"))
    model = GPT(Architecture(len(code), 8, 2, 2, 8, norm_placement=config.norm_placement, dropout=config.dropout))
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses, validations, norms = [], {}, []
    for step in range(6):
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        offsets = torch.randint(end - 8, (3,), generator=generator(3, step, 0, "batch")).tolist()
        x = torch.tensor([ids[o : o + 8] for o in offsets])
        y = torch.tensor([ids[o + 1 : o + 9] for o in offsets])
        model.train()
        loss = F.cross_entropy(model(x).reshape(24, -1), y.reshape(24))
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink = min(1.0, config.clip_norm / (norm + 1e-6))  # torch's guard against a norm of 0
        if step < config.warmup_steps:
            rate = 0.02 * (step + 1) / config.warmup_steps
        else:
            turn = math.pi * (step - config.warmup_steps) / (6 - config.warmup_steps)
            low = 0.02 * config.final_learning_rate
            rate = low + (0.02 - low) * (1 + math.cos(turn)) / 2
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v), k = gradients[name] * shrink, moments[name], step + 1
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(config.beta2).add_((1 - config.beta2) * g * g)
                if name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")):
                    p.mul_(1 - rate * config.weight_decay)  # nothing else decays
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - config.beta2**k)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
        norms.append(norm)
        if k % 2 == 0:
            validations[k] = nats_of(model, ids[:held], end) / (held - end)
    assert min(norms) > 0.5, "the clipping of this test clips in every step"
    trained = etude.load(result.folder).model.state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(trained[name], p, rtol=1e-10, atol=1e-10, msg=name)
    assert [row["loss"] for row in rows(result)] == pytest.approx(losses, rel=1e-10)
    logged = {row["step"]: row["validation_nats_per_character"] for row in rows(result) if len(row) > 2}
    assert logged == pytest.approx(validations, rel=1e-10)
    assert result.metrics["test_nats_per_character"] == pytest.approx(
        nats_of(model, ids, held) / (len(ids) - held), rel=1e-10
    )


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    """In float32, with dropout, from the checkpoint: the test part, once, and the pairs counted in a dictionary."""
    text = house(2000)
    result = run(tmp_path, text, dropout=0.5)
    learned, validation, test = cut(text)
    model, alphabet = etude.load(result.folder).model, sorted({*learned, "\ufffd"})
    ids = [alphabet.index(letter) if letter in alphabet else alphabet.index("\ufffd") for letter in text]
    held = len(learned) + len(validation)
    assert set(result.metrics) == {"test_nats_per_character", "test_bigram_nats_per_character"}
    expected = nats_of(model, ids, held) / len(test)
    assert result.metrics["test_nats_per_character"] == pytest.approx(expected, rel=1e-5)
    pairs, single, known = Counter(itertools.pairwise(ids[: len(learned)])), Counter(ids[: len(learned)]), len(alphabet)
    total = 0.0
    for a, b in zip(ids[held - 1 :], ids[held:]):
        often = (single[b] + 1) / (len(learned) + known)
        begun = single[a] - (ids[len(learned) - 1] == a)  # the last character has no successor in this part
        total -= math.log((pairs[a, b] + often) / (begun + 1))
    assert result.metrics["test_bigram_nats_per_character"] == pytest.approx(total / len(test), rel=1e-9)


def test_the_test_part_is_seen_by_the_last_two_numbers_only(tmp_path):
    """Other words there, even in unknown letters, change no row of the log, no weight and no text that is written."""
    text = house(2000)
    learned, validation, test = cut(text)
    one = run(tmp_path / "one", text)
    two = run(tmp_path / "two", learned + validation + "Ω" * (len(test) // 2) + test[len(test) // 2 :][::-1])
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(result.folder).model.state_dict() for result in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("paragraph.txt", "writing-0000004.txt"):
        assert (one.folder / "artifacts" / name).read_text() == (two.folder / "artifacts" / name).read_text()
    assert all(one.metrics[name] != two.metrics[name] for name in one.metrics)


def test_byte_pairs_are_learned_from_the_training_part(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra text)")
    result = run(tmp_path, "abcd efgh " * 270 + "xyzw uvst " * 30, tokens="bpe", vocabulary=280)
    vocabulary = json.loads(etude.load(result.folder).spec.extra["tokenizer"]["definition"])["model"]["vocab"]
    made = {token for token in vocabulary if len(token) > 1}
    assert 6 <= len(made) < 24, "more could be learned only from the words that come later"
    assert set("".join(made)) <= {*"abcdefgh", "\u0120"}  # which is how a space is written


@pytest.mark.parametrize("text", ["abcdefghi", "abcdefghij", "ab cd"])
def test_short_texts_are_refused_in_one_sentence(text, tmp_path):
    with pytest.raises(UserError, match=r"text.txt is too short: its first 90 % are \d+ tokens"):
        run(tmp_path, text)
    assert not (tmp_path / "run").exists()
    run(tmp_path, "abcdefghij" * 2, steps=1)


def test_prompts_of_all_lengths_are_continued_as_each_alone(tmp_path):
    loaded = etude.load(run(tmp_path, house(), steps=2).folder)
    loaded.model.double()
    prompts = ["a", "the people of the city", "", "who"]
    for options in (Sample(count=40), Sample(count=40, greedy=True), Sample(count=5, top_k=2, samples=2, seed=4)):
        together = generate(loaded, prompts, options)
        alone = [text for prompt in prompts for text in generate(loaded, [prompt], options)]
        assert together == alone
        assert [len(text) for text in together] == [
            options.count + len(prompt or "\n") for prompt in prompts for _ in range(options.samples)
        ]
    assert together[0] != together[1]  # another seed, another text
    assert generate(loaded, [], Sample()) == []
    with pytest.raises(UserError, match="the character 'Ω'"):
        generate(loaded, ["who", "Ω"], Sample())
    with pytest.raises(UserError, match="--top-p is 0"):
        generate(loaded, ["who"], Sample(top_p=0.0))


@pytest.mark.parametrize(
    "rules", [{"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.4}, {"greedy": True}, {"temperature": 3.0, "seed": 9}]
)
def test_options_decide_what_is_written(rules, tmp_path, capsys):
    """One token after the other from the whole text so far; in the terminal, in sample.txt and from `generate`."""
    loaded = etude.load(run(tmp_path, house(), steps=2).folder)
    model, tokens = loaded.model.double(), tokenizer(loaded.spec.extra["tokenizer"])
    options = Sample(prompt="you ", count=4, samples=2, **rules)  # so that all fits into the context of 8
    told = generate(loaded, [""], options)
    for index in range(2):
        ids, dice = tokens.encode("you ")[None], torch.Generator().manual_seed(options.seed + index)
        for _ in range(4):
            given = {"temperature": 0.8} | {key: value for key, value in rules.items() if key != "seed"}
            with torch.no_grad():
                drawn = pick(model(ids)[:, -1], generator=dice, **given)
            ids = torch.cat([ids, drawn[:, None]], 1)
        assert told[index] == tokens.decode(ids[0])
    sample(loaded, options, tmp_path)
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8") == "\n\n".join(told) + "\n"
    assert capsys.readouterr().out == "\n".join(told) + "\n"
