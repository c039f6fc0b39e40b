"""What every method that turns sentences into sentences shares: pairs as tokens, padded batches, translation, its scores.

Each source ends with EOS. A target is read behind BOS (`before`) and asked for with EOS at its end (`after`), so that the token
asked for at each place is the one that `before` shows at the next. PAD fills the rest of a batch.

Legend: B sentences side by side, S source and T target length, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude import data
from etude.blocks.tokens.decoding import beam_search
from etude.blocks.tokens.text import BytePairs, Characters, Tokenizer, tokenizer
from etude.core.config import NonNegative, Range
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Loaded
from etude.core.spec import Spec
from etude.data.batches import Grouped
from etude.sequence.parts.bleu import bleu

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "Batch",
    "Sample",
    "Special",
    "Task",
    "Translator",
    "generate",
    "read_task",
    "sample",
    "scores",
    "token_nats",
    "translate",
]

PAD, BOS, EOS = 0, 1, 2
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
Pairs = list[tuple[str, str]]


class Special:
    """A tokenizer with PAD, BOS and EOS in front: its own token i is i + 3 here."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.size = inner, inner.size + 3

    def encode(self, text: str) -> Tensor:
        """(N + 1,) int64: the text and EOS."""
        return torch.cat([self.inner.encode(text) + 3, torch.tensor([EOS])])

    def encode_all(self, texts: Sequence[str]) -> list[Tensor]:
        """`encode` of each text."""
        together = getattr(self.inner, "encode_all", None)
        rows = [self.inner.encode(text) for text in texts] if together is None else together(texts)
        return [torch.cat([row + 3, torch.tensor([EOS])]) for row in rows]

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text before the first EOS."""
        told = [int(i) for i in ids]
        return self.inner.decode([i - 3 for i in told[: told.index(EOS) if EOS in told else None] if i > EOS])


class Batch(NamedTuple):
    """Sentences and their translations, as tensors of int64."""

    source: Tensor
    """(B, S), EOS at the end of each, PAD behind."""
    lengths: Tensor
    """(B,): tokens of each source, EOS included; on the CPU."""
    before: Tensor
    """(B, T): BOS and the target."""
    after: Tensor
    """(B, T): the target and EOS, the token that follows each one of `before`."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device; `lengths` stay where they are."""
        return Batch(self.source.to(device), self.lengths, self.before.to(device), self.after.to(device))


class Translator(Protocol):
    """What is asked of a network, a `torch.nn.Module`."""

    def __call__(self, source: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each one of `before`, which is given (teacher forcing)."""
        ...

    def begin(self, source: Tensor, lengths: Tensor) -> Any:
        """The source read, nothing written: a state for `step`, which `etude.blocks.tokens.decoding.select` can handle."""

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads the token written last, (R,), R a multiple of B: logits (R, V) of the next one, and the new state."""
        ...

    def parameters(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...


@dataclass(frozen=True)
class Task:
    """Pairs to learn from as batches, others to validate and to test with, and the tokens that both languages share."""

    content: Any
    tokens: Special
    validation: Pairs
    test: Pairs
    longest: int
    """The most tokens of a sentence in training, EOS not counted; a translation ends there."""
    batch: int
    seed: int
    rank: int
    learned: list[tuple[Tensor, Tensor]]
    groups: Grouped | None

    def spec(self) -> Spec:
        """What is needed to build the network and to translate with it."""
        extra = {"vocabulary": self.tokens.size, "tokenizer": self.tokens.inner.state(), "longest": self.longest}
        return Spec(extra=extra)

    def __call__(self, step: int) -> Batch:
        """The batch of a step: a function of (seed, step, rank)."""
        if self.groups is None:
            pairs = self.content.draw(self.batch, generator(self.seed, step, self.rank, "strings"))
            return padded([(self.tokens.encode(a), self.tokens.encode(b)) for a, b in pairs])
        return padded([self.learned[i] for i in self.groups.indices(step)])


def read_task(
    name: str, languages: str, vocabulary: int, longest: int, batch: int, seed: int, rank: int = 0, world: int = 1
) -> Task:
    """A task of random strings (`reversals`, `noisy_copies`), or parallel text.

    Args:
        name: reversal, noisy_copy, a dataset of parallel text (multi30k), or a folder; see `etude.data.parallel`.
        languages: source and target, as en-de.
        vocabulary: byte pairs to learn from both sides of the training text together.
        longest: training pairs with a side of more tokens are left out; validation and test are kept whole.

    The strings that validate and test, 500 each, are the same for all seeds.
    """
    if name in STRINGS:
        content = Strings(name, longest)
        held = [content.draw(500, generator(0, 0, 0, part)) for part in ("validation", "test")]
        tokens = Special(Characters(ALPHABET))
        return Task(content, tokens, held[0], held[1], longest, batch, seed, rank, [], None)
    first, dash, second = languages.partition("-")
    if not (first and dash and second):
        raise UserError(f"languages are source and target with a dash between them, as en-de, not {languages!r}")
    content = data.parallel(name, (first, second))
    tokens = Special(BytePairs.learn("\n".join(side for pair in content.train for side in pair), vocabulary))
    encoded = list(zip(*(tokens.encode_all([pair[side] for pair in content.train]) for side in (0, 1))))
    encoded = [pair for pair in encoded if max(map(len, pair)) <= longest + 1]
    if not encoded:
        raise UserError(
            f"no training pair of {name} has at most {longest} tokens on each side; give a larger --longest"
        )
    lengths = np.array([(len(a) << 20) + len(b) for a, b in encoded])  # by the source, equal ones by the target
    groups = Grouped(lengths, batch, seed, rank, world)
    return Task(content, tokens, content.validation, content.test, longest, batch, seed, rank, encoded, groups)


STRINGS = {
    "reversal": "random strings of 1 to {} letters, and these backwards",
    "noisy_copy": "strings of 1 to {} letters with four of ten replaced at random, and what they were",
}


@dataclass(frozen=True)
class Strings:
    """Pairs of random strings: drawn anew for each step, so that there is nothing to learn by heart."""

    name: str
    longest: int

    def draw(self, count: int, dice: torch.Generator) -> Pairs:
        """So many pairs."""
        return {"reversal": reversals, "noisy_copy": noisy_copies}[self.name](count, self.longest, dice)

    def about(self) -> dict[str, Any]:
        """Name and source, as of a dataset."""
        return {"name": self.name, "source": STRINGS[self.name].format(self.longest)}


def reversals(count: int, longest: int, dice: torch.Generator) -> Pairs:
    """Strings of random letters, lengths from 1 to `longest` equally likely, each with itself backwards."""
    lengths = torch.randint(1, longest + 1, (count,), generator=dice).tolist()
    strings = _strings(torch.randint(len(ALPHABET), (count, longest), generator=dice), lengths)
    return [(string, string[::-1]) for string in strings]


def noisy_copies(
    count: int, longest: int, dice: torch.Generator, stay: float = 0.8, noise: float = 0.4, letters: int = 6
) -> Pairs:
    """Strings that often stay at their last letter; sources are what a noisy channel makes of them.

    A letter of the target is the one before it with probability `stay`, else any of the first `letters`; a letter of the source
    is replaced by any of these with probability `noise`. Lengths from 1 to `longest` are equally likely.
    """
    lengths = torch.randint(1, longest + 1, (count,), generator=dice).tolist()
    target, other = torch.randint(letters, (2, count, longest), generator=dice)
    stays, replaced = torch.rand(2, count, longest, generator=dice)
    for t in range(1, longest):
        target[:, t] = torch.where(stays[:, t] < stay, target[:, t - 1], target[:, t])
    source = torch.where(replaced < noise, other, target)
    return list(zip(_strings(source, lengths), _strings(target, lengths)))


def _strings(letters: Tensor, lengths: list[int]) -> list[str]:
    return ["".join(ALPHABET[i] for i in row[:length]) for row, length in zip(letters.tolist(), lengths)]


def padded(pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Encoded pairs, each side with EOS at its end, as one batch."""
    source, after = (_padded([pair[side] for pair in pairs]) for side in (0, 1))
    lengths = torch.tensor([len(a) for a, _ in pairs])
    before = torch.cat([torch.full_like(after[:, :1], BOS), after[:, :-1].masked_fill(after[:, :-1] == EOS, PAD)], 1)
    return Batch(source, lengths, before, after)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD)


def token_nats(logits: Tensor, after: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean of −log p over the tokens asked for, PAD left out, from logits (B, T, V) and targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), after.flatten(), ignore_index=PAD, label_smoothing=smoothing)


@torch.no_grad()
def translate(
    model: Translator, task: Task | Special, sources: Sequence[str], *, longest: int, beams: int = 1,
    length_penalty: float = 1.0, batch: int = 64,
) -> list[str]:  # fmt: skip
    """Each sentence translated, greedily or with a beam, in at most `longest` tokens and EOS; the model's mode is put back.

    Sentences of like length are read side by side; each is translated as it would be alone.
    """
    tokens = task if isinstance(task, Special) else task.tokens
    device, training = next(model.parameters()).device, getattr(model, "training", False)
    model.train(False)
    ids = tokens.encode_all(sources)
    order, told = sorted(range(len(ids)), key=lambda i: len(ids[i])), [""] * len(ids)
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        source, lengths = _padded([ids[i] for i in places]).to(device), torch.tensor([len(ids[i]) for i in places])
        begin = torch.full((len(places),), BOS, device=device)
        found = beam_search(
            model.step, model.begin(source, lengths), begin, longest + 1, beams=beams, stop=EOS, pad=PAD,
            length_penalty=length_penalty,
        )  # fmt: skip
        for i, row in zip(places, found.tokens[:, 0].tolist()):
            told[i] = tokens.decode(row)
    model.train(training)
    return told


@torch.no_grad()
def scores(
    model: Translator, task: Task, pairs: Pairs, *, beams: int = 1, length_penalty: float = 1.0
) -> dict[str, float]:
    """What translations are worth: `exact_match` (share of sentences translated letter for letter), `nats_per_token` of the
    given targets, and, unless the sentences are strings, which have no words, `bleu` and `unrelated_bleu`: the same
    translations held against the targets of other sentences, each against the next one's. The second is what a translator
    has that writes likely sentences without having read its source."""
    told = translate(
        model, task, [a for a, _ in pairs], longest=task.longest, beams=beams, length_penalty=length_penalty
    )
    exact = sum(said == target for said, (_, target) in zip(told, pairs)) / len(pairs)
    found = {"exact_match": exact, "nats_per_token": forced_nats(model, task, pairs)}
    if isinstance(task.content, Strings):
        return found
    targets = [[target] for _, target in pairs]
    return {"bleu": bleu(told, targets), "unrelated_bleu": bleu(told, targets[1:] + targets[:1]), **found}


@torch.no_grad()
def forced_nats(model: Translator, task: Task, pairs: Pairs, batch: int = 64) -> float:
    """−Σ log p of all targets and their ends over the number of tokens, each token given those before it."""
    device, training = next(model.parameters()).device, getattr(model, "training", False)
    model.train(False)
    sides = (task.tokens.encode_all([pair[side] for pair in pairs]) for side in (0, 1))
    encoded = sorted(zip(*sides), key=lambda pair: len(pair[0]))
    total, count = 0.0, 0
    for first in range(0, len(encoded), batch):
        part = padded(encoded[first : first + batch]).to(device)
        real = int((part.after != PAD).sum())
        total += float(token_nats(model(part.source, part.lengths, part.before).float(), part.after)) * real
        count += real
    model.train(training)
    return total / count


Beams = Annotated[int, Range(1, 256)]
"""Hypotheses kept at a time: each costs the memory of a translation, for 64 sentences side by side."""


@dataclass(frozen=True)
class Sample:
    text: str = "abc"
    """The sentence to translate; -: those on the standard input, one a line."""
    beams: Beams = 5
    """Hypotheses kept at a time; 1 is greedy."""
    length_penalty: NonNegative = 1.0
    """A hypothesis is judged by Σ log p / length to this power: 1 is the mean, 0 the sum."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """The translation, also written to sample.txt."""
    sources = [options.text] if options.text != "-" else [line.rstrip("\n") for line in sys.stdin]
    sources = [text for text in sources if text.strip()]
    if not sources:
        raise UserError(
            'there is nothing to translate: give --text "…", or --text - and sentences on the standard input, one a line'
        )
    told = "\n".join(generate(loaded, sources, options))
    (folder / "sample.txt").write_text(told + "\n", encoding="utf-8")
    return told


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """The translation of each sentence."""
    model: Any = loaded.model
    tokens = Special(tokenizer(loaded.spec.extra["tokenizer"]))
    rules = {"longest": loaded.spec.extra["longest"], "beams": options.beams, "length_penalty": options.length_penalty}
    return translate(model.eval(), tokens, prompts, **rules)
