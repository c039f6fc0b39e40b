"""What learns from a replay buffer, as array loops for machine code: MLPs with ReLU, their slopes, Adam, targets that follow.

Plain functions of NumPy arrays, which `replay_fused` has numba compile; uncompiled they are the same, slowly. A vector holds
a network's parameters as `optim.flat.flatten` lays them out, each layer's W (outputs, inputs) and then its b. N rows of a
minibatch, D numbers observed, A in an action. Float32 or float64 as the vectors are.

A unit that no row of a minibatch turns on passes no slope on: its rows of W are left out of the backward products, which
changes no number. Where the states have few numbers, that is half of a second layer and more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INPUTS, OUTPUTS, PLACE, UNITS = range(4)
"""Columns of a table of layers: the two widths, where W begins in the vector, and the outputs of all layers before."""


class Vectors(NamedTuple):
    """A network, or several of one shape behind each other; (P,) each."""

    theta: NDArray[Any]
    target: NDArray[Any]
    """φ', which follows; of a network that has none, θ itself."""
    gradient: NDArray[Any]
    mean: NDArray[Any]
    """Adam's average of the gradient."""
    square: NDArray[Any]


class Adam(NamedTuple):
    """The numbers of the optimizer, and how many steps it has taken."""

    alpha: float
    beta1: float
    beta2: float
    eps: float
    taken: int


class Room(NamedTuple):
    """Where a network's numbers stand meanwhile, for at most R rows and U units in all layers, of which W at most in one."""

    kept: NDArray[Any]
    """(R U,) what leaves the layers."""
    full: NDArray[Any]
    """(R W,) slopes by all units of a layer."""
    some: NDArray[Any]
    """(R W,) slopes by those that are on."""
    picked: NDArray[Any]
    """(2, the largest layer's W) rows of W, and of its gradient."""
    alive: NDArray[np.int64]
    """(W,) units that are on."""
    rows: NDArray[np.int64]
    """(R,) rows that count."""


# ------------------------------------------------------------------------------------------------------- networks


def weight(vector, layers, layer):
    """W (outputs, inputs) of a layer: a view of the parameters, or of their gradient."""
    size = layers[layer, INPUTS] * layers[layer, OUTPUTS]
    start = layers[layer, PLACE]
    return vector[start : start + size].reshape((layers[layer, OUTPUTS], layers[layer, INPUTS]))


def bias(vector, layers, layer):
    """b (outputs,) of a layer, likewise."""
    start = layers[layer, PLACE] + layers[layer, INPUTS] * layers[layer, OUTPUTS]
    return vector[start : start + layers[layer, OUTPUTS]]


def units(kept, layers, layer, count):
    """(N, outputs) of what leaves a layer: a view of `kept`."""
    start = layers[layer, UNITS] * count
    return kept[start : start + count * layers[layer, OUTPUTS]].reshape((count, layers[layer, OUTPUTS]))


def table(space, rows, columns):
    """The beginning of a vector as (rows, columns)."""
    return space[: rows * columns].reshape((rows, columns))


def shift(h, b):
    """h (N, outputs) + b (outputs,) in place."""
    for i in range(len(h)):
        for j in range(len(b)):
            h[i, j] += b[j]


def rectify(h, b):
    """max(h + b, 0) in place, likewise."""
    zero = h.dtype.type(0)
    for i in range(len(h)):
        for j in range(len(b)):
            h[i, j] = max(h[i, j] + b[j], zero)


def add_up(delta, total):
    """Sums over the rows of delta (N, outputs) into total (outputs,)."""
    for j in range(len(total)):
        total[j] = 0
    for i in range(len(delta)):
        for j in range(len(total)):
            total[j] += delta[i, j]


def forward(theta, layers, x, kept):
    """What leaves the last layer (N, outputs), for x (N, inputs): the last part of what fills `kept`."""
    for layer in range(len(layers)):
        h = units(kept, layers, layer, len(x))
        below = x if layer == 0 else units(kept, layers, layer - 1, len(x))
        np.dot(below, weight(theta, layers, layer).T, h)
        if layer + 1 < len(layers):
            rectify(h, bias(theta, layers, layer))
        else:
            shift(h, bias(theta, layers, layer))
    return units(kept, layers, len(layers) - 1, len(x))


def awake(h, rows, top, alive):
    """How many units of h (N, outputs) any of the rows turns on; they stand in `alive`. `top` (outputs,) is room."""
    for j in range(len(top)):
        top[j] = 0
    for row in rows:
        for j in range(len(top)):
            top[j] = max(top[j], h[row, j])
    count = 0
    for j in range(len(top)):
        if top[j] > 0:
            alive[count] = j
            count += 1
    return count


def pick(source, chosen, out):
    """Rows `chosen` of source into out (len(chosen), columns)."""
    for i in range(len(chosen)):
        to, row = out[i], source[chosen[i]]
        for j in range(len(row)):
            to[j] = row[j]


def put(source, chosen, out):
    """Rows of source (len(chosen), columns) as rows `chosen` of out."""
    for i in range(len(chosen)):
        to, row = out[chosen[i]], source[i]
        for j in range(len(row)):
            to[j] = row[j]


def gate(full, h, rows):
    """The slope by what enters ReLU in place of that by what leaves it: full (rows, outputs), for h (N, outputs)."""
    zero = full.dtype.type(0)
    for i in range(len(rows)):
        by, on = full[i], h[rows[i]]
        for j in range(len(by)):
            slope = by[j]
            by[j] = slope if on[j] > zero else zero


def squeeze(full, chosen, out):
    """Columns `chosen` of full into out (rows, len(chosen))."""
    for i in range(len(full)):
        for c in range(len(chosen)):
            out[i, c] = full[i, chosen[c]]


def down(theta, layers, layer, delta, rows, room, count):
    """The slope by what enters the layer below, (rows, alive units), and which these are, given `delta` by what leaves this one.

    `delta` may be that of all this layer's units or, where W's rows stand in `room.picked`, of some. In the first layer, behind
    which no product is large, all units count as alive.
    """
    h = units(room.kept, layers, layer - 1, count)
    full = table(room.full, len(rows), h.shape[1])
    np.dot(delta, table(room.picked[0], delta.shape[1], h.shape[1]), full)
    gate(full, h, rows)
    if layer == 1:
        alive = room.alive[: h.shape[1]]
        for j in range(len(alive)):
            alive[j] = j
        return full, alive
    alive = room.alive[: awake(h, rows, room.picked[1, : h.shape[1]], room.alive)]
    out = table(room.some, len(rows), len(alive))
    squeeze(full, alive, out)
    return out, alive


def backward(theta, layers, x, delta, room, gradient):
    """Write ∂L/∂θ into `gradient`, given ∂L/∂output `delta` (N, outputs) and what `forward` kept in `room`."""
    count, rows = len(x), room.rows[: len(x)]
    for i in range(count):
        rows[i] = i
    top = len(layers) - 1
    w = weight(theta, layers, top)
    below = x if top == 0 else units(room.kept, layers, top - 1, count)
    np.dot(delta.T, below, weight(gradient, layers, top))
    add_up(delta, bias(gradient, layers, top))
    room.picked[0, : w.size] = w.reshape(w.size)
    for layer in range(top - 1, -1, -1):
        delta, alive = down(theta, layers, layer + 1, delta, rows, room, count)
        by_weight, by_bias = weight(gradient, layers, layer), bias(gradient, layers, layer)
        below = x if layer == 0 else units(room.kept, layers, layer - 1, count)
        found = table(room.picked[1], len(alive), below.shape[1])
        np.dot(delta.T, below, found)
        by_weight[:] = 0
        by_bias[:] = 0
        put(found, alive, by_weight)
        total = room.picked[0, : len(alive)]
        add_up(delta, total)
        for c in range(len(alive)):
            by_bias[alive[c]] = total[c]
        if layer:
            w = weight(theta, layers, layer)
            pick(w, alive, table(room.picked[0], len(alive), w.shape[1]))


def climb(theta, layers, share, room, slope):
    """Add ∂/∂u Σ_i share_i Q(s_i, u_i) to slope (N, A), of a critic whose `forward` filled `room`; share (N,).

    Rows whose share is 0 are left out.
    """
    n = 0
    for i in range(len(share)):
        if share[i] != 0:
            room.rows[n] = i
            n += 1
    if n == 0:
        return
    rows, top = room.rows[:n], len(layers) - 1
    delta = np.empty((n, 1), theta.dtype)
    for i in range(n):
        delta[i, 0] = share[rows[i]]
    w = weight(theta, layers, top)
    room.picked[0, : w.size] = w.reshape(w.size)
    for layer in range(top - 1, -1, -1):
        delta, alive = down(theta, layers, layer + 1, delta, rows, room, len(share))
        w = weight(theta, layers, layer)
        pick(w, alive, table(room.picked[0], len(alive), w.shape[1]))
    w = table(room.picked[0], delta.shape[1], layers[0, INPUTS])
    first = layers[0, INPUTS] - slope.shape[1]
    for i in range(n):
        for a in range(slope.shape[1]):
            total = slope.dtype.type(0)
            for c in range(delta.shape[1]):
                total += delta[i, c] * w[c, first + a]
            slope[rows[i], a] += total


def descend(v, adam, k):
    """Adam's k-th step, in place: θ ← θ − α m̂/(√v̂ + ε)."""
    kind = v.theta.dtype.type
    new, newer = kind(1 - adam.beta1), kind(1 - adam.beta2)
    rate = kind(adam.alpha / (1 - adam.beta1**k))
    root, eps = kind(1 / math.sqrt(1 - adam.beta2**k)), kind(adam.eps)
    theta, gradient, mean, square = v.theta, v.gradient, v.mean, v.square
    for i in range(len(theta)):
        g = gradient[i]
        mean[i] += new * (g - mean[i])
        square[i] += newer * (g * g - square[i])
        theta[i] -= rate * mean[i] / (np.sqrt(square[i]) * root + eps)


def follow(v, tau):
    """φ' ← φ' + τ (φ − φ'), in place."""
    share = v.theta.dtype.type(tau)
    for i in range(len(v.theta)):
        v.target[i] += share * (v.theta[i] - v.target[i])


def length(gradient):
    """‖g‖ (float64) of numbers (P,)."""
    total = 0.0
    for i in range(len(gradient)):
        total += np.float64(gradient[i]) * np.float64(gradient[i])
    return math.sqrt(total)


def shrink(gradient, norm, most):
    """The gradient (P,) of this norm, no longer than `most` and a millionth less, in place: as torch clips it."""
    factor = gradient.dtype.type(min(1.0, most / (norm + 1e-6)))
    if factor < 1:
        for i in range(len(gradient)):
            gradient[i] *= factor
