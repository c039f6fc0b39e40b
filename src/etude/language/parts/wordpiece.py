"""WordPiece: words in pieces of a fixed vocabulary, greedily the longest first; learned here, or read from a vocab.txt.

Paper: Schuster and Nakajima, "Japanese and Korean Voice Search", 2012; Wu et al., 2016, arXiv:1609.08144, section 4.1; for BERT:
Devlin et al., 2018, arXiv:1810.04805. Pieces are learned as byte pairs are, by joining the most frequent neighbours.
"""

from __future__ import annotations

import heapq
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.core.errors import UserError

__all__ = ["SPECIALS", "WordPiece"]

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST = 100
"""Characters of a word; a longer one is unknown."""


class WordPiece:
    """A tokenizer (see `etude.blocks.tokens.text`); `tokens[i]` is the spelling of token i, "##…" where it goes on a word.

    Args:
        tokens: all spellings; the five of `SPECIALS` are among them.
        lower: letters are made small and lose their accents (an "uncased" vocabulary).
    """

    def __init__(self, tokens: Iterable[str], lower: bool = True) -> None:
        self.tokens, self.lower = list(tokens), lower
        self.number = {token: place for place, token in enumerate(self.tokens)}
        absent = [token for token in SPECIALS if token not in self.number]
        if absent:
            raise UserError(f"this vocabulary has no {', '.join(absent)}, so it is none of BERT's kind")
        self.pad, self.unknown, self.cls, self.sep, self.mask = (self.number[token] for token in SPECIALS)
        self.specials = torch.tensor([self.number[token] for token in SPECIALS])
        self._known: dict[str, list[int]] = {}
        self._characters: dict[int, str] = {}

    @classmethod
    def learn(cls, text: str, size: int, lower: bool = True) -> WordPiece:
        """Join the most frequent pair of neighbouring pieces in the words of `text` until there are `size` tokens.

        Ties go to the pair first in the alphabet. Fewer tokens come out where no pair occurs twice. Raises UserError where
        `size` does not even hold the characters of the text.
        """
        counts = Counter(cls(SPECIALS, lower).words(text))
        spelled = [[word[0], *("##" + letter for letter in word[1:])] for word in counts]
        often = list(counts.values())
        letters = sorted({piece for word in spelled for piece in word})
        if size < len(letters) + len(SPECIALS):
            raise UserError(
                f"the text has {len(letters)} characters as words begin or go on with them, and there are 5 special tokens: "
                f"a vocabulary of {size} is too small"
            )
        pairs: Counter[tuple[str, str]] = Counter()
        where: dict[tuple[str, str], set[int]] = defaultdict(set)
        for place, word in enumerate(spelled):
            for pair in itertools.pairwise(word):
                pairs[pair] += often[place]
                where[pair].add(place)
        tokens = [*SPECIALS, *letters]
        known = set(tokens)
        heap = [(-count, pair) for pair, count in pairs.items()]  # an entry whose count has changed is passed over
        heapq.heapify(heap)
        while len(tokens) < size and heap:
            count, best = heapq.heappop(heap)
            if -count != pairs[best]:
                continue
            if count > -2:
                break
            joined = best[0] + best[1].removeprefix("##")
            changed = set()
            for place in sorted(where[best]):
                word, times, at = spelled[place], often[place], 0
                for pair in itertools.pairwise(word):
                    pairs[pair] -= times
                    where[pair].discard(place)
                    changed.add(pair)
                while at < len(word) - 1:
                    if (word[at], word[at + 1]) == best:
                        word[at : at + 2] = [joined]
                    at += 1
                for pair in itertools.pairwise(word):
                    pairs[pair] += times
                    where[pair].add(place)
                    changed.add(pair)
            for pair in changed:
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
            if joined not in known:
                known.add(joined)
                tokens.append(joined)
        return cls(tokens, lower)

    @classmethod
    def load(cls, path: Path | str, lower: bool = True) -> WordPiece:
        """Read a vocab.txt: a token a line. Raises UserError for a file that is none."""
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as a vocabulary ({error})") from error
        return cls([line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)], lower)

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def words(self, text: str) -> list[str]:
        """The words of a text: split at spaces, round each mark of punctuation and each Chinese character."""
        table = self._characters
        for letter in set(text):
            if ord(letter) not in table:
                table[ord(letter)] = _written(letter, self.lower)
        return text.translate(table).split()

    def pieces(self, word: str) -> list[int]:
        """Token numbers of one word (of `words`): the longest known beginning, again and again; else the unknown token."""
        if word not in self._known:
            self._known[word] = self._cut(word)
        return self._known[word]

    def encode(self, text: str) -> Tensor:
        """(N,) int64, without special tokens but for each "[MASK]" that the text spells out."""
        ids: list[int] = []
        for number, part in enumerate(text.split("[MASK]")):
            if number:
                ids.append(self.mask)
            for word in self.words(part):
                ids += self.pieces(word)
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Words with a space between them; pieces joined."""
        spelled = (self.tokens[int(i)] for i in (ids.tolist() if isinstance(ids, Tensor) else ids))
        return "".join(token[2:] if token.startswith("##") else " " + token for token in spelled).lstrip()

    def state(self) -> dict[str, Any]:
        """JSON-able; `WordPiece(state["tokens"], state["lower"])` is the tokenizer again."""
        return {"kind": "wordpiece", "tokens": self.tokens, "lower": self.lower}

    def _cut(self, word: str) -> list[int]:
        if len(word) > LONGEST:
            return [self.unknown]
        ids, begin = [], 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                found = self.number.get(("##" if begin else "") + word[begin:end])
                if found is not None:
                    ids.append(found)
                    begin = end
                    break
            else:
                return [self.unknown]
        return ids


def _written(letter: str, lower: bool) -> str:
    """What stands for one character: nothing for a control, a space for spaces, spaces round what stands alone."""
    kind, code = unicodedata.category(letter), ord(letter)
    if letter in "\t\n\r" or kind == "Zs":
        return " "
    if code in (0, 0xFFFD) or kind in ("Cc", "Cf", "Cn", "Co"):
        return ""
    if any(low <= code <= high for low, high in _CHINESE):
        return f" {letter} "
    if lower:
        letter = "".join(
            part for part in unicodedata.normalize("NFD", letter) if unicodedata.category(part) != "Mn"
        ).lower()
    return "".join(f" {part} " if _is_mark(part) else part for part in letter)


def _is_mark(letter: str) -> bool:
    """Punctuation: every ASCII sign that is no letter, digit or space, and Unicode's classes P."""
    code = ord(letter)
    return (33 <= code <= 126 and not letter.isalnum()) or unicodedata.category(letter).startswith("P")


_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
"""The blocks of characters that BERT's tokenizer sets apart, its odd 2B920 included."""
