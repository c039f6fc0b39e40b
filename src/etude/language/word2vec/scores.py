"""What word vectors are worth: neighbours, analogies, human judgements of similarity, and a matrix factorisation beside them.

Papers: Finkelstein et al., "Placing Search in Context", 2002 (WordSimilarity-353); Mikolov et al., 2013, arXiv:1301.3781 (the
analogy questions); Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", 2014 (PMI and its SVD).
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.core.errors import UserError

__all__ = ["agreement", "analogy_scores", "nearest", "pair_counts", "ppmi_vectors", "similarity_score", "spearman"]


def nearest(vectors: Tensor, query: Tensor, count: int, without: list[int]) -> tuple[Tensor, Tensor]:
    """The `count` rows of vectors (V, D) with the largest cosine to query (D,), those in `without` left out.

    Returns (rows, cosines), each (≤ count,), the largest first.
    """
    cosine = F.normalize(vectors, dim=1) @ F.normalize(query, dim=0)
    cosine[without] = -torch.inf
    value, row = cosine.sort(descending=True, stable=True)
    keep = min(count, len(vectors) - len(set(without)))
    return row[:keep], value[:keep]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two rows of numbers (N,): Pearson's of their ranks, ties sharing their mean rank."""
    ranks = []
    for values in (a, b):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0).double() - (count.double() - 1) / 2)[place])
    first, second = (rank - rank.mean() for rank in ranks)
    scale = (first.square().sum() * second.square().sum()).sqrt()
    return float(first @ second / scale) if scale > 0 else 0.0


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Rank correlation of the cosines between all pairs of rows: ours (V, D) and theirs (V, E) → −1 … 1."""
    above = torch.triu_indices(len(ours), len(ours), 1)
    a, b = (F.normalize(table.double(), dim=1) for table in (ours, theirs))
    return spearman((a @ a.t())[above[0], above[1]], (b @ b.t())[above[0], above[1]])


def similarity_score(path: Path | str, words: list[str], vectors: Tensor) -> tuple[float, int]:
    """Spearman's ρ between cosines and human scores, and the number of pairs whose both words are known.

    The file has lines of two words and a number, separated by commas or tabs, with a header (WordSimilarity-353's
    combined.csv or combined.tab). Raises UserError for another one, and when fewer than two pairs are known.
    """
    number = {word: place for place, word in enumerate(words)}
    left, right, scores = [], [], []
    lines = _lines(path)
    rows = list(csv.reader(lines[1:], delimiter="\t" if lines and "\t" in lines[0] else ","))
    for row in rows:
        try:
            a, b, score = row[0].lower(), row[1].lower(), float(row[2])
        except (ValueError, IndexError) as error:
            raise UserError(f"{path} has a line that is not two words and a number: {','.join(row)!r}") from error
        if a in number and b in number:
            left.append(number[a])
            right.append(number[b])
            scores.append(score)
    if len(scores) < 2:
        raise UserError(f"of the {len(rows)} pairs of {path} {len(scores)} are known here, too few for a correlation")
    cosine = F.cosine_similarity(vectors[left], vectors[right], dim=1)
    return spearman(cosine, torch.tensor(scores)), len(scores)


def analogy_scores(path: Path | str, words: list[str], vectors: Tensor) -> dict[str, tuple[int, int]]:
    """(right, asked) for each section of a file like questions-words.txt, and under "all" for all of them.

    A question a b c d is right when d is nearest to b − a + c (unit vectors), a, b and c left out. Questions with an unknown
    word are not asked. Raises UserError for a file of another kind.
    """
    number = {word: place for place, word in enumerate(words)}
    unit, section = F.normalize(vectors, dim=1), ""
    asked: dict[str, list[list[int]]] = {}
    for line in _lines(path):
        parts = line.lower().split()
        if line.startswith(":"):
            section = line[1:].strip()
            asked.setdefault(section, [])
        elif len(parts) == 4 and section:
            if all(word in number for word in parts):
                asked[section].append([number[word] for word in parts])
        elif parts:
            raise UserError(f"{path} has a line that is no analogy question of four words in a section: {line!r}")
    found = {}
    for name, questions in asked.items():
        right = 0
        for part in torch.tensor(questions, dtype=torch.int64).reshape(-1, 4).split(512):
            a, b, c, d = part.t()
            cosine = (unit[b] - unit[a] + unit[c]) @ unit.t()
            cosine.scatter_(1, part[:, :3], -torch.inf)
            right += int((cosine.argmax(1) == d).sum())
        found[name] = (right, len(questions))
    return found | {"all": (sum(r for r, _ in found.values()), sum(n for _, n in found.values()))}


def pair_counts(text: Tensor, vocabulary: int, window: int, dynamic: bool) -> Tensor:
    """How often word b stands near word a, (V, V) float64, of the first V = `vocabulary` words of text (N,) int.

    A distance of δ ≤ window counts 1, or with a dynamic window the share (window − δ + 1) / window of the draws that reach it.
    """
    table = torch.zeros(vocabulary * vocabulary, dtype=torch.float64)
    for distance in range(1, window + 1):
        a, b = text[:-distance].long(), text[distance:].long()
        inside = (a < vocabulary) & (b < vocabulary)
        weight = (window - distance + 1) / window if dynamic else 1.0
        table += weight * torch.bincount(a[inside] * vocabulary + b[inside], minlength=len(table))
    square = table.view(vocabulary, vocabulary)
    return square + square.t()


def ppmi_vectors(counts: Tensor, width: int) -> Tensor:
    """Rows of U·√S of the positive PMI matrix's SVD, (V, width), from symmetric pair counts (V, V)."""
    total, single = counts.sum(), counts.sum(1, keepdim=True).clamp(min=1e-12)
    pmi = (counts * total / (single * single.t())).log().clamp(min=0)
    u, s, _ = torch.linalg.svd(pmi)
    return u[:, :width] * s[:width].sqrt()


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from error
