"""Read sentences whose words carry tags: Universal Dependencies (CoNLL-U), and files with a word and its tag on each line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etude.core.errors import UserError
from etude.data import home, texts

UNKNOWN = -100
"""The tag of a word whose tag the training part does not show; it is not asked."""
Column = Literal["upos", "xpos", "deprel"]
COLUMNS = {"upos": 3, "xpos": 4, "deprel": 7}
"""Universal part of speech, the language's own part of speech, relation to the head."""
SPLITS = ("train", "dev", "test")


class Sentence(NamedTuple):
    """Words, and the number of each one's tag."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class Tagged:
    """Sentences in three parts; `classes` are the names of the tags that the training part shows."""

    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]
    classes: tuple[str, ...]
    name: str = ""
    source: str = ""
    note: str = ""

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


def folder_of(name: str) -> Path | None:
    """The folder of that path, or of that name among the datasets."""
    return next((path for path in (Path(name).expanduser(), home() / name) if path.is_dir()), None)


def read(name: str, column: Column = "upos") -> Tagged:
    """Tagged sentences of a folder with *-ud-train, *-ud-dev and *-ud-test.conllu (plain or .gz), or of one file.

    A file has CoNLL-U's ten columns, or a word first and its tag last on each line; an empty line ends a sentence. Of every
    ten sentences of a file the first eight train, the ninth validates and the tenth is the test.
    """
    folder = folder_of(name)
    if folder is not None:
        return official(folder, column)
    path = Path(name).expanduser()
    found = sentences(path, column)
    parts = [[s for i, s in enumerate(found) if low <= i % 10 < high] for low, high in ((0, 8), (8, 9), (9, 10))]
    if not all(parts):
        raise UserError(f"{path} has {len(found)} tagged sentences; three parts need at least ten")
    return numbered(parts, path.name, str(path), "of every ten sentences eight train, one validates, one is the test")


def official(folder: Path, column: Column = "upos") -> Tagged:
    """The three official parts of a treebank of Universal Dependencies."""
    parts = []
    for split in SPLITS:
        files = sorted([*folder.glob(f"*-ud-{split}.conllu"), *folder.glob(f"*-ud-{split}.conllu.gz")])
        if not files:
            raise UserError(f"{folder} has no file *-ud-{split}.conllu, plain or .gz")
        parts.append(sentences(files[0], column))
    return numbered(parts, folder.name, str(folder))


def numbered(parts: list[list[list[tuple[str, str]]]], name: str, source: str, note: str = "") -> Tagged:
    """The tags of the training part as numbers, in the order of their names. Raises UserError where nothing is to be learned."""
    names = tuple(sorted({tag for sentence in parts[0] for _, tag in sentence}))
    for part, split in zip(parts, ("training", "validation", "test")):
        if not part:
            raise UserError(f"{source} has no tagged sentence in its {split} part")
        if not any(tag in names for sentence in part for _, tag in sentence):
            raise UserError(f"the {split} part of {source} has no tag that its training part has")
    if len(names) < 2:
        said = (
            " (_: none is given); another --column may have some" if names == ("_",) else ": there is nothing to learn"
        )
        raise UserError(f"every word of {source} has the tag {names[0]!r}{said}")
    number = {tag: place for place, tag in enumerate(names)}
    made = [
        [Sentence(tuple(w for w, _ in s), tuple(number.get(tag, UNKNOWN) for _, tag in s)) for s in part]
        for part in parts
    ]
    return Tagged(made[0], made[1], made[2], names, name, source, note)


def sentences(path: Path, column: Column = "upos") -> list[list[tuple[str, str]]]:
    """(word, tag) of each sentence of a file; lines of multiword tokens and empty nodes are left out."""
    found: list[list[tuple[str, str]]] = [[]]
    lines = texts.read(path, "put the official file there, or name a file of tagged words").split("\n")
    full = next((line.count("\t") == 9 for line in lines if line.strip() and not line.startswith("#")), False)
    for place, line in enumerate(lines, 1):
        cells = line.split("\t") if full or ".conllu" in path.name else line.split()
        if not line.strip() or line.startswith("-DOCSTART-"):
            found.append([])
        elif full or ".conllu" in path.name:
            if not line.startswith("#") and cells[0].isdigit():
                if len(cells) != 10:
                    raise UserError(f"{path} has a line of {len(cells)} columns where CoNLL-U has 10: {line[:60]!r}")
                found[-1].append((cells[1].replace(" ", ""), cells[COLUMNS[column]]))
        elif len(cells) < 2:
            raise UserError(f"{path}, line {place}, has no word and tag: {line[:60]!r}")
        else:
            found[-1].append((cells[0], cells[-1]))
    return [sentence for sentence in found if sentence]
