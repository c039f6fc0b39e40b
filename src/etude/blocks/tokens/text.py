"""From text to token numbers and back, and from a long row of tokens to training windows.

Papers: Sennrich et al., 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al., 2019 (on bytes, GPT-2).
A tokenizer here has `size`, `encode(text) -> (N,) int64`, `decode(ids) -> str` and `state()`, plain JSON from which
`tokenizer(state)` builds it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.core.extras import how

__all__ = ["UNKNOWN", "BytePairs", "Characters", "Tokenizer", "pieces", "starts", "tokenizer", "windows"]

UNKNOWN = "\ufffd"
"""Stands for what cannot be written: bytes that are no UTF-8, or a character that training never showed."""


class Tokenizer(Protocol):
    """What a language model needs from its tokenizer."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str) -> Tensor: ...
    def decode(self, ids: Tensor | Iterable[int]) -> str: ...
    def state(self) -> dict[str, Any]: ...


class Characters:
    """One token a character: token i is the i-th character of the sorted `alphabet`.

    Where the alphabet has U+FFFD, `encode(text, UNKNOWN)` writes it for every character that the alphabet has not.
    """

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError("the alphabet must hold at least one character and none twice")
        self.alphabet = "".join(sorted(alphabet))
        self._codes = np.frombuffer(self.alphabet.encode("utf-32-le"), dtype=np.uint32)

    @classmethod
    def of(cls, text: str) -> Characters:
        """The tokenizer whose alphabet is every character of `text`."""
        return cls("".join(set(text)))

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.alphabet)

    def encode(self, text: str, instead: str | None = None) -> Tensor:
        """(N,) int64. A character that is not in the alphabet becomes `instead`; without it, UserError names it."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).clip(max=self.size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if len(unknown) and instead is not None:
            ids[unknown] = self.alphabet.index(instead)
        elif len(unknown):
            raise UserError(
                f"the character {text[unknown[0]]!r} (position {unknown[0]}) does not occur in the text this "
                f"tokenizer was made from; it knows {self.alphabet.replace(UNKNOWN, '')!r}"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text of a row of token numbers."""
        return "".join(self.alphabet[int(i)] for i in _numbers(ids))

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "characters", "alphabet": self.alphabet}


class BytePairs:
    """Byte-level byte-pair encoding, as GPT-2 uses it: any text can be written, no unknown token exists.

    A thin cover over the `tokenizers` package (extra `text`); `definition` is its JSON form (a tokenizer.json file).
    """

    def __init__(self, definition: str) -> None:
        self._inner = _tokenizers().Tokenizer.from_str(definition)
        self._inner.no_truncation()  # settings of one training run that a published file may carry along
        self._inner.no_padding()
        self.definition = definition

    @classmethod
    def learn(cls, text: str, size: int) -> BytePairs:
        """Learn the merges from `text` until there are `size` tokens (at least 256: the bytes)."""
        if size < 256:
            raise UserError(f"a byte-level vocabulary has at least 256 tokens, the bytes; got {size}")
        package = _tokenizers()
        inner = _byte_level(package.models.BPE(), package)
        trainer = package.trainers.BpeTrainer(
            vocab_size=size, show_progress=False, initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet()
        )
        inner.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(inner.to_str())

    @classmethod
    def load(cls, folder: Path | str) -> BytePairs:
        """Read a published tokenizer: a folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt."""
        folder = Path(folder)
        whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        if whole.is_file():
            try:
                return cls(whole.read_text(encoding="utf-8"))
            except UserError:
                raise
            except Exception as error:  # the package raises nothing more particular
                raise UserError(f"{whole} is no tokenizer that can be read: {error}") from error
        if not (vocabulary.is_file() and merges.is_file()):
            raise UserError(f"no tokenizer in {folder}: it needs tokenizer.json, or both vocab.json and merges.txt")
        if any(token.endswith("</w>") for token in json.loads(vocabulary.read_text(encoding="utf-8"))):
            raise UserError(
                f"{vocabulary} is of GPT-1's kind, words instead of bytes, which only tokenizer.json tells whole"
            )
        package = _tokenizers()
        inner = _byte_level(package.models.BPE.from_file(str(vocabulary), str(merges)), package)
        if inner.token_to_id("<|endoftext|>") is not None:
            inner.add_special_tokens(["<|endoftext|>"])
        return cls(inner.to_str())

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """(N,) int64."""
        return torch.tensor(self._inner.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def encode_all(self, texts: Iterable[str]) -> list[Tensor]:
        """`encode` of each text, in a third of the time."""
        rows = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [torch.tensor(row.ids, dtype=torch.int64) for row in rows]

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text of a row of token numbers; bytes that are not valid UTF-8 become U+FFFD (`UNKNOWN`)."""
        return self._inner.decode([int(i) for i in _numbers(ids)], skip_special_tokens=False)

    def token(self, name: str) -> int | None:
        """The number of a named token such as "<|endoftext|>", None if there is none."""
        return self._inner.token_to_id(name)

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "bpe", "definition": self.definition}


def tokenizer(state: dict[str, Any]) -> Characters | BytePairs:
    """The tokenizer whose `state()` this is."""
    if state["kind"] == "characters":
        return Characters(state["alphabet"])
    return BytePairs(state["definition"])


def starts(length: int, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) random offsets o such that o … o + context all lie inside a text of `length` tokens."""
    return torch.randint(length - context, (batch,), generator=generator)


def windows(ids: Tensor, offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B, context): the target of a token is the token that follows it."""
    rows = ids[offsets[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def pieces(tokens: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens that arrive one by one, each piece as soon as its characters are complete.

    A character may be spread over several byte-level tokens; what is held back never exceeds three of them. Each piece is
    decoded behind the one before it, for some tokenizers (GPT-1's) write the space between two words only then.
    """
    before: list[int] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokens.decode(before + waiting)
        broken = text.endswith(UNKNOWN)
        if not broken or len(waiting) > 3:
            yield text[len(tokens.decode(before)) :]
            before, waiting = [] if broken else waiting, []
    if waiting:
        yield tokens.decode(before + waiting)[len(tokens.decode(before)) :]


def _numbers(ids: Tensor | Iterable[int]) -> Iterable[int]:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def _byte_level(model: Any, package: Any) -> Any:
    inner = package.Tokenizer(model)
    inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = package.decoders.ByteLevel()
    return inner


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        raise UserError(f"byte-pair tokens need the package tokenizers; run: {how('text')}") from error
    return tokenizers
