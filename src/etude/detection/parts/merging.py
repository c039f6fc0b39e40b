"""Greedy merging of boxes: of all that windows say, the two that match best become one, until none match

Paper: Sermanet, Eigen, Zhang, Mathieu, Fergus, LeCun, OverFeat, 2013, arXiv:1312.6229, §4.3.

Equation: of boxes a, b of one class, centres c, root of the mean area r,
    m(a, b) = 1 − IoU(a, b) + ‖c_a − c_b‖ / r;
while the least m is at most a threshold, that pair is replaced by the mean of its coordinates, with the sum of its confidences.

Differences:
- E35: the notes average boxes "weighted by probability". Coordinates are averaged pair by pair, greedily; confidences add up.
- The paper's match is "the sum of the distance between centers … and the intersection area", which would keep those apart that
  overlap most; here the intersection counts for the match, and both terms are free of the boxes' size.
- A sum s of confidences is said as s / (1 + s), which keeps the order and lies in [0, 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def merge(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The merged boxes of one picture: (K, 4), (K,), int64 (K,) → the same of those that are left, greatest sum first.

    Of equal matches the pair that was given first merges first; the mean stands where the first of the pair stood. Any device.
    """
    places, sums = boxes.cpu().double().numpy().copy(), scores.cpu().double().numpy().copy()
    kinds = classes.cpu().long().numpy()
    alive = torch.from_numpy(_merged()(places, sums, kinds, threshold))
    order = torch.from_numpy(sums)[alive].argsort(descending=True, stable=True)
    rest = alive.nonzero()[:, 0][order].to(boxes.device)
    said = torch.from_numpy(places).to(boxes)[rest], torch.from_numpy(sums).to(scores)[rest]
    return said[0], said[1], classes[rest]


def merged(
    boxes: Tensor, scores: Tensor, least: float, threshold: float, candidates: int = 200, most: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of each picture: boxes (N, A, 4), scores (N, A, C) → as of `suppression.pick`, after merging.

    The best `candidates` scores of a picture that exceed `least` take part.
    """
    count, kinds = len(boxes), scores.shape[2]
    best, index = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    best, index = best[:, :candidates], index[:, :candidates]
    found = boxes.new_zeros(count, most, 4), boxes.new_zeros(count, most), index.new_full((count, most), -1)
    for n in range(count):
        used = best[n] > least
        at = index[n][used]
        place, total, kind = merge(boxes[n, at // kinds], best[n][used], at % kinds, threshold)
        end = min(most, len(total))
        found[0][n, :end], found[2][n, :end] = place[:end], kind[:end]
        found[1][n, :end] = (total / (1 + total))[:end]
    return found


@functools.cache
def _merged() -> Callable[..., Any]:
    """The greedy loop in machine code (compiled once, then cached): changes boxes and scores, returns who is left."""
    from numba import njit

    @njit(cache=True, nogil=True)
    def match(a, b):  # type: ignore[no-untyped-def]
        w, h = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0), max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
        one, two = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
        x, y = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        mean = max((one + two) / 2, 1e-12)
        return 1 - w * h / max(one + two - w * h, 1e-12) + np.sqrt((x * x + y * y) / mean)

    @njit(cache=True, nogil=True)
    def run(boxes, scores, kinds, threshold):  # type: ignore[no-untyped-def]
        count = len(boxes)
        alive = np.ones(count, np.bool_)
        apart = np.full((count, count), np.inf)
        for i in range(count):
            for j in range(i + 1, count):
                if kinds[i] == kinds[j]:
                    apart[i, j] = match(boxes[i], boxes[j])
        while True:
            a, b, best = -1, -1, threshold
            for i in range(count):
                if alive[i]:
                    for j in range(i + 1, count):
                        if alive[j] and (apart[i, j] < best or (a < 0 and apart[i, j] <= best)):
                            a, b, best = i, j, apart[i, j]
            if a < 0:
                return alive
            boxes[a] = (boxes[a] + boxes[b]) / 2
            scores[a] += scores[b]
            alive[b] = False
            for j in range(count):
                if alive[j] and j != a and kinds[j] == kinds[a]:
                    apart[min(a, j), max(a, j)] = match(boxes[a], boxes[j])

    return run
