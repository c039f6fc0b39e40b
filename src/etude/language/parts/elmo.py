"""ELMo's network: words from their letters, a language model in each direction over them, and a mixture of its layers.

Papers: Peters et al., 2018, arXiv:1802.05365; Kim et al., 2016, arXiv:1508.06615 (convolutions over letters); Srivastava et al.,
2015, arXiv:1505.00387 (highway layers); Sak et al., 2014, arXiv:1402.1128 (an LSTM whose output is projected).

Legend: B sentences, T words of the longest and its two marks, R words of a batch with theirs, W different words of a batch, C
letters of the longest, V words that are predicted, P length of a word's vector and of a state, L layers of each direction.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.affine import Linear

__all__ = ["Architecture", "Batch", "BiLM", "Highway", "Lexicon", "Mixture", "Spelled", "backwards", "collate"]

UNKNOWN, BEGIN, END = 0, 1, 2
"""Numbers of the words: any that is not among the V; the marks around a sentence."""
SIGNS = 6
"""Numbers of letters below those of the alphabet: 0 none, 1 any other, 2 and 3 around a word, 4 and 5 the marks of a sentence."""
LONGEST = 48
"""Letters of a word that are read: of a longer one the last."""


@dataclass(frozen=True)
class Lexicon:
    """The words that are predicted, the commonest of the training part, and the letters of all its words."""

    words: tuple[str, ...]
    letters: str

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]], most: int) -> Lexicon:
        """At most `most` words; equally common ones by the alphabet."""
        count = Counter(word for sentence in sentences for word in sentence)
        words = sorted(count, key=lambda word: (-count[word], word))[:most]
        return cls(tuple(words), "".join(sorted({letter for word in count for letter in word})))

    def state(self) -> dict[str, Any]:
        """JSON values from which `Lexicon(**state)` comes back."""
        return {"words": list(self.words), "letters": self.letters}

    @property
    def size(self) -> int:
        """V: the words, the unknown one and the two marks."""
        return len(self.words) + 3

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each word."""
        return {word: number for number, word in enumerate(self.words, 3)}

    @cached_property
    def _letters(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(self.letters, SIGNS)}

    def spell(self, word: str) -> list[int]:
        """The numbers of its letters between the signs of a word's begin and end."""
        return [2, *(self._letters.get(letter, 1) for letter in word[-LONGEST:]), 3]


class Batch(NamedTuple):
    """Sentences between their marks, words (B, T), PADDED behind with 0 and as many as lengths (B,) says, marks included;
    spelled (W, C), the letters of the different words, 0 behind each, and which of them stands where (B, T)."""

    words: Tensor
    lengths: Tensor
    spelled: Tensor
    which: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device) for part in self))

    @property
    def mask(self) -> Tensor:
        """(B, T), True at words and marks."""
        return torch.arange(self.words.shape[1], device=self.words.device) < self.lengths[:, None]

    @property
    def inside(self) -> Tensor:
        """(B, T), True at words: without the marks."""
        places = torch.arange(self.words.shape[1], device=self.words.device)
        return (places > 0) & (places < self.lengths[:, None] - 1)


def collate(sentences: Sequence[Sequence[str]], lexicon: Lexicon) -> Batch:
    """Sentences side by side; every different word is spelled once, the marks as words of one sign of their own."""
    numbers = lexicon.numbers
    different = {word: place for place, word in enumerate(dict.fromkeys(w for s in sentences for w in s), 2)}

    def rows(lists: Iterable[list[int]]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in lists], batch_first=True)

    return Batch(
        rows([BEGIN, *(numbers.get(word, UNKNOWN) for word in s), END] for s in sentences),
        torch.tensor([len(s) + 2 for s in sentences]),
        rows([[2, 4, 3], [2, 5, 3], *map(lexicon.spell, different)]),
        rows([0, *(different[word] for word in s), 1] for s in sentences),
    )


@dataclass(frozen=True)
class Architecture:
    """What a network is made of; with the weights and the lexicon, all that is needed to run it."""

    words: int
    letters: int
    read: Literal["letters", "words"]
    spelling: int
    filters: tuple[int, ...]
    highways: int
    width: int
    projection: int
    layers: int
    dropout: float


class Highway(nn.Module):
    """x ← t⊙max(0, Wx + b) + (1 − t)⊙x with t = σ(W'x + b'); b' starts at −2, so that x passes at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.gate = Linear(width, width), Linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.transform(x).relu(), self.gate(x).sigmoid())


class Spelled(nn.Module):
    """Letters (W, C) → vectors (W, P): convolutions, their maxima over the word, highway layers, a projection.

    `filters[k]` filters look at k + 1 neighbouring letters, the signs around the word among them, and only at windows inside the
    word; a word that is shorter than a window has one, filled up with nothing.
    """

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.letters = nn.Embedding(of.letters + SIGNS, of.spelling, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(of.spelling, count, size) for size, count in enumerate(of.filters, 1) if count
        )
        total = sum(of.filters)
        self.highways = nn.Sequential(*(Highway(total) for _ in range(of.highways)))
        self.projection = Linear(total, of.projection)

    def forward(self, spelled: Tensor) -> Tensor:
        lengths = (spelled > 0).sum(1, keepdim=True)
        x = self.letters(spelled).transpose(1, 2)
        found = []
        for convolution in self.convolutions:
            size: int = convolution.weight.shape[2]  # type: ignore[index]
            seen = convolution(F.pad(x, [0, max(0, size - x.shape[2])]))
            outside = torch.arange(seen.shape[2], device=seen.device) > (lengths - size).clamp(min=0)
            found.append(seen.masked_fill(outside[:, None], -torch.inf).amax(2))
        return self.projection(self.highways(torch.cat(found, 1).relu()))


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    """Each row of (B, T, …) with its first `lengths` places in the opposite order, the rest where it was; its own inverse."""
    places = torch.arange(x.shape[1], device=x.device)
    order = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


class BiLM(nn.Module):
    """Two language models that share the vectors of the words they read and the softmax over the words they predict.

    From the second layer on what a layer says is added to what it reads. Where P is less than the width, an LSTM's output is
    projected to P before it goes back into the LSTM and on to the next layer.
    """

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.of, self.dropout = of, nn.Dropout(of.dropout)
        self.spelled = Spelled(of) if of.read == "letters" else None
        self.embedding = nn.Embedding(of.words, of.projection) if of.read == "words" else None
        size = of.projection if of.projection < of.width else 0
        self.forwards, self.backwards = (
            nn.ModuleList(nn.LSTM(of.projection, of.width, batch_first=True, proj_size=size) for _ in range(of.layers))
            for _ in range(2)
        )
        self.readout = Linear(of.projection, of.words)

    def vectors(self, batch: Batch) -> Tensor:
        """What both directions read, (B, T, P): the context-free vector of each word and mark."""
        if self.spelled is None:
            assert self.embedding is not None
            return self.embedding(batch.words)
        return F.embedding(batch.which, self.spelled(batch.spelled))

    def forward(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(→h, ←h), each (B, T, P), of layer 0 (the vector x, twice) to L; behind a sentence's end they mean nothing.

        →h at t has read the words up to t, ←h those from t on.
        """
        x = self.dropout(self.vectors(batch))
        layers = [(x, x)]
        for ahead, back in zip(self.forwards, self.backwards):
            a, b = layers[-1]
            c, d = _read(ahead, a), backwards(_read(back, backwards(b, batch.lengths)), batch.lengths)
            if len(layers) > 1:
                c, d = c + a, d + b
            layers.append((self.dropout(c), self.dropout(d)))
        return layers

    def nats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """−log p of the word after each one and of the word before each one, both (R − B,): E. g. →p(w_{t+1} | w_{≤t}).

        Forwards all words and the closing mark are predicted, backwards all words and the opening one.
        """
        ahead, back = self(batch)[-1]
        known = batch.mask[:, 1:]  # of each pair of neighbours, whether there is one
        return (
            F.cross_entropy(_exact(self.readout(ahead[:, :-1][known])), batch.words[:, 1:][known], reduction="none"),
            F.cross_entropy(_exact(self.readout(back[:, 1:][known])), batch.words[:, :-1][known], reduction="none"),
        )

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """[→h; ←h] of all layers at the words of a batch, sentence by sentence: (words, L + 1, 2P), without dropout."""
        training = self.training
        self.eval()
        found = torch.stack([torch.cat(pair, -1) for pair in self(batch)], 2)[batch.inside]
        self.train(training)
        return found


def _read(lstm: Any, x: Tensor) -> Tensor:
    if not lstm.proj_size:
        return lstm(x)[0]
    with warnings.catch_warnings():  # oneDNN has no projections, and torch says once that it takes its own kernel
        warnings.filterwarnings("ignore", message="LSTM with projections")
        return lstm(x)[0]


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum over V in bfloat16 would lose digits


class Mixture(nn.Module):
    """ELMo = γ·Σ_j softmax(s)_j·h_j of layers (…, L + 1, D) → (…, D); `normalizer="layer"` sets each h_j to mean 0, variance 1.

    s starts at 0 (the mean of the layers) and γ at 1.
    """

    def __init__(self, layers: int, normalizer: Literal["none", "layer"] = "none") -> None:
        super().__init__()
        self.s, self.gamma, self.normalizer = (
            nn.Parameter(torch.zeros(layers)),
            nn.Parameter(torch.ones(())),
            normalizer,
        )

    def forward(self, layers: Tensor) -> Tensor:
        if self.normalizer == "layer":
            layers = F.layer_norm(layers, layers.shape[-1:])
        return self.gamma * torch.einsum("j,...jd->...d", self.s.softmax(0), layers)
