"""Drawing from an autoregressive model: sampling rules as pure functions, and the one loop that feeds them.

Papers: Fan et al., 2018, arXiv:1805.04833 (top-k); Holtzman et al., 2020, arXiv:1904.09751 (top-p, "nucleus").
Temperature acts first, then top-k, then top-p on what is left, renormalised: the order Hugging Face uses.

Legend: B sequences side by side, V vocabulary, P prompt length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Decoder", "generate", "keep_top_k", "keep_top_p", "pad_left", "pick", "stream"]

Dice = torch.Generator | Sequence[torch.Generator] | None
"""Where draws come from: one generator for all rows, one a row, or torch's global one."""


class Decoder(Protocol):
    """What the loop needs from a model: how far it can see, an empty memory, and one step."""

    context: int
    """The number of positions the model has."""

    def start(self, batch: int) -> Any:
        """An empty cache for `batch` sequences; `length` counts the columns read, setting it to 0 empties it.

        `pads`, (B,) int64 or None, says how many of the first columns of each row are padding: not to be looked at and
        not to be counted as positions. A model that has no use for it may leave it out of its cache.
        """

    def advance(self, ids: Tensor, cache: Any) -> Tensor:
        """Read ids (B, T) after what the cache holds, add them to it; logits (B, V) for the next token."""
        ...


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, −∞ elsewhere: (..., V) → (..., V); exactly k survive even under ties.

    k ≥ V keeps everything. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    if k >= logits.shape[-1]:
        return logits
    values, where = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, where, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most probable tokens whose probabilities reach p, −∞ elsewhere: (..., V) → (..., V).

    A token stays if the tokens before it (in falling order) do not reach p on their own, so at least one stays.
    p = 1 keeps everything. Raises ValueError outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {p}")
    if p == 1:
        return logits
    falling, where = logits.sort(dim=-1, descending=True, stable=True)
    probability = falling.softmax(-1)
    before = probability.cumsum(-1) - probability
    falling = falling.masked_fill(before >= p, -torch.inf)
    falling[..., 0] = logits.amax(-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, where, falling)


def pick(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: Dice = None,
) -> Tensor:
    """One token a row, (B, V) → (B,) int64: the most probable one if `greedy`, else drawn from the filtered softmax.

    Args:
        logits: (B, V).
        temperature: > 0; below 1 sharpens, above 1 flattens.
        top_k: keep the k most probable, None = all; top_p: keep the smallest set of that mass, None = all.
        greedy: take the maximum; the other settings are then without effect.
        generator: the source of randomness, None = torch's global one; with one generator a row, each row draws what it
            would draw alone.
    """
    if greedy:
        return logits.argmax(-1)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; use greedy=True for the limit at 0")
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    probability = logits.softmax(-1)
    if isinstance(generator, Sequence):
        rows = [
            torch.multinomial(p.to(dice.device), 1, generator=dice)
            for p, dice in zip(probability, generator, strict=True)
        ]
        return torch.cat(rows).to(logits.device)
    if generator is not None:
        probability = probability.to(generator.device)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1).to(logits.device)


def pad_left(rows: Sequence[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (P_b,) of different lengths with `fill` before the shorter ones: (B, P), and how much of it each has, (B,)."""
    longest = max(len(row) for row in rows)
    pads = torch.tensor([longest - len(row) for row in rows], device=rows[0].device)
    return torch.stack([torch.cat([row.new_full((longest - len(row),), fill), row]) for row in rows]), pads


def stream(
    model: Decoder,
    prompt: Tensor,
    count: int,
    *,
    pads: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: Dice = None,
    stop: int | None = None,
    keep: int | None = None,
    cache: Any = None,
) -> Iterator[Tensor]:
    """Yield `count` times the next token of every sequence, (B,) int64, as soon as it is known.

    Args:
        model: see `Decoder`; it is asked to read each token once. Its train/eval mode is left to the caller.
        prompt: (B, P) int64 with P ≥ 1. Of a prompt longer than the context the last `context` tokens are read.
        count: number of tokens to add.
        pads: (B,) int64, how many tokens at the start of each row are padding (`pad_left`), fewer than P. Each row is
            continued as it would be alone.
        temperature, top_k, top_p, greedy, generator: see `pick`.
        stop: an end-of-text token: a sequence that has drawn it repeats it, and the iteration ends early when all have.
        keep: a model with absolute positions cannot shift its cache, so when the context is full the last `keep` tokens
            are read again from position 0. None means half the context (each token is then read twice at most on
            average and sees at least context/2 others); `context` is the exact sliding window, at a full read
            per token. In 1 … context. Rows of different lengths fill the context at different times, and whenever one
            does, all are read again.
        cache: what `model.start(B)` gave, to use it again (it is emptied first) while the weights have not changed.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"the prompt must be (batch, at least one token), got {tuple(prompt.shape)}")
    context, (batch, end) = model.context, prompt.shape
    keep = max(1, context // 2) if keep is None else keep
    if not 1 <= keep <= context:
        raise ValueError(f"keep must lie in 1 … {context}, the context, got {keep}")
    begin = [0] * batch if pads is None else pads.tolist()  # the column at which what each row sees begins
    if len(begin) != batch or not all(0 <= first < end for first in begin):
        raise ValueError(f"pads must be {batch} numbers from 0 to {end - 1}, so that each row has a token; got {begin}")
    begin = [max(first, end - context) for first in begin]
    seen = torch.cat([prompt, prompt.new_empty(batch, count)], dim=1)  # seen[:, :end] is filled
    done = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    with torch.no_grad():
        cache = model.start(batch) if cache is None else cache
    whole = True  # whether all that is seen is to be read, or only the newest token
    for _ in range(count):
        if any(end - first > context for first in begin):
            begin, whole = [end - keep if end - first > context else first for first in begin], True
        if whole:
            first = min(begin)
            blank = None if max(begin) == first else torch.tensor(begin, device=prompt.device) - first
            cache.length, cache.pads, whole = 0, blank, False
            new = seen[:, first:end]
        else:
            new = seen[:, end - 1 : end]
        token = _step(model, new, cache, temperature, top_k, top_p, greedy, generator)
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        seen[:, end] = token
        end += 1
        yield token
        if stop is not None and bool(done.all()):
            return


@torch.no_grad()
def _step(model: Decoder, new: Tensor, cache: Any, *settings: Any) -> Tensor:
    return pick(model.advance(new, cache), *settings)


def generate(model: Decoder, prompt: Tensor, count: int, **settings: Any) -> Tensor:
    """The prompt and what `stream` adds to it: (B, P) → (B, P + count), shorter if every sequence hit `stop` early.

    Takes the keyword arguments of `stream`; the same generator state gives the same tokens.
    """
    drawn = list(stream(model, prompt, count, **settings))
    return torch.cat([prompt, torch.stack(drawn, dim=1)], dim=1) if drawn else prompt
