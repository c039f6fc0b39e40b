"""A generated language in which words mean what others, before or behind them, say: a task of tags without any download.

Names are made up: those in -a are women (F), those in -o men (M). `they` has the tag of the last name before it, `dear` that of
the next name behind it; all other words have a tag of their own. The names of the test are mostly new.
"""

from __future__ import annotations

from random import Random

from etude.data.tagged import Tagged, numbered

__all__ = ["people"]

VERBS = ("sing", "walk", "read", "meet", "cook", "hide")
NOUNS = ("garden", "letter", "river", "window", "bread", "song")
WORDS = ("the", "a", "old", "in", "with")
COUNTS = (1200, 150, 300)


def people(counts: tuple[int, int, int] = COUNTS, seed: int = 0) -> Tagged:
    """`counts` sentences of the three parts, always the same ones."""
    dice = Random(seed)
    parts = [[sentence(dice) for _ in range(count)] for count in counts]
    return numbered(parts, "people", "generated", "made-up names decide what the words around them mean")


def sentence(dice: Random) -> list[tuple[str, str]]:
    """A sentence of two to four names with one to five words between two of them."""
    said = [name(dice)]
    for _ in range(dice.randint(1, 3)):
        after, between = name(dice), []
        for _ in range(dice.randint(1, 5)):
            kind = dice.choice(("they", "dear", "VERB", "NOUN", "WORD"))
            words = {"VERB": VERBS, "NOUN": NOUNS, "WORD": WORDS}.get(kind, (kind,))
            tag = {"they": said[-1][1], "dear": after[1]}.get(kind, kind)
            between.append((dice.choice(words), tag))
        said += [*between, after]
    return said


def name(dice: Random) -> tuple[str, str]:
    """A made-up name and its tag."""
    begin = "".join(dice.choice("bdfglmnrst") + dice.choice("aeiou") for _ in range(dice.randint(1, 2)))
    woman = dice.random() < 0.5
    return (begin + dice.choice("bdfglmnrst") + ("a" if woman else "o")).capitalize(), "F" if woman else "M"
