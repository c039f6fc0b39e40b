"""GPT learns texts with an obvious answer, and not what is not there; positions matter; sampling speaks the text."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import etude
from etude.blocks.nn.positional import LearnedPositions
from etude.blocks.nn.transformer import Block
from etude.core.errors import UserError
from etude.language.gpt.train import Sample, sample


def learn(tmp_path, text: str, **settings):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    small = {"layers": 2, "heads": 2, "width": 32, "context": 32, "batch": 16}
    small |= {"learning_rate": 5e-3, "warmup_steps": 20}
    return etude.run(
        "language/gpt", preset="default", out=tmp_path / "run", seed=0, threads=1, quiet=True, data=str(file),
        evaluate_every=10_000, **{**small, **settings},
    )  # fmt: skip


def test_a_repeated_alphabet_is_learned_and_written(tmp_path):
    """Measured: 0.029 nats after 120 steps; the greedy text continues the alphabet without an error."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    result = learn(tmp_path, alphabet * 200, steps=120)
    assert result.metrics["test_nats_per_character"] < 0.05
    loaded = etude.load(result.folder)
    (tmp_path / "samples").mkdir()
    sample(loaded, Sample(prompt="xyz", count=100, greedy=True, samples=2), tmp_path / "samples")
    first, second = (tmp_path / "samples" / "sample.txt").read_text().strip().split("\n\n")
    assert first == second
    assert first == ((alphabet * 5)[23:])[:103]
    sample(loaded, Sample(count=5, greedy=True), tmp_path / "samples")  # no line ends in this text to begin with
    assert (tmp_path / "samples" / "sample.txt").read_text() == "abcdef\n"
    with pytest.raises(UserError, match="--top-p is 0"):
        sample(loaded, Sample(top_p=0.0), tmp_path / "samples")


@pytest.mark.long
def test_random_tokens_cannot_beat_log_v(tmp_path):
    """Independent uniform characters: test stays at log 8 = 2.0794 or above; measured 2.0805."""
    draw = torch.randint(8, (30_000,), generator=torch.Generator().manual_seed(0))
    text = "".join("abcdefgh"[i] for i in draw.tolist())
    result = learn(tmp_path, text, steps=60)
    nats = result.metrics["test_nats_per_character"]
    assert math.log(8) - 0.005 < nats < math.log(8) + 0.05


@pytest.mark.long
def test_byte_pairs_are_counted_by_character(tmp_path):
    """The same text through byte pairs: the loss a token is larger, but the reported unit is the character."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra text)")
    result = learn(tmp_path, "the cat sat on the mat. " * 1000, tokens="bpe", vocabulary=270, steps=150)
    assert result.metrics["test_nats_per_character"] < 0.05  # measured 0.023
    loaded = etude.load(result.folder)
    assert loaded.spec.extra["tokenizer"]["kind"] == "bpe"


def test_fine_tuning_starts_from_published_weights(tmp_path):
    """One step at a vanishing rate leaves a published model (with its tokenizer) as it was."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from etude.blocks.tokens.text import BytePairs

    text = "the cat sat on the mat. " * 100
    tokens = BytePairs.learn(text, 270)
    config = transformers.GPT2Config(
        vocab_size=270, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    published = tmp_path / "published"
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(published)
    (published / "tokenizer.json").write_text(tokens.definition, encoding="utf-8")
    result = learn(tmp_path, text, init=str(published), steps=1, learning_rate=1e-12)
    loaded = etude.load(result.folder)
    ids = tokens.encode("the cat sat")[None]
    with torch.no_grad():
        assert (loaded.model(ids) - theirs(ids).logits).abs().max() < 1e-5
    assert json.loads((result.folder / "spec.json").read_text())["extra"]["architecture"]["activation"] == "gelu_tanh"


@pytest.mark.long
def test_positions_are_worth_more_than_a_tenth_of_a_nat():
    """Say the symbol at the other end of the sequence: without positions a bidirectional block only knows the set.

    Measured after 250 steps: 0.00001 nats with learned positions, 1.32 without.
    """

    def train(with_positions: bool) -> float:
        torch.manual_seed(0)
        table, head = nn.Embedding(8, 32), nn.Linear(32, 8)
        positions = LearnedPositions(6, 32) if with_positions else nn.Identity()
        block = Block(32, 2)
        parts = nn.ModuleList([table, positions, block, head])
        optimizer = torch.optim.AdamW(parts.parameters(), lr=5e-3, fused=True)
        for _ in range(250):
            x = torch.randint(8, (64, 6))
            loss = F.cross_entropy(head(block(positions(table(x)))).flatten(0, 1), x.flip(1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    with_them, without = train(True), train(False)
    assert with_them < 0.2
    assert without > with_them + 1.0


def test_compile_reaches_the_loss_and_changes_no_number(tmp_path, monkeypatch):
    """With the compiler's own front end and no C++: what is compiled is what the loop runs."""
    compiled, compiler = [], torch.compile

    def eager(function):
        compiled.append(function)
        return compiler(function, backend="eager")

    settings = {"preset": "tiny", "steps": 3, "quiet": True}
    plain = etude.run("language/gpt", out=tmp_path / "plain", **settings)
    monkeypatch.setattr(torch, "compile", eager)
    fast = etude.run("language/gpt", out=tmp_path / "fast", compile=True, **settings)
    assert len(compiled) == 1
    assert fast.metrics == pytest.approx(plain.metrics, rel=1e-6)
