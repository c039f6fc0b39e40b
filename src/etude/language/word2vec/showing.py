"""What a reader sees of word vectors: a map, a table of neighbours, and sums of words typed on the terminal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.blocks.pictures.panels import label, panels
from etude.blocks.pictures.plots import INK, PALETTE
from etude.core.errors import UserError
from etude.language.word2vec.scores import nearest

__all__ = ["map_figure", "neighbour_table", "parse"]


def neighbour_table(words: list[str], vectors: Tensor, count: int = 12) -> str:
    """A line for each of `count` words of middling frequency: its five nearest."""
    lines = []
    first = min(30, len(words) // 4)
    for place in range(first, min(first + count * 12, len(words)), 12):
        row, _ = nearest(vectors, vectors[place], 5, [place])
        lines.append(f"{words[place]:>12}   {'  '.join(words[i] for i in row)}")
    return "\n".join(lines)


def map_figure(words: list[str], vectors: Tensor, count: int = 110) -> Any:
    """The unit vectors of `count` frequent words in the plane of their two largest principal components."""
    first = min(20, len(words) // 4)
    chosen = F.normalize(vectors[first : first + count].double(), dim=1)
    centred = chosen - chosen.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    place = F.pad(
        centred @ directions[:2].t(), (0, 2 - min(2, len(directions)))
    )  # one direction where there is no second
    figure, (axes,) = panels(width=7.2, height=5.4)
    axes.plot(*place.t().numpy(), ".", color=PALETTE[0], markersize=2)
    for word, at in zip(words[first:], place.tolist()):
        axes.annotate(word, at, fontsize=6.5, color=INK, xytext=(2, 1), textcoords="offset points")
    axes.set_xticks([])
    axes.set_yticks([])
    label(axes, "A map of the words")
    return figure


def parse(query: str, words: list[str]) -> list[tuple[float, int]]:
    """[(±1, place of the word)] of a sum of words. Raises UserError for a word that is not known."""
    terms, sign = [], 1.0
    for part in query.lower().replace("+", " + ").replace("-", " - ").split():
        if part in "+-":
            sign = 1.0 if part == "+" else -1.0
        elif part in words:
            terms.append((sign, words.index(part)))
            sign = 1.0
        else:
            raise UserError(f"the word {part!r} is not among the {len(words)} that were learned")
    if not terms:
        raise UserError(f"{query!r} names no word; write a word, or a sum such as 'king - man + woman'")
    return terms
