"""The loops over pairs in machine code: find them, draw their noise words, and the two passes of the gradient.

They compute what the functions of these names in `objective` define. A thread takes a share of the centres in
the first pass and of the vocabulary in the second, so no two write one number, and the bits do not depend on their count.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Kernels", "compiled", "draw", "exponentials", "pairs"]

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


def exponentials(score):
    """e^s of float32 scores (N,) in place within 3 units in the last place, by arithmetic that vector instructions know.

    s = k ln 2 + r with |r| ≤ ½ ln 2, and e^r by its series; s is cut at ±80, NaN stays.
    """
    bits = score.view(np.int32)
    for i in range(len(score)):
        y = min(max(score[i], np.float32(-80)), np.float32(80))
        k = np.int32(y * np.float32(1.4426950) + np.float32(127.5)) - np.int32(127)  # of a sum > 0: rounded
        whole = np.float32(k)
        r = y - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)  # ln 2 in two parts
        p = np.float32(1 / 5040) * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(1 / 2)
        score[i] = p * r * r + r + np.float32(1)
        bits[i] += k << 23 if y == y else np.int32(0)  # · 2^k


def _logs(odds):
    """Σ log(1 + odds) of numbers (N,) ≤ e^80, with few logarithms: eight factors stay below 1e279."""
    product, total = 1.0, 0.0
    for begin in range(0, len(odds), 8):
        eight = 1.0
        for i in range(begin, min(begin + 8, len(odds))):
            eight *= 1.0 + odds[i]
        product *= eight
        if not product < 1e28:
            total += math.log(product)
            product = 1.0
    return total + math.log(product)


def _slopes(score):
    """From scores (P, 1 + K) to the derivative of log σ(s), of noise log σ(−s), in place; returns the sum of these."""
    one, flat = np.float32(1), score.ravel()
    for p in range(len(score)):
        score[p, 0] = -score[p, 0]
    exponentials(flat)  # (1 − σ) / σ
    total = _logs(flat)
    for i in range(len(flat)):
        flat[i] = -(flat[i] / (one + flat[i]))
    for p in range(len(score)):
        score[p, 0] = -score[p, 0]
    return -total


def _negatives(first, last, v, u, rows, centre, targets, starts, noise, weight, slope, by_v, by_noise, value):
    width, columns, many, one = v.shape[1], targets.shape[1], weight.shape[1], np.float32(1)
    two, mine, others = np.empty(many), np.empty((many, width), v.dtype), np.empty((many, width), v.dtype)
    change, score = np.empty((many, width), v.dtype), np.empty((many, many), v.dtype)  # of noise word m and centre i
    for block in range(first, last):
        begin = block * many
        for i in range(many):
            word = rows[begin + i]
            for d in range(width):
                mine[i, d] = v[word, d]
        for p in range(starts[block], starts[block + 1]):
            own = mine[centre[p] - begin]
            for k in range(columns):
                row, dot = u[targets[p, k]], np.float32(0)
                for d in range(width):
                    dot += row[d] * own[d]
                slope[p, k] = dot
        total = _slopes(slope[starts[block] : starts[block + 1]])
        for p in range(starts[block], starts[block + 1]):
            up = by_v[centre[p]]
            for k in range(columns):
                row, gain = u[targets[p, k]], slope[p, k]
                for d in range(width):
                    up[d] += gain * row[d]
        value[block] = total
        if len(noise) == 0:
            continue
        for m in range(many):
            word = noise[begin + m]
            for d in range(width):
                others[m, d] = u[word, d]
        np.dot(others, mine.T, score)
        exponentials(score.ravel())  # σ(s) / (1 − σ(s))
        two[:] = 1.0
        for m in range(many):
            for i in range(many):
                two[i] *= 1.0 + score[m, i]
                score[m, i] = -weight[block, i] * (score[m, i] / (one + score[m, i]))
            if m % 8 == 7 or m + 1 == many:  # eight factors stay below 1e279
                for i in range(many):
                    if not two[i] < 1e28 or m + 1 == many:
                        total -= weight[block, i] * math.log(two[i])
                        two[i] = 1.0
        value[block] = total
        np.dot(score.T, others, change)
        for i in range(many):
            for d in range(width):
                by_v[begin + i, d] += change[i, d]
        np.dot(score, mine, by_noise[begin : begin + many])


def _order(targets, centre, slope, rows, noise, start, who, gain):
    """Sort by target word w: the words of its centres who[start[w]:start[w + 1]], ascending in the text, and the slopes there.

    Behind them, as −1 − m with a slope of 1, the places m of `noise` that hold w.
    """
    pairs, columns = targets.shape
    for p in range(pairs):
        for k in range(columns):
            start[targets[p, k] + 1] += 1
    for m in range(len(noise)):
        start[noise[m] + 1] += 1
    for word in range(len(start) - 1):
        start[word + 1] += start[word]
    at = start.copy()
    for p in range(pairs):
        for k in range(columns):
            place = at[targets[p, k]]
            who[place], gain[place] = rows[centre[p]], slope[p, k]
            at[targets[p, k]] += 1
    for m in range(len(noise)):
        place = at[noise[m]]
        who[place], gain[place] = -1 - m, 1
        at[noise[m]] += 1


def _spread(low, high, into, v, by_noise, start, who, gain, rate):
    width = v.shape[1]
    total = np.empty(width, v.dtype)
    for word in range(low, high):
        if start[word] < start[word + 1]:
            total[:] = 0
            for at in range(start[word], start[word + 1]):
                scale, mine = gain[at], v[who[at]] if who[at] >= 0 else by_noise[-1 - who[at]]
                for d in range(width):
                    total[d] += scale * mine[d]
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
    compiled(_draw)(np.uint64(key), share, alias, out)
    return out


def pairs(
    text: Array, first: int, last: int, reach: Array, negatives: int, key: int, share: Array, alias: Array
) -> tuple[Array, Array]:
    """See `pairs.neighbours`."""
    most = 2 * int(reach.sum())
    centre, targets = np.empty(most, np.int32), np.empty((most, 1 + negatives), np.int32)
    count = compiled(_pairs)(text, first, last, reach, np.uint64(key), share, alias, centre, targets)
    return centre[:count], targets[:count]


@dataclass(frozen=True)
class Kernels:
    """The functions of `objective` for contiguous float32 tensors on the CPU, on so many threads.

    torch should have one thread meanwhile: more would wait for its next call on the cores that are needed here.
    """

    threads: int

    def negatives(
        self, v: Tensor, u: Tensor, rows: Tensor, centre: Tensor, targets: Tensor, noise: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (blocks, many), width = weight.shape, v.shape[1]
        slope, value = torch.empty(targets.shape, dtype=v.dtype), torch.zeros(blocks, dtype=torch.float64)
        by_v, by_noise = v.new_zeros(len(rows), width), v.new_empty(len(noise), width)
        starts = np.searchsorted(centre.numpy(), np.arange(0, blocks * many + 1, many, dtype=np.int32))
        cuts = [blocks * share // self.threads for share in range(self.threads + 1)]
        arrays = [part.numpy() for part in (v, u, rows, centre, targets)]
        results = [part.numpy() for part in (slope, by_v, by_noise, value)]
        _on_threads(_negatives, cuts, *arrays, starts, noise.numpy(), weight.numpy(), *results)
        return value.sum(), slope, by_v, by_noise

    def spread(
        self, into: Tensor, v: Tensor, rows: Tensor, centre: Tensor, targets: Tensor, slope: Tensor, noise: Tensor,
        by_noise: Tensor, rate: Tensor,
    ) -> None:  # fmt: skip
        """The changes of one row are summed before they are added."""
        count, slopes, words = targets.numel() + len(noise), slope.numpy(), noise.numpy()
        start, who, gain = np.zeros(len(into) + 1, np.int32), np.empty(count, np.int32), np.empty(count, slopes.dtype)
        compiled(_order)(targets.numpy(), centre.numpy(), slopes, rows.numpy(), words, start, who, gain)
        inner = np.searchsorted(start, [count * share // self.threads for share in range(1, self.threads)])
        arrays = into.numpy(), v.numpy(), by_noise.numpy(), start, who, gain, rate.numpy()
        _on_threads(_spread, [0, *inner.tolist(), len(into)], *arrays)

    def add(self, into: Tensor, rows: Tensor, change: Tensor, rate: Tensor) -> None:
        compiled(_add)(into.numpy(), rows.numpy(), change.numpy(), rate.numpy())


def _on_threads(kernel: Callable[..., None], cuts: list[int], *arguments: Any) -> None:
    """Each thread takes the numbers between two neighbours of `cuts`."""
    shares = [*itertools.pairwise(cuts)]
    work = [_pool(len(shares) - 1).submit(compiled(kernel), *share, *arguments) for share in shares[1:]]
    compiled(kernel)(*shares[0], *arguments)
    for part in work:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@functools.cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code without the interpreter's lock (some seconds the first time ever, then from numba's cache)."""
    from numba import njit
    from numba.extending import register_jitable

    for part in (_mixed, _pick, exponentials, _logs, _slopes):
        register_jitable(part)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"contract", "reassoc", "nsz", "arcp"}
    try:
        return njit(cache=True, **options)(kernel)
    except RuntimeError:  # no writable place for the cache
        return njit(**options)(kernel)
