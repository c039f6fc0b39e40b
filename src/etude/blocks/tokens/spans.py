"""Spans of words that tags B-kind, I-kind and O mark, and the F1 by which they are scored.

A span begins at B-, and at an I- whose kind is not that of the span before it; so CoNLL's official script and seqeval read
tags that do not fit together. A span counts where its kind, its first and its last word are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["are_spans", "span_f1", "spans"]

Span = tuple[str, int, int]


def are_spans(classes: Sequence[str]) -> bool:
    """Whether these tags mark spans: O, and B- or I- before a kind, nothing else."""
    return any(tag[:2] == "B-" or tag[:2] == "I-" for tag in classes) and all(
        tag == "O" or tag[:2] in ("B-", "I-") for tag in classes
    )


def spans(tags: Sequence[str]) -> list[Span]:
    """(kind, first word, last word) of each span."""
    found: list[Span] = []
    kind = ""
    for place, tag in enumerate(tags):
        here = "" if tag == "O" else tag[2:]
        if tag != "O" and (tag[0] == "B" or kind != here or not found or found[-1][2] != place - 1):
            found.append((here, place, place))
        elif tag != "O":
            found[-1] = (here, found[-1][1], place)
        kind = here
    return found


def span_f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """F1 over all spans of (true, said) tags of sentences: 2·right / (true + said), 0 where there is none."""
    right = true = said = 0
    for truth, answer in pairs:
        one, two = set(spans(truth)), set(spans(answer))
        right, true, said = right + len(one & two), true + len(one), said + len(two)
    return 2 * right / (true + said) if right else 0.0
