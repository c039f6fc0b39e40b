"""An encoder with a head for sentences, pairs, words or answers: its network, its batches, its losses and what it is worth."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.metrics import confusion_matrix, macro_f1
from etude.language.parts.bert import Architecture, Bert, Linear, initialise
from etude.language.parts.tasks import Encoded, Item, answer_f1, encode, exact_match
from etude.language.parts.wordpiece import WordPiece

Kind = Literal["sentence", "pair", "tags", "span"]
Features = Literal["fine_tune", "last", "second_to_last", "sum_last_four", "concatenate_last_four", "mixture"]
IGNORED = -100
"""The label of a token that is not asked."""
LONGEST = 30
"""Words of an answer."""


class Model(nn.Module):
    """An encoder `bert` and a head by Hugging Face's names: `classifier`, or `qa_outputs` for spans.

    `mix` holds the weights s of h⁰ … hᴺ and γ where the features are a mixture.
    """

    def __init__(
        self, of: Architecture, task: Kind, classes: int, features: Features = "fine_tune", dropout: float = 0.1
    ):
        super().__init__()
        self.task, self.features = task, features
        self.bert = Bert(of)
        pooled = task in ("sentence", "pair") and features == "fine_tune"
        if not pooled:
            del self.bert.pooler
        inputs = of.width * (min(4, of.layers + 1) if features == "concatenate_last_four" else 1)
        self.dropout = nn.Dropout(dropout)
        if task == "span":
            self.qa_outputs = Linear(inputs, 2)
        else:
            self.classifier = Linear(inputs, classes)
        if features == "mixture":
            self.mix = nn.ParameterDict({"s": torch.zeros(of.layers + 1), "gamma": torch.ones(())})
        initialise(self)
        if features != "fine_tune":
            self.bert.requires_grad_(False)

    def forward(self, ids: Tensor, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits: (B, classes) of a sentence or pair, (B, T, classes) of tags, (B, T, 2) of start and end."""
        if self.features == "fine_tune":
            states = [self.bert(ids, types, mask)]
        else:
            training = self.bert.training
            self.bert.eval()  # a frozen encoder drops nothing
            states = self.bert.states(ids, types, mask)
            self.bert.train(training)
        if self.task in ("sentence", "pair"):
            if self.features == "fine_tune":
                return self.classifier(self.dropout(self.bert.pooled(states[-1])))
            states = [state[:, 0] for state in states]
        x = self.dropout(self.read(states))
        return self.qa_outputs(x) if self.task == "span" else self.classifier(x)

    def read(self, states: list[Tensor]) -> Tensor:
        """The features of h⁰ … hᴺ, each (…, D)."""
        if self.features == "second_to_last":
            return states[-2]
        if self.features == "sum_last_four":
            return torch.stack(states[-4:]).sum(0)
        if self.features == "concatenate_last_four":
            return torch.cat(states[-4:], dim=-1)
        if self.features == "mixture":
            return self.mix["gamma"] * torch.einsum("l,l...->...", self.mix["s"].softmax(0), torch.stack(states))
        return states[-1]


class Batch(NamedTuple):
    """ids, types (B, T) int64, mask (B, T) bool; labels (B,), (B, T) or, of spans, (B, 2): start and end."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    labels: Tensor


def label_of(item: Item, window: Encoded, task: Kind) -> list[int]:
    """The class; a tag for each token, `IGNORED` but at the first pieces of words; start and end, 0 where not in the window."""
    if task == "tags":
        labels = [IGNORED] * len(window.ids)
        for place, tag in zip(window.places.tolist(), item.tags):
            labels[place] = tag
        return labels
    if task == "span":
        begin = int(window.words[0]) if len(window.words) else 0
        low, high = (word - begin for word in item.span)
        inside = 0 <= low <= high < len(window.places)
        return [int(window.places[low]), int(window.ends[high])] if inside else [0, 0]
    return [item.label]


def collate(windows: list[Encoded], labels: list[list[int]], task: Kind, pad: int) -> Batch:
    """Side by side, padded to the longest."""
    ids = nn.utils.rnn.pad_sequence([w.ids for w in windows], batch_first=True, padding_value=pad)
    types = nn.utils.rnn.pad_sequence([w.types for w in windows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(w.ids) for w in windows])[:, None]
    if task == "tags":
        labels = [row + [IGNORED] * (ids.shape[1] - len(row)) for row in labels]
    targets = torch.tensor(labels)
    return Batch(ids, types, mask, targets[:, 0] if task in ("sentence", "pair") else targets)


def loss_of(logits: Tensor, labels: Tensor, mask: Tensor, task: Kind) -> Tensor:
    """Line 3: mean cross-entropy of classes or tags; of spans the mean of start's and end's, over the positions of the text."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if task == "span":
        return F.cross_entropy(logits.masked_fill(~mask[..., None], -torch.inf), labels)
    if task == "tags":
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return F.cross_entropy(logits, labels)


def best_span(start: Tensor, end: Tensor, longest: int = LONGEST) -> tuple[int, int, float]:
    """argmax of start_i + end_j over i ≤ j < i + longest, and that sum; scores (N,) of words."""
    total = start[:, None] + end
    allowed = torch.ones_like(total, dtype=torch.bool).triu() & torch.ones_like(total, dtype=torch.bool).tril(
        longest - 1
    )
    best = int(total.masked_fill(~allowed, -torch.inf).argmax())
    return best // len(start), best % len(start), float(total.flatten()[best])


@torch.no_grad()
def answers(model: Model, items: list[Item], tokens: WordPiece, context: int) -> list[Any]:
    """What the model says of each item: a class, a list of the words' tags, or (first word, last word) of the answer.

    Items of like length are read together; words behind the end of the context get tag 0.
    """
    kind, device, training = model.task, next(model.parameters()).device, model.training
    stride = context // 4 if kind == "span" else 0
    windows = [(i, window) for i, item in enumerate(items) for window in encode(item, tokens, context, kind, stride)]
    windows.sort(key=lambda pair: len(pair[1].ids))
    said: list[Any] = [None] * len(items)
    scores = [-float("inf")] * len(items)
    model.eval()
    for begin in range(0, len(windows), 64):
        part = windows[begin : begin + 64]
        batch = collate([window for _, window in part], [[0]] * len(part), "sentence", tokens.pad)
        logits = model(*(x.to(device) for x in batch[:3])).float().cpu()
        for (i, window), row in zip(part, logits):
            if kind in ("sentence", "pair"):
                said[i] = int(row.argmax())
            elif kind == "tags":
                tags = row[window.places].argmax(1).tolist()
                said[i] = tags + [0] * (len(items[i].first) - len(tags))
            elif len(window.places):
                low, high, score = best_span(row[window.places, 0], row[window.ends, 1])
                if score > scores[i]:
                    scores[i], said[i] = score, (int(window.words[low]), int(window.words[high]))
    model.train(training)
    return [(0, 0) if answer is None else answer for answer in said]


def score(
    model: Model, items: list[Item], tokens: WordPiece, context: int
) -> tuple[float, float, tuple[list[int], list[int]]]:
    """(accuracy, F1, (true, said) classes) over sentences, pairs or words; (exact match, F1, ([], [])) over answers."""
    said = answers(model, items, tokens, context)
    if model.task == "span":
        texts = [" ".join(item.second[low : high + 1]) for item, (low, high) in zip(items, said)]
        exact = sum(exact_match(text, item.answers) for text, item in zip(texts, items))
        return exact / len(items), sum(answer_f1(t, i.answers) for t, i in zip(texts, items)) / len(items), ([], [])
    if model.task == "tags":
        pairs = [
            (true, tag) for item, tags in zip(items, said) for true, tag in zip(item.tags, tags) if true != IGNORED
        ]
    else:
        pairs = [(item.label, answer) for item, answer in zip(items, said)]
    truth, told = ([pair[i] for pair in pairs] for i in (0, 1))
    table = confusion_matrix(torch.tensor(truth), torch.tensor(told), model.classifier.out_features)
    right = sum(a == b for a, b in pairs) / len(pairs)
    return right, float(macro_f1(table)), (truth, told)


def majority(train: list[Item], test: list[Item], kind: Kind) -> float:
    """What can be said without reading: the commonest class, each word's commonest tag, the passage's first word."""
    if kind == "span":
        return sum(exact_match(item.second[0], item.answers) for item in test) / len(test)
    if kind != "tags":
        (often, _), *_ = Counter(item.label for item in train).most_common(1)
        return sum(item.label == often for item in test) / len(test)
    every = Counter(tag for item in train for tag in item.tags)
    by_word: dict[str, Counter[int]] = {}
    for item in train:
        for word, tag in zip(item.first, item.tags):
            by_word.setdefault(word, Counter())[tag] += 1
    asked = [(w, t) for item in test for w, t in zip(item.first, item.tags) if t != IGNORED]
    return sum(by_word.get(word, every).most_common(1)[0][0] == tag for word, tag in asked) / len(asked)


def shown(model: Model, items: list[Item], tokens: WordPiece, context: int, classes: tuple[str, ...]) -> str:
    """A line for each item: what is said of it, and the truth where it is another."""
    lines = []
    for item, said in zip(items, answers(model, items, tokens, context)):
        if model.task == "span":
            answer = " ".join(item.second[said[0] : said[1] + 1])
            lines.append(f"{' '.join(item.first)} → {answer}   (people: {item.answers[0]})" if item.answers else answer)
        elif model.task == "tags":
            lines.append("  ".join(f"{word}/{classes[tag] or '-'}" for word, tag in zip(item.first, said)))
        else:
            true = "" if said == item.label else f", truth {classes[item.label]}"
            text = " ".join(item.first) + (" | " + " ".join(item.second) if item.second else "")
            lines.append(f"[{classes[said]}{true}]  {text}")
    return "\n".join(lines)
