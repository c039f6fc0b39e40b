"""What needs no recurrent network, or puts a null into its place: tags of words alone, features of other images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from etude.data.tagged import Sentence

__all__ = ["commonest_tags", "linear_tags", "of_other_images"]


def commonest_tags(train: Sequence[Sentence], test: Sequence[Sentence]) -> list[list[int]]:
    """Each word's commonest tag; that of its longest known ending for a word that the training part does not show."""
    counts: dict[str, Counter[int]] = {}
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.tags):
            for key in (f"={word}", *(word[i:] for i in range(len(word) + 1))):
                counts.setdefault(key, Counter())[tag] += 1
    best = {key: min(count, key=lambda tag: (-count[tag], tag)) for key, count in counts.items()}

    def said(word: str) -> int:
        return best[next(key for key in (f"={word}", *(word[i:] for i in range(len(word) + 1))) if key in best)]

    return [[said(word) for word in sentence.words] for sentence in test]


def linear_tags(train: Sequence[Sentence], test: Sequence[Sentence]) -> list[list[int]]:
    """Multinomial logistic regression on the word: itself, in small letters, its last one to four letters, its capitals."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier

    def features(sentences: Sequence[Sentence]) -> Any:
        return FeatureHasher(1 << 18, input_type="string", alternate_sign=False).transform(
            [word, word.lower(), *(f"-{word[-k:].lower()}" for k in range(1, 5)), f"{word[:1].isupper()} {place == 0}"]
            for sentence in sentences
            for place, word in enumerate(sentence.words)
        )

    tags = np.array([tag for sentence in train for tag in sentence.tags])
    if len(np.unique(tags)) < 2:
        return [[int(tags[0])] * len(sentence.words) for sentence in test]
    model: Any = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=5, tol=None, random_state=0, average=True)  # type: ignore[arg-type]
    answers = iter(model.fit(features(train), tags).predict(features(test)).tolist())
    return [[next(answers) for _ in sentence.words] for sentence in test]


def of_other_images(model: Any, images: Tensor) -> Tensor:
    """`look` of the captioner, each image given the features of the one before it in the batch."""
    return model.cnn(images).roll(1, 0)
