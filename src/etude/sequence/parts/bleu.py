"""BLEU of a corpus, on the words of the mteval-v13a script: what sacrebleu reports with its default settings.

Papers: Papineni et al., 2002 (BLEU); Post, 2018, arXiv:1804.08771 (why the words must be cut by the metric itself).

Equation: BLEU = 100·min(1, e^(1 − r/c))·(Π_{n=1..4} p_n)^{1/4},  p_n = clipped matches of n words / n-tuples of the translations

Summed over the whole corpus before anything is divided. c counts the words of the translations, r those of the reference that is
nearest in length (of two equally near the shorter). The i-th p_n without a match counts as 1/(2^i · n-tuples); without a single
matching word, or without four words in a row, BLEU is 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["bleu", "words"]

ORDERS = (1, 2, 3, 4)
_NAMED = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_MARKS = re.compile(r"([!-&(-+/:-@\[-`{-~])")  # of the ASCII marks, all but ' , - .
_POINTS = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
)  # 1,000.5 stays whole
_DASH = re.compile(r"([0-9])(-)")


def words(text: str) -> list[str]:
    """The words of a sentence as mteval-v13a cuts them; case stays, and so does what is no ASCII mark."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, mark in _NAMED:
        text = text.replace(name, mark)
    text = _MARKS.sub(r" \1 ", f" {text} ")
    for pattern, spaced in _POINTS:
        text = pattern.sub(spaced, text)
    return _DASH.sub(r"\1 \2 ", text).split()


def bleu(translations: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU, 0 to 100, of N translations with one or several references each (N lists)."""
    if len(translations) != len(references) or not all(references):
        raise ValueError(f"{len(translations)} translations need as many lists of references, none of them empty")
    matches, tuples, length, nearest = [0] * len(ORDERS), [0] * len(ORDERS), 0, 0
    for translation, several in zip(translations, references):
        ours, theirs = words(translation.rstrip()), [words(reference.rstrip()) for reference in several]
        length += len(ours)
        nearest += min((abs(len(reference) - len(ours)), len(reference)) for reference in theirs)[1]
        for i, n in enumerate(ORDERS):
            allowed: Counter[tuple[str, ...]] = Counter()
            for reference in theirs:
                allowed |= _tuples(reference, n)
            tuples[i] += max(0, len(ours) - n + 1)
            matches[i] += (_tuples(ours, n) & allowed).total()
    if not matches[0] or not all(tuples):
        return 0.0
    missed, logs = 1, 0.0
    for matched, count in zip(matches, tuples):
        missed *= 1 if matched else 2
        logs += math.log((matched or 1 / missed) / count)
    return 100 * min(1.0, math.exp(1 - nearest / length)) * math.exp(logs / len(ORDERS))


def _tuples(of: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(of[i : i + n]) for i in range(len(of) - n + 1))
