"""The loops over pairs in machine code: find them, draw their noise words, and the two passes of the gradient.

`terms` and `spread` compute what `objective.terms` and `objective.spread` define. A thread takes a share of the centres in
the first pass and of the vocabulary in the second, so no two write one number, and the bits do not depend on their count.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["add", "draw", "pairs", "spread", "terms"]

Array = NDArray[Any]


def _mixed(number, key):
    """Number `number` of the stream `key`: 64 bits (splitmix64)."""
    z = key + number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _pick(number, key, share, alias):
    bits = _mixed(number, key)
    word = ((bits >> np.uint64(32)) * np.uint64(len(alias))) >> np.uint64(32)
    if (bits & np.uint64(0xFFFFFFFF)) < share[word]:
        return np.int32(word)
    return alias[word]


def _draw(key, share, alias, out):
    for i in range(len(out)):
        out[i] = _pick(np.uint64(i + 1), key, share, alias)


def _pairs(text, first, last, reach, key, share, alias, centre, targets):
    count, columns, drawn = 0, targets.shape[1], np.uint64(0)
    for i in range(first, last):
        for j in range(max(0, i - reach[i - first]), min(len(text), i + reach[i - first] + 1)):
            if j != i:
                centre[count] = i - first
                targets[count, 0] = text[j]
                for k in range(1, columns):
                    drawn += np.uint64(1)
                    targets[count, k] = _pick(drawn, key, share, alias)
                count += 1
    return count


def _terms(first, last, v, u, centre, targets, logistic, slope, uphill, value):
    width, columns, odds = v.shape[1], targets.shape[1], 1.0
    for p in range(first, last):
        i = centre[p]
        mine, up = v[i], uphill[i]
        for k in range(columns):
            row, score, gain = u[targets[p, k]], np.float32(0), np.float32(1)
            for d in range(width):
                score += row[d] * mine[d]
            if logistic:
                score = score if k == 0 else -score
                ratio = np.exp(-min(max(score, np.float32(-80)), np.float32(80)))  # (1 − σ) / σ
                odds *= 1.0 + ratio
                gain = ratio / (np.float32(1) + ratio)
                gain = gain if k == 0 else -gain
                if odds > 1e200:
                    value[i] -= math.log(odds)
                    odds = 1.0
            else:
                value[i] += score
            slope[p, k] = gain
            for d in range(width):
                up[d] += gain * row[d]
        if p + 1 == last or centre[p + 1] != i:  # one logarithm for all pairs of a centre
            value[i] -= math.log(odds)
            odds = 1.0


def _order(targets, start, order):
    """The places of each word w in the flat targets: order[start[w]:start[w + 1]], ascending."""
    flat = targets.ravel()
    for word in flat:
        start[word + 1] += 1
    for word in range(len(start) - 1):
        start[word + 1] += start[word]
    at = start.copy()
    for place in range(len(flat)):
        order[at[flat[place]]] = place
        at[flat[place]] += 1


def _spread(low, high, into, v, centre, slope, start, order, rate):
    width, columns, flat = v.shape[1], slope.shape[1], slope.ravel()
    total = np.empty(width, v.dtype)
    for word in range(low, high):
        if start[word] < start[word + 1]:
            total[:] = 0
            for at in range(start[word], start[word + 1]):
                gain, mine = flat[order[at]], v[centre[order[at] // columns]]
                for d in range(width):
                    total[d] += gain * mine[d]
            row = into[word]
            for d in range(width):
                row[d] += rate[word] * total[d]


def _add(into, rows, change, rate):
    for i in range(len(rows)):
        row, step, scale = into[rows[i]], change[i], rate[rows[i]]
        for d in range(len(step)):
            row[d] += scale * step[d]


def draw(count: int, key: int, share: Array, alias: Array) -> Array:
    """(count,) int32 words, see `pairs.Noise`."""
    out = np.empty(count, np.int32)
    _compiled(_draw)(np.uint64(key), share, alias, out)
    return out


def pairs(
    text: Array, first: int, last: int, reach: Array, negatives: int, key: int, share: Array, alias: Array
) -> tuple[Array, Array]:
    """See `pairs.neighbours`."""
    most = 2 * int(reach.sum())
    centre, targets = np.empty(most, np.int32), np.empty((most, 1 + negatives), np.int32)
    count = _compiled(_pairs)(text, first, last, reach, np.uint64(key), share, alias, centre, targets)
    return centre[:count], targets[:count]


def terms(v: Tensor, u: Tensor, centre: Tensor, targets: Tensor, logistic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`objective.terms` for contiguous tensors on the CPU."""
    count, threads = len(centre), torch.get_num_threads()
    slope, uphill = torch.empty(targets.shape, dtype=v.dtype), torch.zeros_like(v)
    value = torch.zeros(len(v), dtype=torch.float64)
    cuts = [0, *(count * share // threads for share in range(1, threads)), count]
    for place in range(1, threads):  # no centre is cut in two
        while 0 < cuts[place] < count and centre[cuts[place]] == centre[cuts[place] - 1]:
            cuts[place] += 1
    arrays = [part.numpy() for part in (v, u, centre, targets)]
    results = [part.numpy() for part in (slope, uphill, value)]
    _on_threads(_compiled(_terms), [*itertools.pairwise(cuts)], *arrays, logistic, *results)
    return value.sum(), slope, uphill


def spread(into: Tensor, v: Tensor, centre: Tensor, targets: Tensor, slope: Tensor, rate: Tensor) -> None:
    """`objective.spread` for contiguous tensors on the CPU: the changes of one row are summed before they are added."""
    start, order = np.zeros(len(into) + 1, np.int32), np.empty(targets.numel(), np.int32)
    _compiled(_order)(targets.numpy(), start, order)
    threads = torch.get_num_threads()
    shares = np.searchsorted(start, [len(order) * share // threads for share in range(1, threads)])
    cuts = [0, *shares.tolist(), len(into)]
    arrays = [part.numpy() for part in (into, v, centre, slope)]
    _on_threads(_compiled(_spread), [*itertools.pairwise(cuts)], *arrays, start, order, rate.numpy())


def add(into: Tensor, rows: Tensor, change: Tensor, rate: Tensor) -> None:
    """`objective.add` for contiguous tensors on the CPU."""
    _compiled(_add)(into.numpy(), rows.numpy(), change.numpy(), rate.numpy())


def _on_threads(kernel: Callable[..., None], shares: list[tuple[int, int]], *arguments: Any) -> None:
    work = [_pool(len(shares) - 1).submit(kernel, *share, *arguments) for share in shares[1:]]
    kernel(*shares[0], *arguments)
    for part in work:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code without the interpreter's lock (some seconds the first time ever, then from numba's cache)."""
    from numba import njit
    from numba.extending import register_jitable

    for part in (_mixed, _pick):
        register_jitable(part)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"contract", "reassoc", "nsz", "arcp"}
    try:
        return njit(cache=True, **options)(kernel)
    except RuntimeError:  # no writable place for the cache
        return njit(**options)(kernel)
