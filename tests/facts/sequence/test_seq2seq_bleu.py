"""BLEU and its words equal sacrebleu's, on hand cases, on random corpora and on Multi30k."""

from __future__ import annotations

import random

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from etude import data
from etude.sequence.parts.bleu import bleu, words

THEIRS = Tokenizer13a()


def reference_bleu(translations, references):
    """sacrebleu wants its references by place: all first ones, all second ones, None where a sentence has fewer."""
    most = max(len(several) for several in references)
    by_place = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    return sacrebleu.corpus_bleu(translations, by_place).score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs $1,000.50, i.e. 3-4 dollars.", ["It", "costs", "$", "1,000.50", ",", "i", ".", "e", ".", "3", "-", "4", "dollars", "."]),
        ("Der Hund (braun) läuft -- weit weg!", ["Der", "Hund", "(", "braun", ")", "läuft", "--", "weit", "weg", "!"]),
        ("&quot;A&amp;B&quot; <skipped>isn't", ['"', "A", "&", "B", '"', "isn't"]),
        ("l'homme «a»…", ["l'homme", "«a»…"]),
        ("", []),
    ],
)  # fmt: skip
def test_words(text, expected):
    assert words(text) == expected == THEIRS(text).split()


@settings(max_examples=300)
@given(st.text(alphabet=st.sampled_from("ab Z09.,-'\"&;<>$/\\[]{}()!?_^`~@#%*+=|:é„ \n\t"), max_size=30))
def test_words_equal_sacrebleu(text):
    assert words(text) == THEIRS(text).split()


@pytest.mark.parametrize(
    ("translations", "references"),
    [
        (["the cat sat on the mat"], [["the cat sat on the mat"]]),
        (["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]]),  # clipped
        (["a b c d", "e f g h i"], [["a b c d e", "a b c"], ["e f g h"]]),  # equally near: the shorter
        (["a b c d e f"], [["a b c d e f g h", "a b c d"]]),
        (["a x b y c z"], [["a b c d e f"]]),  # pairs, triples and quadruples without a match
        (["a b x c d e y"], [["a b c d e"]]),
        (["x y z w v"], [["a b c d e"]]),  # no match at all: 0
        (["a b c"], [["a b c"]]),  # no four words: 0
        (["", "a b c d e"], [["a"], ["a b c d e"]]),
        ([""], [["a b c d"]]),
        (["a b c d"], [["a b c d e f g h i j"]]),  # brevity
    ],
)
def test_hand_cases_equal_sacrebleu(translations, references):
    assert bleu(translations, references) == pytest.approx(reference_bleu(translations, references), abs=1e-9)


def test_random_corpora_equal_sacrebleu():
    """Texts of few words, so that every number of matches occurs, with one to three references."""
    draw = random.Random(0)

    def sentence():
        return " ".join(draw.choice(["a", "b", "c,", "d.", "5-6"]) for _ in range(draw.randint(0, 9)))

    for _ in range(60):
        count = draw.randint(1, 4)
        references = [[sentence() or "a" for _ in range(draw.randint(1, 3))] for _ in range(count)]
        translations = [sentence() for _ in range(count)]
        assert bleu(translations, references) == pytest.approx(reference_bleu(translations, references), abs=1e-9)


def test_multi30k_equals_sacrebleu():
    """The German test with words left out and swapped: a corpus of the length that is reported."""
    draw, targets = random.Random(1), [target for _, target in data.parallel("multi30k").test]
    spoiled = []
    for target in targets:
        parts = [part for part in target.split() if draw.random() > 0.15]
        if len(parts) > 3 and draw.random() < 0.5:
            parts[1], parts[2] = parts[2], parts[1]
        spoiled.append(" ".join(parts))
    ours = bleu(spoiled, [[target] for target in targets])
    assert ours == pytest.approx(sacrebleu.corpus_bleu(spoiled, [targets]).score, abs=1e-9)
    assert 30 < ours < 90


def test_the_sum_is_over_the_corpus():
    """BLEU is no mean of sentences, and does not depend on their order."""
    pairs = [("a b c d e", ["a b c d e"]), ("x b c d q r", ["a b c d e f g"])]
    whole = bleu(*zip(*pairs))
    assert whole == pytest.approx(bleu(*zip(*pairs[::-1])), abs=1e-12)
    assert whole != pytest.approx(sum(bleu([t], [r]) for t, r in pairs) / 2, abs=1)


@pytest.mark.parametrize("wrong", [(["a"], []), (["a"], [[]])])
def test_every_translation_needs_a_reference(wrong):
    with pytest.raises(ValueError, match="as many lists of references"):
        bleu(*wrong)
