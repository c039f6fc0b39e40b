"""The tagger: what a word means is said before and behind it, and by the letters of names that are new."""

from __future__ import annotations

import etude


def learn(folder, **settings):
    return etude.run(
        "sequence/tagger", out=folder, seed=0, quiet=True, threads=1, width=24, embedding=24, spelling=8, steps=150,
        learning_rate=0.02, training_examples=500, evaluate_every=0, **settings,
    )  # fmt: skip


def test_words_get_their_tags_from_both_sides(tmp_path):
    """Measured 1.00; forwards only 0.91, each word's commonest tag 0.88."""
    result, forwards = learn(tmp_path / "both"), learn(tmp_path / "one", bidirectional=False)
    assert result.metrics["test_accuracy"] > 0.98
    assert forwards.metrics["test_accuracy"] < 0.95
    assert result.metrics["test_commonest_accuracy"] < 0.92
    told = etude.sample(result.folder, text="Rano they walk the dear Fela").text.split()
    assert told[1::2] == ["M", "M", "VERB", "WORD", "F", "F"]
