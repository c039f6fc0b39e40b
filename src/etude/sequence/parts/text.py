"""A recurrent network that reads and writes characters, and the rows of a text that it learns from.

Legend: B rows side by side, T time, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import data
from etude.blocks.nn.recurrent import Recurrent
from etude.blocks.tokens.text import UNKNOWN, Characters
from etude.core.errors import UserError
from etude.data.texts import split

__all__ = ["CharacterModel", "Corpus", "Tracks", "corpus", "falling", "surprise", "total_nats"]

State = tuple[Tensor, ...]


class CharacterModel(nn.Module):
    """Token vectors → recurrent layers → a readout that is the same at every time; also a `Decoder` for generation."""

    context = 1 << 30
    """As much as is read: the state has a fixed size, whatever it has seen."""

    def __init__(self, vocabulary: int, embedding: int, recurrent: Recurrent, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(vocabulary, embedding), recurrent
        self.readout, self.dropout = nn.Linear(recurrent.width, vocabulary), nn.Dropout(dropout)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """ids (B, T) → logits (B, T, V) of the token after each position, and the state behind the last."""
        if self.training and self.dropout.p > 0:
            h, last = self.recurrent(self.dropout(self.embedding(ids)), state)
        else:
            h, last = self.recurrent(ids, state, table=self.embedding.weight)
        return self.readout(self.dropout(h)), last

    def start(self, batch: int) -> Memory:
        """An empty memory for `batch` rows."""
        return Memory(self.recurrent.zeros(batch))

    @torch.no_grad()
    def advance(self, ids: Tensor, cache: Memory) -> Tensor:
        """Read ids (B, T) after what the memory holds; logits (B, V) of the next token."""
        lengths = None
        if cache.pads is not None and not cache.length:  # padding is moved behind the text, where it is not read
            lengths = ids.shape[1] - cache.pads
            ids = ids.gather(1, (torch.arange(ids.shape[1], device=ids.device) + cache.pads[:, None]) % ids.shape[1])
            lengths = lengths.cpu()
        _, cache.state = self.recurrent(self.embedding(ids), cache.state, lengths)
        cache.length += ids.shape[1]
        return self.readout(cache.state[0][-1])


class Memory:
    """The state of B rows; `length` counts what was read, and setting it to 0 empties the state."""

    def __init__(self, state: State) -> None:
        self.state, self.pads, self._length = state, None, 0

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, value: int) -> None:
        self._length = value
        if not value:
            self.state = tuple(torch.zeros_like(part) for part in self.state)

    pads: Tensor | None


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, in three parts: learned from, validated with, tested on."""

    content: Any
    tokens: Characters
    learned: Tensor
    validation: Tensor
    test: Tensor


def corpus(name: str) -> Corpus:
    """The text of that name; its alphabet is that of the first 90 %, and any other character is U+FFFD there."""
    content = data.text(name)
    parts = split(content.text)
    tokens = Characters.of(parts[0] + UNKNOWN)
    if not all(parts):
        raise UserError(f"{content.name} is too short: a text to learn has 11 characters at least")
    return Corpus(content, tokens, *(tokens.encode(part, UNKNOWN) for part in parts))


class Tracks:
    """A text cut into equal rows that are read side by side, `context` tokens in each step, for pass after pass.

    Each pass begins at another offset, below `context` and drawn by `offset` (pass → number), so that its cuts lie elsewhere.
    """

    def __init__(self, ids: Tensor, rows: slice, count: int, context: int, offset: Callable[[int], int]) -> None:
        length = len(ids) // count
        self.chunks = (length - context) // context
        if self.chunks < 1:
            raise UserError(
                f"the text is too short: {count} rows of it have {length} tokens each, and chunks of {context} tokens take "
                f"{2 * context}; give fewer rows (--batch) or a shorter --context"
            )
        self.ids, self.context, self.offset = ids[: count * length].view(count, length)[rows], context, offset

    def __call__(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs and targets (B, context) of a step, and whether a pass begins: what was read before is not in front."""
        turn, chunk = divmod(step, self.chunks)
        begin = self.offset(turn) + chunk * self.context
        piece = self.ids[:, begin : begin + self.context + 1]
        return piece[:, :-1], piece[:, 1:], chunk == 0


def falling(step: int, steps: int, last: float) -> float:
    """The factor of the learning rate: 1 in the first step, on a line down to `last` behind the last one."""
    return 1 - (1 - last) * step / steps


@torch.no_grad()
def total_nats(model: CharacterModel, before: Tensor, ids: Tensor, rows: int = 64, warm: int = 256) -> float:
    """−Σ log p of ids, (N,), each token once: in up to `rows` rows side by side, each behind the `warm` tokens before it."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    warm = min(warm, len(before) - 1)
    length = max(64, -(-len(ids) // rows))
    whole, first = torch.cat([before[len(before) - 1 - warm :], ids]), torch.arange(0, len(ids), length)
    places = first[:, None] + torch.arange(warm + length + 1)
    real = (places[:, 1:] < len(whole)) & (torch.arange(warm + length) >= warm)
    held = whole[places.clamp(max=len(whole) - 1)]
    total, state = 0.0, None
    for x, y, counted in zip(held[:, :-1].split(512, 1), held[:, 1:].split(512, 1), real.split(512, 1)):
        logits, state = model(x.to(device), state)
        nats = F.cross_entropy(logits.transpose(1, 2), y.to(device), reduction="none")
        total += float(nats[counted.to(device)].double().sum())
    model.train(training)
    return total


@torch.no_grad()
def surprise(model: CharacterModel, ids: Tensor, window: int = 128) -> tuple[list[int], list[float]]:
    """How −log p falls with what was read: (tokens read before, mean nats) in the ranges 1, 2-3, 4-7, … of windows of `ids`."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    window = min(window, len(ids) - 1)
    rows = ids[torch.arange(0, len(ids) - window, window)[:, None] + torch.arange(window + 1)].to(device)
    nats = F.cross_entropy(model(rows[:, :-1])[0].transpose(1, 2), rows[:, 1:], reduction="none").mean(0).tolist()
    model.train(training)
    first = [1 << k for k in range(window.bit_length()) if 1 << k <= window]
    return first, [sum(nats[a - 1 : 2 * a - 1]) / len(nats[a - 1 : 2 * a - 1]) for a in first]
