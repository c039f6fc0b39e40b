"""A recurrent network that gives each word of a sentence a tag, its vocabulary and its batches.

Legend: B sentences, T words of the longest, W different words of a batch, C letters of the longest, K tags, D width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.blocks.nn.recurrent import Cell, Recurrent
from etude.blocks.tokens.spans import are_spans, span_f1
from etude.data.tagged import UNKNOWN, Sentence

__all__ = ["Batch", "Lexicon", "Tagger", "answers", "collate", "score", "share", "words_of"]

LONGEST = 20
"""Letters of a word that are read: of a longer one the last."""


@dataclass(frozen=True)
class Lexicon:
    """The words and letters of the training part; number 0 is any other one. `rare` words were seen once."""

    words: tuple[str, ...]
    letters: str
    rare: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sentences: Iterable[Sentence]) -> Lexicon:
        count = Counter(word for sentence in sentences for word in sentence.words)
        words = tuple(sorted(count))
        rare = frozenset(number for number, word in enumerate(words, 1) if count[word] == 1)
        return cls(words, "".join(sorted({letter for word in words for letter in word})), rare)

    def state(self) -> dict[str, Any]:
        """JSON values from which `Lexicon(**state)` comes back, without the rare ones."""
        return {"words": list(self.words), "letters": self.letters}

    @cached_property
    def numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        """The number of each word and of each letter."""
        return {w: n for n, w in enumerate(self.words, 1)}, {a: n for n, a in enumerate(self.letters, 1)}


class Batch(NamedTuple):
    """words (B, T), lengths (B,), tags (B, T); spelled (W, C), spelled_lengths (W,), and which of them each word is (B, T)."""

    words: Tensor
    lengths: Tensor
    tags: Tensor
    spelled: Tensor
    spelled_lengths: Tensor
    which: Tensor


def collate(sentences: Sequence[Sentence], lexicon: Lexicon) -> Batch:
    """Side by side, padded with 0 behind each end (tags with UNKNOWN); every different word is spelled once."""
    number, letter = lexicon.numbers
    different = {word: place for place, word in enumerate(dict.fromkeys(w for s in sentences for w in s.words))}

    def rows(lists: Iterable[list[int]], fill: int = 0) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in lists], batch_first=True, padding_value=fill)

    spellings = [[letter.get(a, 0) for a in word[-LONGEST:]] for word in different]
    return Batch(
        rows([number.get(word, 0) for word in s.words] for s in sentences),
        torch.tensor([len(s.words) for s in sentences]),
        rows((list(s.tags) for s in sentences), UNKNOWN),
        rows(spellings),
        torch.tensor([len(row) for row in spellings]),
        rows([different[word] for word in s.words] for s in sentences),
    )


class Tagger(nn.Module):
    """A vector of each word, and one of its letters → recurrent layers, in one direction or both → logits of its tag.

    The letters are read by an LSTM of their own in both directions; its two last outputs stand beside the word's vector.
    """

    def __init__(
        self,
        words: int,
        letters: int,
        classes: int,
        cell: Cell,
        embedding: int,
        spelling: int,
        width: int,
        layers: int,
        *,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(words + 1, embedding), nn.Dropout(dropout)
        if spelling:
            self.letters = nn.Embedding(letters + 1, spelling)
            self.spelling = Recurrent("lstm", spelling, spelling, bidirectional=True)
        self.recurrent = Recurrent(
            cell, embedding + 2 * spelling, width, layers, bidirectional=bidirectional, dropout=dropout
        )
        self.readout = nn.Linear(width * (1 + bidirectional), classes)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, K); behind the end of a sentence they mean nothing."""
        x = self.embedding(batch.words)
        if hasattr(self, "spelling"):
            _, (last, _) = self.spelling(self.letters(batch.spelled), None, batch.spelled_lengths)
            x = torch.cat([x, torch.cat([last[0], last[1]], -1)[batch.which]], -1)
        h, _ = self.recurrent(self.dropout(x), None, batch.lengths)
        return self.readout(self.dropout(h))


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; lengths stay on the CPU, where packing wants them."""
    kept = {"lengths", "spelled_lengths"}
    return Batch(*(part if name in kept else part.to(device) for name, part in zip(Batch._fields, batch)))


@torch.no_grad()
def answers(model: Tagger, sentences: Sequence[Sentence], lexicon: Lexicon) -> list[list[int]]:
    """The most probable tag of each word; sentences of like length are read together."""
    device, training = model.readout.weight.device, model.training
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].words))
    said: list[list[int]] = [[]] * len(sentences)
    model.eval()
    for begin in range(0, len(order), 64):
        part = order[begin : begin + 64]
        best = model(moved(collate([sentences[i] for i in part], lexicon), device)).argmax(-1).tolist()
        for i, row in zip(part, best):
            said[i] = row[: len(sentences[i].words)]
    model.train(training)
    return said


def share(sentences: Sequence[Sentence], said: Sequence[Sequence[int]], words: Iterable[str] | None = None) -> float:
    """Share of the words whose tag is right, of those whose tag is known and, where given, that are not among `words`."""
    known = frozenset(() if words is None else words)
    pairs = [
        (true, tag)
        for sentence, tags in zip(sentences, said)
        for word, true, tag in zip(sentence.words, sentence.tags, tags)
        if true != UNKNOWN and word not in known
    ]
    return sum(true == tag for true, tag in pairs) / max(1, len(pairs))


def score(
    sentences: Sequence[Sentence], said: Sequence[Sequence[int]], classes: Sequence[str], lexicon: Lexicon
) -> dict[str, float]:
    """Accuracy over all words and, where there are any, over those that the training part does not show; of spans the F1."""
    found, known = {"accuracy": share(sentences, said)}, frozenset(lexicon.words)
    if any(tag != UNKNOWN and word not in known for s in sentences for word, tag in zip(s.words, s.tags)):
        found["new_word_accuracy"] = share(sentences, said, known)
    if are_spans(classes):
        names = [*classes, "O"]
        told = [
            ([names[t] if t != UNKNOWN else "O" for t in s.tags], [names[t] for t in tags])
            for s, tags in zip(sentences, said)
        ]
        found["span_f1"] = span_f1(told)
    return found


def words_of(text: str) -> Iterator[tuple[str, ...]]:
    """The words and marks of each line of a text; n't, 's and their like are words of their own, as in the treebanks."""
    for line in text.split("\n"):
        if words := re.findall(r"\w+(?=n['’]t\b)|n['’]t\b|['’]\w+|\w+(?:[-.]\w+)*|[^\w\s]", line):
            yield tuple(words)
