"""What word2vec learns from: words and their counts, which occurrences are kept, pairs of neighbours, noise words.

Legend: N words of the text, V words of the vocabulary, B centres of a batch, P pairs, K noise words of a pair.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from etude.language.word2vec import kernels

__all__ = ["Noise", "Vocabulary", "keep_probability", "neighbours", "noise_probability", "split_words"]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def split_words(text: str) -> list[str]:
    """Lower-case words in their order: runs of letters, with apostrophes inside."""
    return _WORD.findall(text.lower())


class Vocabulary:
    """The words that occur at least `least_count` times in `text`, the most frequent first (ties by spelling).

    `words` are their spellings, `counts` (V,) int64 how often each occurs, `number[word]` its place.
    """

    def __init__(self, text: list[str], least_count: int = 1) -> None:
        found = [(word, count) for word, count in Counter(text).items() if count >= least_count]
        found.sort(key=lambda item: (-item[1], item[0]))
        self.words = [word for word, _ in found]
        self.counts = torch.tensor([count for _, count in found], dtype=torch.int64)
        self.number = {word: place for place, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: list[str]) -> Tensor:
        """(N,) int32; words that are not known are left out, as if the text did not have them."""
        known = self.number
        return torch.tensor([known[word] for word in text if word in known], dtype=torch.int32)


def keep_probability(counts: Tensor, threshold: float) -> Tensor:
    """Probability (V,) float64 with which an occurrence of each word is kept: min(1, √(t/f) + t/f), f its frequency.

    A threshold t of 0 keeps all. (The paper prints √(t/f); the released program, and gensim, compute this.)
    """
    if threshold == 0:
        return torch.ones(len(counts), dtype=torch.float64)
    ratio = threshold * counts.sum() / counts.double()
    return (ratio.sqrt() + ratio).clamp(max=1)


def noise_probability(counts: Tensor, power: float) -> Tensor:
    """P_n(w) ∝ count(w)^power, (V,) float64."""
    weight = counts.double() ** power
    return weight / weight.sum()


class Noise:
    """Draws from P_n in constant time (Walker's alias method): a uniform word w, kept with `share[w]`, else `alias[w]`.

    `share` (V,) uint64 counts in 2⁻³²; a draw is a function of a key and its number, so nothing has to be saved.
    `threads` find pairs; the numbers do not depend on how many.
    """

    def __init__(self, probability: Tensor, threads: int = 1) -> None:
        self.threads = threads
        count = len(probability)
        left = (probability.double() * count).tolist()
        self.alias, share = np.arange(count, dtype=np.int32), np.ones(count)
        low = [w for w in range(count) if left[w] < 1]
        high = [w for w in range(count) if left[w] >= 1]
        while low and high:
            poor, rich = low.pop(), high[-1]
            share[poor], self.alias[poor] = left[poor], rich
            left[rich] -= 1 - left[poor]
            if left[rich] < 1:
                low.append(high.pop())
        self.share = np.minimum(np.rint(share * 2**32), 2**32).astype(np.uint64)

    def draw(self, count: int, key: int) -> Tensor:
        """(count,) int32 words of the stream that `key` names."""
        return torch.from_numpy(kernels.draw(count, key, self.share, self.alias))


def neighbours(
    text: Tensor, first: int, last: int, reach: Tensor, noise: Noise | None = None, negatives: int = 0, key: int = 0
) -> tuple[Tensor, Tensor]:
    """The pairs whose centres are text[first:last]: context j of centre i where 0 < |i − j| ≤ reach[i].

    Args:
        text: (N,) int32; no pair reaches over its ends.
        reach: (last − first,) int64, the words on each side of a centre that are its contexts.
        noise, negatives, key: K noise words for each pair, drawn from the stream of `key`.

    Returns:
        centre (P,) int32, counted from `first`, ascending; targets (P, 1 + K) int32: the context, then noise words.
    """
    noise = noise or Noise(torch.ones(1))
    centre, targets = kernels.pairs(
        text.numpy(), first, last, reach.numpy(), negatives, key, noise.share, noise.alias, noise.threads
    )  # fmt: skip
    return torch.from_numpy(centre), torch.from_numpy(targets)
