"""Decoding an autoregressive model: greedy, by sampling or by beam search; and the probability of given tokens.

Papers: Fan et al., 2018, arXiv:1805.04833 (top-k); Holtzman et al., 2020, arXiv:1904.09751 (top-p, "nucleus");
Graves, 2012, arXiv:1211.3711 (beam search); Wu et al., 2016, arXiv:1609.08144 (its score divided by the length).
Temperature acts first, then top-k, then top-p on what is left, renormalised: the order Hugging Face uses.

A model is asked in one of two ways: `stream` reads a prompt into the cache of a `Decoder`; `follow`, `forced` and
`beam_search` call a function `step(tokens (R,), state) → logits (R, V), state` that reads one token a row.

Legend: B sequences side by side, V vocabulary, P prompt length, T tokens in all, K beams, R rows (B, or B·K in beam search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Decoder",
    "Hypotheses",
    "Step",
    "beam_search",
    "follow",
    "forced",
    "generate",
    "keep_top_k",
    "keep_top_p",
    "pad_left",
    "pick",
    "select",
    "stream",
]

Dice = torch.Generator | Sequence[torch.Generator] | None
"""Where draws come from: one generator for all rows, one a row, or torch's global one."""

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Reads one token a row, (R,) int64, after what the state holds: logits (R, V) of the next token, and the new state."""


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


def select(state: Any, rows: Tensor, sentences: Tensor | None = None) -> Any:
    """The state of the given rows (R',), which may come several times or not at all.

    Of tensors the first dimension is rows; tuples, lists and dictionaries hold further states. Any other object is asked by
    its `select(rows, sentences)`: beam search says there which sentences (B',) are still searched (None: all of them), so that
    what belongs to a sentence, as the encoded source, need not be held once a beam.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    if isinstance(state, dict):
        return {name: select(part, rows, sentences) for name, part in state.items()}
    if isinstance(state, tuple | list):
        parts = [select(part, rows, sentences) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state.select(rows, sentences)


@torch.no_grad()
def follow(step: Step, state: Any, begin: Tensor, count: int, *, stop: int, pad: int = 0, **rules: Any) -> Tensor:
    """Up to `count` tokens after `begin` (B,), greedy or drawn (`pick`'s settings are `rules`): (B, T).

    A row ends with `stop`, and `pad` fills what is behind.
    """
    done, drawn, token = torch.zeros_like(begin, dtype=torch.bool), [], begin
    for _ in range(count):
        logits, state = step(token, state)
        token = pick(logits, **rules).masked_fill(done, pad)
        drawn.append(token)
        done |= token == stop
        if bool(done.all()):
            break
    return torch.stack(drawn, 1) if drawn else begin.new_empty(len(begin), 0)


def forced(step: Step, state: Any, begin: Tensor, tokens: Tensor) -> Tensor:
    """log p(token | begin, the tokens before it) of given tokens (B, T), each read in its turn: (B, T)."""
    told = []
    for before, token in zip([begin, *tokens.unbind(1)], tokens.unbind(1)):
        logits, state = step(before, state)
        told.append(logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
    return torch.stack(told, 1)


class Hypotheses(NamedTuple):
    """What a beam search found, the best first; where there are fewer hypotheses than asked for, a score is −∞."""

    tokens: Tensor
    """(B, N, T) int64, `stop` included where it was reached, `pad` behind."""
    lengths: Tensor
    """(B, N) int64: the number of tokens, `stop` included."""
    scores: Tensor
    """(B, N): Σ log p / lengths^length_penalty."""
    log_probs: Tensor
    """(B, N, T): log p of each token, 0 behind the end."""


@torch.no_grad()
def beam_search(
    step: Step,
    state: Any,
    begin: Tensor,
    count: int,
    *,
    beams: int,
    stop: int,
    pad: int = 0,
    length_penalty: float = 1.0,
    exhaust: bool = False,
    best: int = 1,
) -> Hypotheses:
    """The `best` hypotheses of at most `count` tokens by Σ log p / length^length_penalty, kept `beams` at a time.

    1. each sentence starts with ONE hypothesis, `begin` (K equal ones would stay equal)
    2. of all continuations of all live hypotheses take the K best by Σ log p; those that end with `stop` are finished: they
       leave the beam, scored by their OWN length, and the next best ones take their places
    3. a sentence is done when K hypotheses have finished; with `exhaust`, when no live one can still win (log p ≤ 0, so it
       scores at most Σ log p / count^length_penalty); at `count` tokens what is live is scored as it stands

    K = 1 is greedy decoding; K ≥ Vᵀ is enumeration.

    Args:
        step, state, begin: see the top of the file; `begin` (B,) is read first and belongs to no hypothesis. Rows of one sentence
            lie side by side; see `select` for how a state follows the beams.
        length_penalty: 1 is the mean of log p, 0 the sum, at least 0.
    """
    if beams < 1 or not 1 <= best <= beams or count < 1 or length_penalty < 0:
        raise ValueError(
            f"beams {beams}, best {best} and count {count} must be at least 1, best at most beams, and length_penalty "
            f"{length_penalty} not negative"
        )
    size, device, found = len(begin), begin.device, {}
    at, feed = torch.arange(size, device=device), begin  # the sentences that are still searched; what is read next
    paths, total, told, finished = begin.new_full((size, 1, count), pad), None, None, None
    for t in range(count):
        logits, state = step(feed, state)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if total is None or told is None or finished is None:  # line 1
            total, told = logits.new_zeros(size, 1), logits.new_zeros(size, 1, count)
            finished = Hypotheses(
                paths.expand(-1, beams, -1), at.new_zeros(size, beams), logits.new_full((size, beams), -torch.inf),
                told.expand(-1, beams, -1),
            )  # fmt: skip
        many = min(2 * beams, logits.shape[-1])  # at most K of the 2K best end, for each parent has one such child
        chance, token = logits.topk(many, -1)
        chance = (chance - logits.logsumexp(-1, keepdim=True)).view(len(at), -1)
        reached = total.repeat_interleave(many, 1) + chance
        reached, which = reached.topk(min(2 * beams, reached.shape[1]), -1)  # line 2
        token, chance, parent = token.view(len(at), -1).gather(1, which), chance.gather(1, which), which // many
        ends, last = token == stop, t + 1 == count
        leaves = (ends | last) & reached.isfinite()
        leaves[:, beams:] = False
        if bool(leaves.any()):
            scores = (reached / (t + 1) ** length_penalty).masked_fill(~leaves, -torch.inf)
            new = (
                _longer(paths, parent, token, t),
                torch.full_like(token, t + 1),
                scores,
                _longer(told, parent, chance, t),
            )
            finished = _best(Hypotheses(*(torch.cat(pair, 1) for pair in zip(finished, new))), beams)
        total, order = reached.masked_fill(ends, -torch.inf).topk(min(beams, reached.shape[1]), -1)
        parent, token, chance = (part.gather(1, order) for part in (parent, token, chance))
        paths, told = _longer(paths, parent, token, t), _longer(told, parent, chance, t)
        over = (total[:, 0] == -torch.inf) | last  # line 3
        if exhaust:
            over |= finished.scores[:, best - 1] >= total[:, 0] / count**length_penalty
        else:
            over |= finished.scores.isfinite().all(1)
        rows = parent + torch.arange(len(at), device=device)[:, None] * (len(feed) // len(at))
        sentences = None
        if bool(over.any()):
            for place in over.nonzero()[:, 0].tolist():
                found[int(at[place])] = _best(Hypotheses(*(part[place : place + 1] for part in finished)), best)
            sentences = (~over).nonzero()[:, 0]
            if not len(sentences):
                break
            at, rows, token, total, paths, told = (x[sentences] for x in (at, rows, token, total, paths, told))
            finished = Hypotheses(*(part[sentences] for part in finished))
        feed, rows = token.flatten(), rows.flatten()
        if sentences is not None or not torch.equal(rows, torch.arange(len(rows), device=device)):
            state = select(state, rows, sentences)
    result = Hypotheses(*(torch.cat(parts) for parts in zip(*(found[i] for i in range(size)))))
    missing = ~result.scores.isfinite()
    result.tokens[missing], result.lengths[missing], result.log_probs[missing] = pad, 0, 0.0
    return result


def _longer(paths: Tensor, parent: Tensor, last: Tensor, t: int) -> Tensor:
    """The paths (B, W, T) of the given parents (B, C), each with its own token (B, C) at place t: (B, C, T)."""
    longer = paths.gather(1, parent[..., None].expand(-1, -1, paths.shape[-1]))
    longer[..., t] = last
    return longer


def _best(found: Hypotheses, count: int) -> Hypotheses:
    """The `count` best hypotheses of each sentence, the best first."""
    scores, order = found.scores.topk(count, -1)
    whole = order[..., None].expand(-1, -1, found.tokens.shape[-1])
    return Hypotheses(
        found.tokens.gather(1, whole), found.lengths.gather(1, order), scores, found.log_probs.gather(1, whole)
    )
