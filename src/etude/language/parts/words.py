"""Tags of words that need no network, shares of words, and the words of a text."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from etude.language.parts import elmo
from etude.language.parts.tasks import Item

__all__ = ["commonest_tags", "linear_tags", "share", "shuffled", "words_of"]

IGNORED = -100
"""The tag of a word that is not asked."""


def commonest_tags(train: Sequence[Item], test: Sequence[Item]) -> list[list[int]]:
    """Each word's commonest tag; the commonest of all for a word that the training part does not show."""
    every = Counter(tag for item in train for tag in item.tags)
    counts: dict[str, Counter[int]] = {}
    for item in train:
        for word, tag in zip(item.first, item.tags):
            counts.setdefault(word, Counter())[tag] += 1
    best = {word: min(count, key=lambda tag: (-count[tag], tag)) for word, count in counts.items()}
    other = min(every, key=lambda tag: (-every[tag], tag))
    return [[best.get(word, other) for word in item.first] for item in test]


def linear_tags(train: Sequence[Item], test: Sequence[Item]) -> list[list[int]]:
    """Multinomial logistic regression on the word: itself, in small letters, its last one to four letters, its capital."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier

    def features(items: Sequence[Item]) -> Any:
        return FeatureHasher(1 << 18, input_type="string", alternate_sign=False).transform(
            [word, word.lower(), *(f"-{word[-k:].lower()}" for k in range(1, 5)), f"{word[:1].isupper()} {place == 0}"]
            for item in items
            for place, word in enumerate(item.first)
        )

    tags = np.array([tag for item in train for tag in item.tags])
    if len(np.unique(tags)) < 2:
        return [[int(tags[0])] * len(item.first) for item in test]
    model: Any = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=20, tol=None, random_state=0, average=True)  # type: ignore[arg-type]
    said = iter(model.fit(features(train), tags).predict(features(test)).tolist())
    return [[next(said) for _ in item.first] for item in test]


def share(items: Sequence[Item], said: Sequence[Sequence[int]], known: Iterable[str] = ()) -> float:
    """Share of the words whose tag is right, of those that are asked and not `known`; 0 where there is none."""
    left_out = frozenset(known)
    pairs = [
        (true, tag)
        for item, tags in zip(items, said)
        for word, true, tag in zip(item.first, item.tags, tags)
        if true != IGNORED and word not in left_out
    ]
    return sum(true == tag for true, tag in pairs) / max(1, len(pairs))


def words_of(text: str) -> tuple[str, ...]:
    """Words and marks; n't, 's and their like are words of their own, as in the treebanks."""
    return tuple(re.findall(r"\w+(?=n['’]t\b)|n['’]t\b|['’]\w+|\w+(?:[-.]\w+)*|[^\w\s]", text))


def shuffled(sentences: Sequence[Sequence[str]], lexicon: elmo.Lexicon) -> elmo.Batch:
    """`collate` of sentences whose words have lost their order, always the same way: a control."""
    mixed = []
    for words in sentences:
        dice = torch.Generator().manual_seed(zlib.crc32(" ".join(words).encode()))
        order = torch.randperm(len(words), generator=dice)
        mixed.append([words[i] for i in order.tolist()])
    return elmo.collate(mixed, lexicon)
