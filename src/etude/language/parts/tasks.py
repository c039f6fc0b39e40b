"""Labelled text for one encoder with a head: sentences, pairs of sentences, words with tags, questions with answers.

Readers of the official files of SST-2 (GLUE's tsv), Universal Dependencies (CoNLL-U) and SQuAD 1.1 (json), plain or gzip; and
tasks that any text sets by itself, so that nothing has to be fetched.
"""

from __future__ import annotations

import csv
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude import data
from etude.core.errors import UserError
from etude.data import tagged, texts
from etude.language.parts.wordpiece import WordPiece

__all__ = ["Encoded", "Item", "Task", "answer_f1", "encode", "exact_match", "read_task"]

MARKS = (".", ",", ";", ":", "?", "!")


@dataclass(frozen=True)
class Item:
    """One example: words of a first and a second text, and what is to be said of them."""

    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    label: int = 0
    """Class of a sentence or a pair."""
    tags: tuple[int, ...] = ()
    """Class of each word of the first text."""
    span: tuple[int, int] = (0, 0)
    """First and last word of the answer in the second text."""
    answers: tuple[str, ...] = ()
    """All answers that people gave."""


@dataclass(frozen=True)
class Task:
    """Splits of labelled text; `classes` are the names of labels or tags."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    classes: tuple[str, ...]
    name: str = ""
    source: str = ""
    note: str = field(default="", compare=False)

    def about(self) -> dict[str, Any]:
        """What the report says of the data."""
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "note": self.note,
        }


def read_task(name: str, kind: str, examples: int = 0) -> Task:
    """The task `kind` ("sentence", "pair", "tags", "span") of a dataset folder, or of a text.

    Args:
        name: a folder (or its name among the datasets) with train.tsv and dev.tsv (GLUE, for "sentence"), with *-ud-train.conllu,
            *-ud-dev.conllu and *-ud-test.conllu (for "tags") or dev-v1.1.json (for "span"), each plain or .gz; else a text.
        examples: only so many training examples, the first ones of a fixed shuffle; 0: all.

    GLUE's dev file is the test, a twentieth of its training file validates. Of SQuAD's development file, the only one read, the
    articles are split: of every ten the first seven train, the eighth validates and two are the test.
    """
    folder = tagged.folder_of(name)
    if folder is None:
        content = data.text(name)
        parts = [_of_text(part, kind) for part in texts.split(content.text)]
        classes = {"sentence": MARKS, "tags": ("", *MARKS), "pair": ("follows", "does not")}.get(kind, ())
        task = Task(parts[0], parts[1], parts[2], classes, content.name, content.source, "set by the text itself")
    elif kind == "sentence":
        task = _glue(folder)
    elif kind == "tags":
        task = _conllu(folder)
    elif kind == "span":
        task = _squad(folder)
    else:
        raise UserError(f"no reader knows {folder} as a task of pairs; name a text, whose lines make pairs")
    train = task.train
    if examples and examples < len(train):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:examples]
        train = [train[i] for i in order.tolist()]
    return Task(train, task.validation, task.test, task.classes, task.name, task.source, task.note)


def _of_text(text: str, kind: str) -> list[Item]:
    """What a text asks: which mark ends a line, which mark follows a word, whether a line is the next, how a line goes on."""
    lines = [words for line in text.split("\n") if (words := line.split())]
    bare = [[word.rstrip("".join(MARKS)) for word in words] for words in lines]
    found = []
    for place, (words, plain) in enumerate(zip(lines, bare)):
        marks = [word[len(stem) :][:1] for word, stem in zip(words, plain)]
        if not all(plain):
            continue
        if kind == "sentence" and marks[-1]:
            found.append(Item(tuple(plain), label=MARKS.index(marks[-1])))
        elif kind == "tags":
            found.append(Item(tuple(plain), tags=tuple(MARKS.index(mark) + 1 if mark else 0 for mark in marks)))
        elif kind == "pair" and place + 1 < len(lines):
            other = (place + 1 + (7 * place) % (len(lines) - 2) + 1) % len(lines) if len(lines) > 3 else place
            goes_on = place % 2 == 0
            found.append(Item(tuple(plain), tuple(bare[place + 1 if goes_on else other]), label=0 if goes_on else 1))
        elif kind == "span" and len(plain) >= 5 and 0 < place < len(lines) - 1:
            passage = [*lines[place - 1], *words, *lines[place + 1]]
            begin = len(lines[place - 1])
            span = begin + 3, begin + len(words) - 1
            answer = " ".join(passage[span[0] : span[1] + 1])
            found.append(Item(tuple(words[:3]), tuple(passage), span=span, answers=(answer,)))
    return found


def _glue(folder: Path) -> Task:
    """sentence, label: GLUE's tsv files with a header line."""
    parts = []
    for name in ("train.tsv", "dev.tsv"):
        rows = [row for row in csv.reader(_lines(folder, name), delimiter="\t", quoting=csv.QUOTE_NONE) if row]
        if not rows or rows[0][:2] != ["sentence", "label"]:
            raise UserError(
                f"{folder / name} does not begin with the line 'sentence, label' of GLUE's single sentences"
            )
        if bad := [row for row in rows[1:] if len(row) != 2 or not row[1].strip().isdigit()]:
            raise UserError(f"{folder / name} has a line that is no sentence and label: {bad[0]!r}")
        parts.append([Item(tuple(row[0].split()), label=int(row[1])) for row in rows[1:] if row[0].split()])
    train, test = parts
    count = 1 + max(item.label for item in [*train, *test])
    names = ("negative", "positive") if count == 2 else tuple(map(str, range(count)))
    return Task(
        [item for i, item in enumerate(train) if i % 20], train[::20], test, names, folder.name, str(folder),
        "dev.tsv is the test; every 20th line of train.tsv validates",
    )  # fmt: skip


def _conllu(folder: Path) -> Task:
    """Words and their universal part of speech."""
    read = tagged.official(folder)
    parts = [[Item(s.words, tags=s.tags) for s in part] for part in (read.train, read.validation, read.test)]
    return Task(parts[0], parts[1], parts[2], read.classes, read.name, read.source)


def _squad(folder: Path) -> Task:
    """Questions with a passage; the answer as whole words of it."""
    name = next((n for n in ("dev-v1.1.json", "dev-v1.1.json.gz") if (folder / n).is_file()), "dev-v1.1.json")
    parts: tuple[list[Item], ...] = ([], [], [])
    try:
        articles = json.loads("\n".join(_lines(folder, name)))["data"]
        for place, article in enumerate(articles):
            part = parts[0 if place % 10 < 7 else 1 if place % 10 == 7 else 2]
            for paragraph in article["paragraphs"]:
                passage = paragraph["context"]
                words = [(match.start(), match.end()) for match in re.finditer(r"\S+", passage)]
                for question in paragraph["qas"]:
                    answer = question["answers"][0]
                    begin = answer["answer_start"]
                    end = begin + len(answer["text"])
                    inside = [i for i, (low, high) in enumerate(words) if low < end and high > begin]
                    part.append(
                        Item(
                            tuple(question["question"].split()), tuple(passage[a:b] for a, b in words),
                            span=(inside[0], inside[-1]), answers=tuple(a["text"] for a in question["answers"]),
                        )
                    )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder / name} is no file of SQuAD 1.1 ({type(error).__name__}: {error})") from error
    note = "articles of the development file, split 7 : 1 : 2; the official training file is not used"
    return Task(parts[0], parts[1], parts[2], (), folder.name, str(folder), note)


def _lines(folder: Path, name: str) -> list[str]:
    return texts.read(folder / name, "put the official file there").split("\n")


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Encoded:
    """Tokens of an item, [CLS] first [SEP] (second [SEP]): ids, types (T,) int64, and where its words begin.

    `places` are the positions of the first pieces of the words that are asked about, `ends` of their last ones, and `words` the
    numbers of these words: of the first text, or for spans of the second.
    """

    ids: Tensor
    types: Tensor
    places: Tensor
    ends: Tensor
    words: Tensor


def encode(item: Item, tokens: WordPiece, context: int, kind: str, stride: int = 0) -> list[Encoded]:
    """The item in at most `context` tokens; what does not fit is cut, the longer text first. A word is never cut in two.

    For "span" the second text goes on in further windows that begin `stride` words later, until all of it has been seen.
    """
    first, second = ([_pieces(word, tokens) for word in words] for words in (item.first, item.second))
    if kind != "span":
        room = context - 2 - (1 if second else 0)
        while sum(map(len, first)) + sum(map(len, second)) > room:
            (first if sum(map(len, first)) >= sum(map(len, second)) else second).pop()
        return [_joined(tokens, first, second, 0, asked_second=False)]
    while sum(map(len, first)) > (context - 3) // 2:
        first.pop()
    room, begin, found = context - 3 - sum(map(len, first)), 0, []
    while True:
        end, used = begin, 0
        while end < len(second) and used + len(second[end]) <= room:
            used += len(second[end])
            end += 1
        if end == begin and end < len(second):  # one word longer than all the room
            begin += 1
            continue
        found.append(_joined(tokens, first, second[begin:end], begin, asked_second=True))
        if end >= len(second) or not stride:
            return found
        begin += min(stride, end - begin)


def _pieces(word: str, tokens: WordPiece) -> list[int]:
    return [i for part in tokens.words(word) for i in tokens.pieces(part)] or [tokens.unknown]


def _joined(
    tokens: WordPiece, first: Sequence[list[int]], second: Sequence[list[int]], begin: int, asked_second: bool
) -> Encoded:
    ids = [tokens.cls, *(i for word in first for i in word), tokens.sep]
    behind = len(ids)
    if second or asked_second:
        ids += [*(i for word in second for i in word), tokens.sep]
    at, places, ends = (behind if asked_second else 1), [], []
    for word in second if asked_second else first:
        places.append(at)
        at += len(word)
        ends.append(at - 1)
    types = torch.zeros(len(ids), dtype=torch.int64)
    types[behind:] = 1
    numbers = torch.arange(len(places)) + (begin if asked_second else 0)
    return Encoded(
        torch.tensor(ids),
        types,
        torch.tensor(places, dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int64),
        numbers,
    )


# ------------------------------------------------------------------------------------------------- the rules of SQuAD 1.1


def _normal(text: str) -> list[str]:
    """Small letters, no punctuation, no articles, single spaces: the words of an answer as SQuAD's rules compare them."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 where the answer equals one of those that people gave, else 0."""
    return float(any(_normal(answer) == _normal(other) for other in answers))


def answer_f1(answer: str, answers: Sequence[str]) -> float:
    """F1 of the words that the answer shares with that of the people's answers which it fits best."""
    best, ours = 0.0, _normal(answer)
    for other in answers:
        theirs = _normal(other)
        shared = sum((Counter(ours) & Counter(theirs)).values())
        if shared:
            precision, recall = shared / len(ours), shared / len(theirs)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best
