"""BERT fills in what both sides tell, learns which sentence follows, and goes on from published weights."""

from __future__ import annotations

import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.language.parts.wordpiece import WordPiece


def learn(tmp_path, text: str, **settings):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    small = {"vocabulary": 60, "layers": 2, "heads": 2, "width": 32, "context": 24, "batch": 32, "warmup_steps": 20}
    small |= {"learning_rate": 5e-3, "evaluate_every": 0, "examples": 64}
    return etude.run(
        "language/bert",
        out=tmp_path / "run",
        quiet=True,
        threads=1,
        data=str(tmp_path / "text.txt"),
        **small | settings,
    )


def test_letters_between_their_neighbours_are_filled_in(tmp_path):
    """A line of ten letters, again and again: measured 0.03 nats after 80 steps (log 10 is 2.3)."""
    result = learn(tmp_path, "a b c d e f g h i j\n" * 120, steps=80)
    assert result.metrics["test_masked_nats"] < 0.1
    drawn = etude.sample(result.folder, text="a b c d [MASK] f g h i j", count=1)
    assert drawn.text.split()[2] == "e"
    with pytest.raises(UserError, match="nothing to fill in"):
        etude.sample(result.folder, text="a b")


def test_it_goes_on_from_published_weights(tmp_path):
    """One step at a vanishing rate leaves a published model, with its tokenizer, as it was."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = "the cat sat on the mat\n" * 100
    tokens = WordPiece.learn(text, 40)
    config = transformers.BertConfig(
        vocab_size=tokens.size, max_position_embeddings=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20,
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path / "published")
    with pytest.raises(UserError, match=r"has no vocab.txt"):
        learn(tmp_path, text, init=str(tmp_path / "published"), steps=1)
    (tmp_path / "published" / "vocab.txt").write_text("\n".join(tokens.tokens) + "\n", encoding="utf-8")
    result = learn(tmp_path, text, init=str(tmp_path / "published"), steps=1, learning_rate=1e-12)
    loaded = etude.load(result.folder)
    ids = torch.tensor([[tokens.cls, *tokens.encode("the cat sat").tolist(), tokens.sep]])
    with torch.no_grad():
        words, follows = loaded.model(ids)
        expected = theirs(ids)
    assert (words - expected.prediction_logits).abs().max() < 1e-5
    assert (follows - expected.seq_relationship_logits).abs().max() < 1e-5
