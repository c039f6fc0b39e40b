"""Transformer: a handful of sentences and their translations, to be known by heart."""

from __future__ import annotations

import pytest

import etude

ENGLISH = "a cat\nthe dog sleeps\na man reads a book\nno\ntwo women walk\nthe book\n"
GERMAN = "eine Katze\nder Hund schläft\nein Mann liest ein Buch\nnein\nzwei Frauen gehen\ndas Buch\n"


@pytest.mark.long
def test_six_sentences_are_known_by_heart(tmp_path):
    """Measured: all six, word for word, and 0.02 nats a byte, after 150 steps."""
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.en").write_text(ENGLISH, encoding="utf-8")
        (tmp_path / f"{part}.de").write_text(GERMAN, encoding="utf-8")
    result = etude.run(
        "sequence/transformer", preset="tiny", out=tmp_path / "run", seed=0, threads=1, quiet=True, data=str(tmp_path),
        vocabulary=256, longest=40, width=32, steps=150, warmup_steps=50, smoothing=0.0, evaluate_every=0,
    )  # fmt: skip
    assert result.metrics["test_exact_match"] == 1.0
    assert result.metrics["test_bleu"] > 99
    assert result.metrics["test_nats_per_token"] < 0.05
