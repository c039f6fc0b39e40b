"""A generated language whose words can be known by the company they keep alone: a task of tags without any download.

Words are random letters, in every class alike, so spelling says nothing; a sentence is two clauses DET (ADJ)* NOUN VERB (ADV). Of
the training part all may be read, and a dozen labelled sentences show few of the words.
"""

from __future__ import annotations

from random import Random

from etude.language.parts.tasks import Item, Task

__all__ = ["company"]

CLASSES = {"DET": 3, "ADJ": 30, "NOUN": 40, "VERB": 40, "ADV": 20}
"""How many words each class has."""
LETTERS = "abdegiklmnorstu"


def company(counts: tuple[int, int, int] = (800, 60, 120), seed: int = 0) -> Task:
    """`counts` sentences of the three parts, always the same ones."""
    dice = Random(seed)
    words = {tag: ["".join(dice.choice(LETTERS) for _ in range(5)) for _ in range(n)] for tag, n in CLASSES.items()}
    names = tuple(CLASSES)

    def sentence() -> Item:
        tags: list[str] = []
        for _ in range(2):
            tags += ["DET", *["ADJ"] * dice.randint(0, 2), "NOUN", "VERB", *["ADV"] * dice.randint(0, 1)]
        return Item(tuple(dice.choice(words[tag]) for tag in tags), tags=tuple(names.index(tag) for tag in tags))

    parts = [[sentence() for _ in range(count)] for count in counts]
    return Task(
        parts[0],
        parts[1],
        parts[2],
        names,
        "company",
        "generated",
        "words of random letters, known by their neighbours alone",
    )
