"""The loops over pairs in machine code: find them, draw their noise words, and the passes of the gradient.

They compute what the functions of these names in `objective` and `pairs` define. Their work is cut into shares: of the centres in
the first pass, of the vocabulary in the others. No two shares write one number, and the bits do not depend on how many there are.
Threads are those of numba's own pool, which wait for one another without sleeping, because to wake one would take as long as a
pass. That wants a core for each: where other programs run, one thread is faster. (GNU OpenMP's pool does not outlive a fork.)

Code is compiled when it is first called (some seconds the first time ever, then from numba's cache).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit, prange, set_num_threads


def machine_code(loop: Callable[..., Any], parallel: bool = False) -> Any:
    """`loop` without the interpreter's lock, whose sums may be taken in another order."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "parallel": parallel}
    options["fastmath"] = {"contract", "reassoc", "nsz", "arcp"}
    try:
        return njit(cache=True, **options)(loop)
    except RuntimeError:  # no writable place for the cache
        return njit(**options)(loop)


def on_threads(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop over shares, its first argument, for a call with so many threads instead."""
    twin = types.FunctionType(loop.__code__, loop.__globals__)
    twin.__qualname__ = f"{loop.__name__}_on_threads"  # numba's cache tells functions apart by name, not by options
    alone, together = machine_code(loop), machine_code(twin, parallel=True)

    def call(threads: int, *arguments: Any) -> None:
        if threads > 1:
            set_num_threads(min(threads, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        (alone if threads == 1 else together)(threads, *arguments)

    return call


@machine_code
def mixed(number, key):
    """Number `number` of the stream `key`: 64 bits (splitmix64)."""
    z = key + number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@machine_code
def pick(number, key, share, alias):
    bits = mixed(number, key)
    word = ((bits >> np.uint64(32)) * np.uint64(len(alias))) >> np.uint64(32)
    if (bits & np.uint64(0xFFFFFFFF)) < share[word]:
        return np.int32(word)
    return alias[word]


@machine_code
def draw(key, share, alias, out):
    for i in range(len(out)):
        out[i] = pick(np.uint64(i + 1), key, share, alias)


@on_threads
def pairs(shares, text, first, reach, starts, key, share, alias, centre, targets):
    own = targets.shape[1] - 1
    starts[0] = 0
    for i in range(len(reach)):  # where the pairs of each centre begin
        starts[i + 1] = starts[i] + min(reach[i], first + i) + min(reach[i], len(text) - 1 - first - i)
    for part in prange(shares):
        for i in range(len(reach) * part // shares, len(reach) * (part + 1) // shares):
            at, here = starts[i], first + i
            for j in range(max(0, here - reach[i]), min(len(text), here + reach[i] + 1)):
                if j != here:
                    centre[at] = i
                    targets[at, 0] = text[j]
                    for k in range(1, own + 1):
                        targets[at, k] = pick(np.uint64(at * own + k), key, share, alias)
                    at += 1


@machine_code
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


@machine_code
def logs(odds):
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


@machine_code
def slopes(score):
    """From scores (P, 1 + K) to the derivative of log σ(s), of noise log σ(−s), in place; returns the sum of these."""
    one, flat = np.float32(1), score.ravel()
    for p in range(len(score)):
        score[p, 0] = -score[p, 0]
    exponentials(flat)  # (1 − σ) / σ
    total = logs(flat)
    for i in range(len(flat)):
        flat[i] = -(flat[i] / (one + flat[i]))
    for p in range(len(score)):
        score[p, 0] = -score[p, 0]
    return -total


@machine_code
def some_negatives(first, last, v, u, rows, centre, targets, starts, noise, weight, slope, by_v, by_noise, value):
    width, columns, many, one = v.shape[1], targets.shape[1], weight.shape[1], np.float32(1)
    two, mine, others = np.empty(many), np.empty((many, width), v.dtype), np.empty((many, width), v.dtype)
    change, score = np.empty((many, width), v.dtype), np.empty((many, many), v.dtype)  # of noise word m and centre i
    for block in range(first, last):
        begin = block * many
        for i in range(many):
            word = rows[begin + i]
            for d in range(width):
                mine[i, d], by_v[begin + i, d] = v[word, d], 0
        for p in range(starts[block], starts[block + 1]):
            own = mine[centre[p] - begin]
            for k in range(columns):
                row, dot = u[targets[p, k]], np.float32(0)
                for d in range(width):
                    dot += row[d] * own[d]
                slope[p, k] = dot
        total = slopes(slope[starts[block] : starts[block + 1]])
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


@on_threads
def negatives(shares, v, u, rows, centre, targets, starts, noise, weight, slope, by_v, by_noise, value):
    blocks = len(weight)
    for part in prange(shares):
        first, last = blocks * part // shares, blocks * (part + 1) // shares
        some_negatives(first, last, v, u, rows, centre, targets, starts, noise, weight, slope, by_v, by_noise, value)


@machine_code
def mine(words, part, shares):
    """The places in `words` (N,) of those that belong to this share: fours of neighbours, scattered by the golden section."""
    places, found = np.empty(len(words), np.int32), 0
    for i in range(len(words)):
        places[found] = i
        found += ((((words[i] >> 2) * 40503) & 0xFFFF) * shares) >> 16 == part
    return places[:found]


@machine_code
def some_add(part, shares, into, rows, change, rate):
    for i in mine(rows, part, shares):
        row, step, gain = into[rows[i]], change[i], rate[rows[i]]
        for d in range(len(step)):
            row[d] += gain * step[d]


@on_threads
def spread(shares, into, v, rows, centre, targets, slope, noise, by_noise, rate):
    words, gains, columns = targets.ravel(), slope.ravel(), targets.shape[1]
    for part in prange(shares):
        for i in mine(words, part, shares):
            word, change = words[i], v[rows[centre[i // columns if columns > 1 else i]]]
            row, gain = into[word], rate[word] * gains[i]
            for d in range(len(change)):
                row[d] += gain * change[d]
        some_add(part, shares, into, noise, by_noise, rate)


@on_threads
def add(shares, into, rows, change, rate):
    for part in prange(shares):
        some_add(part, shares, into, rows, change, rate)
