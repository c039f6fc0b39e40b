"""Writing with a recurrent network in machine code: one character after another with no dispatch between them.

A step of a small network is 10 µs of arithmetic in 300 µs of calls. `stream` and `generate` are those of
`blocks.tokens.decoding`, same arguments, same draws from the same dice; from FEW characters on, where a CPU computes without
dropout, they lay the weights out once, read the prompt with torch and take every further step in machine code. Numbers differ
from torch's by rounding alone; each row is computed in an order that does not depend on the rows beside it.

The loops are plain functions of NumPy arrays, which numba compiles when they are first needed; uncompiled they are the same,
slowly. Float32 or float64, as the weights are; in float32 tanh and σ are arithmetic that vector instructions know.

Legend: B rows, V vocabulary, D width, G gates times D, L layers, N characters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.blocks.nn.tanh import bend as bend_quickly
from etude.blocks.tokens import decoding
from etude.core.errors import UserError
from etude.sequence.parts.text import CharacterModel

__all__ = ["FEW", "Weights", "fits", "generate", "laid_out", "loop", "stream"]

FEW = 2000
"""Characters a row below which torch writes: machine code takes 0.6 s to load (and some seconds to compile, once ever)."""

ROWS = 16
"""Rows side by side above which torch writes: there its products are the larger part and ours no faster."""

AT_ONCE = 1 << 20
"""Numbers drawn ahead in `generate`, at most."""

RNN, RNN_RELU, LSTM, GRU, GRU_CHO = range(5)
_CELLS = {"rnn": RNN, "rnn_relu": RNN_RELU, "lstm": LSTM, "lstm_peephole": LSTM, "gru": GRU, "gru_cho": GRU_CHO}
GREEDY, DRAWN, GIVEN = range(3)
"""How the next character comes about: the most probable, from the dice, or by someone else, from the logits."""


class Weights(NamedTuple):
    """A model as the loops read it: matrices transposed, what does not depend on the text computed once."""

    table: NDArray[Any]
    """(V, G): W·e + b of every character e in the lowest layer; with U's bias too where the two are added anyway."""
    inward: NDArray[Any]
    """(L − 1, D, G): Wᵀ of the layers above it."""
    inward_bias: NDArray[Any]
    """(L − 1, G), as in `table`."""
    across: NDArray[Any]
    """(L, D, G): Uᵀ."""
    across_bias: NDArray[Any]
    """(L, G): U's bias, where a gate stands between (GRU)."""
    peepholes: NDArray[Any]
    """(L, 3, D); zeros without them."""
    readout: NDArray[Any]
    """(D, V)"""
    readout_bias: NDArray[Any]
    """(V,)"""


class Room(NamedTuple):
    """What a step writes to: gates and U·h (B, G), one more vector a row (B, D), and the logits (B, V)."""

    gates: NDArray[Any]
    sides: NDArray[Any]
    bent: NDArray[Any]
    logits: NDArray[Any]


# The loops


def multiply(x, across, y, begin, end):
    """y += x·across in the columns begin … end: x (B, K), across (K, ·), y (B, ·); in one order for each row."""
    inputs = across.shape[0]
    whole = inputs - inputs % 8
    for k in range(0, whole, 8):  # eight at a time stay in the first cache for all rows; y is touched less often
        w0, w1, w2, w3 = (
            across[k, begin:end], across[k + 1, begin:end], across[k + 2, begin:end], across[k + 3, begin:end]
        )  # fmt: skip
        u0, u1, u2, u3 = (
            across[k + 4, begin:end], across[k + 5, begin:end], across[k + 6, begin:end], across[k + 7, begin:end]
        )  # fmt: skip
        for row in range(x.shape[0]):
            a0, a1, a2, a3 = x[row, k], x[row, k + 1], x[row, k + 2], x[row, k + 3]
            b0, b1, b2, b3 = x[row, k + 4], x[row, k + 5], x[row, k + 6], x[row, k + 7]
            out = y[row, begin:end]
            for j in range(len(out)):
                first = (a0 * w0[j] + a1 * w1[j]) + (a2 * w2[j] + a3 * w3[j])
                out[j] += first + ((b0 * u0[j] + b1 * u1[j]) + (b2 * u2[j] + b3 * u3[j]))
    for k in range(whole, inputs):
        w0 = across[k, begin:end]
        for row in range(x.shape[0]):
            a0, out = x[row, k], y[row, begin:end]
            for j in range(len(out)):
                out[j] += a0 * w0[j]


def bend(x, exact):
    """tanh of x (N,) in place; quickly within 3 units in the last place."""
    if exact:
        for i in range(len(x)):
            x[i] = math.tanh(x[i])
    else:
        bend_quickly(x)


def squash(x, exact):
    """σ of x (N,) in place; quickly as ½ + ½ tanh(x/2)."""
    if exact:
        for i in range(len(x)):
            x[i] = 1 / (1 + math.exp(-x[i]))
    else:
        half = np.float32(0.5)
        for i in range(len(x)):
            x[i] *= half
        bend_quickly(x)
        for i in range(len(x)):
            x[i] = half + half * x[i]


def copy(source, target):
    """source (N,) into target (N,)."""
    for i in range(len(source)):
        target[i] = source[i]


def rnn_step(gates, h, rectified, exact):
    """h' (D,) of one row, from Wx + Uh and all biases (D,)."""
    if rectified:
        for j in range(len(h)):
            h[j] = max(gates[j], 0)
    else:
        bend(gates, exact)
        copy(gates, h)


def see(gate, peephole, c):
    """gate + p⊙c (D,) in place."""
    for j in range(len(gate)):
        gate[j] += peephole[j] * c[j]


def keep(i, f, g, c):
    """c' = f⊙c + i⊙g (D,) in place."""
    for j in range(len(c)):
        c[j] = f[j] * c[j] + i[j] * g[j]


def product(a, b, target):
    """a⊙b (D,) into target."""
    for j in range(len(target)):
        target[j] = a[j] * b[j]


def lstm_step(gates, h, c, bent, peepholes, exact):
    """h' and c' (D,) of one row, from Wx + Uh and all biases (4D,) in the order i, f, g, o."""
    width = len(h)
    i, f, g, o = gates[:width], gates[width : 2 * width], gates[2 * width : 3 * width], gates[3 * width :]
    see(i, peepholes[0], c)
    see(f, peepholes[1], c)
    squash(gates[: 2 * width], exact)
    bend(g, exact)
    keep(i, f, g, c)
    see(o, peepholes[2], c)
    squash(o, exact)
    copy(c, bent)
    bend(bent, exact)
    product(o, bent, h)


def add(source, target):
    """target + source (N,) in place."""
    for j in range(len(target)):
        target[j] += source[j]


def mix(z, n, h):
    """h' = (1 − z)⊙n + z⊙h (D,) in place."""
    for j in range(len(h)):
        h[j] = n[j] + z[j] * (h[j] - n[j])


def gru_gates(gates, sides, exact):
    """r and z (2D,) of one row in place, from Wx + b and Uh + c."""
    add(sides, gates)
    squash(gates, exact)


def gru_step(gates, side, h, by_reset, exact):
    """h' (D,) of one row: r, z and Wx + b of n in gates (3D,), what is added to it in side (D,), times r if `by_reset`."""
    width = len(h)
    r, z, n = gates[:width], gates[width : 2 * width], gates[2 * width :]
    if by_reset:
        product(r, side, side)
    add(side, n)
    bend(n, exact)
    mix(z, n, h)


def step(cell, exact, tokens, by, hs, cs, room):
    """Read one character a row, (B,), into the states hs and cs (L, B, D) in place: logits of the next in `room`."""
    layers, rows, width = hs.shape
    size = by.across.shape[2]
    for layer in range(layers):
        for row in range(rows):
            copy(by.table[tokens[row]] if layer == 0 else by.inward_bias[layer - 1], room.gates[row])
        if layer > 0:
            multiply(hs[layer - 1], by.inward[layer - 1], room.gates, 0, size)
        if cell < GRU:
            multiply(hs[layer], by.across[layer], room.gates, 0, size)
            for row in range(rows):
                if cell == LSTM:
                    lstm_step(
                        room.gates[row], hs[layer, row], cs[layer, row], room.bent[row], by.peepholes[layer], exact
                    )
                else:
                    rnn_step(room.gates[row], hs[layer, row], cell == RNN_RELU, exact)
            continue
        for row in range(rows):
            copy(by.across_bias[layer], room.sides[row])
        multiply(hs[layer], by.across[layer], room.sides, 0, size if cell == GRU else 2 * width)
        for row in range(rows):
            gru_gates(room.gates[row, : 2 * width], room.sides[row, : 2 * width], exact)
            product(room.gates[row, :width], hs[layer, row], room.bent[row])
        if cell == GRU_CHO:
            multiply(room.bent, by.across[layer], room.sides, 2 * width, size)
        for row in range(rows):
            gru_step(room.gates[row], room.sides[row, 2 * width :], hs[layer, row], cell == GRU, exact)
    for row in range(rows):
        copy(by.readout_bias, room.logits[row])
    multiply(hs[layers - 1], by.readout, room.logits, 0, room.logits.shape[1])


def choose(logits, noise, temperature, how):
    """The next character of one row: its logits (V,), and for `DRAWN` exponential numbers (V,); −1 if a logit is no number.

    With q exponential, argmax p/q falls on each character with its probability p: how `torch.multinomial` draws. The
    normaliser of p is the same for all.
    """
    best, largest = 0, logits[0]
    for i in range(len(logits)):
        if not math.isfinite(logits[i]):
            return -1
        if logits[i] > largest:
            best, largest = i, logits[i]
    if how == GREEDY:
        return best
    top, most = np.float32(largest) / np.float32(temperature), np.float32(-1)
    for i in range(len(logits)):
        share = np.float32(math.exp(np.float32(logits[i]) / np.float32(temperature) - top)) / noise[i]
        if share > most:
            best, most = i, share
    return best


def loop(cell, exact, how, temperature, noise, by, hs, cs, room, tokens):
    """Read tokens[0], choose tokens[1], read it, …: tokens (N + 1, B), noise (N, B, V) or for `GREEDY` anything."""
    for n in range(len(tokens) - 1):
        step(cell, exact, tokens[n], by, hs, cs, room)
        for row in range(tokens.shape[1]):
            if how != GIVEN:
                tokens[n + 1, row] = choose(room.logits[row], noise[n if how == DRAWN else 0, row], temperature, how)
                if tokens[n + 1, row] < 0:
                    return


@functools.cache
def _compiled() -> Callable[..., None]:
    """`loop` in machine code (some seconds the first time ever, then from numba's cache)."""
    from numba import njit
    from numba.extending import register_jitable

    exact: dict[str, Any] = {"error_model": "numpy"}
    for part in (multiply, bend_quickly, copy, see, keep, product, add, mix):
        register_jitable(fastmath={"contract", "nsz"}, **exact)(part)
    for part in (bend, squash, rnn_step, lstm_step, gru_gates, gru_step, step, choose):
        register_jitable(**exact)(part)
    try:
        return njit(cache=True, **exact)(loop)
    except RuntimeError:  # no writable place for the cache
        return njit(**exact)(loop)


# What is asked for


def fits(model: CharacterModel, rows: int) -> bool:
    """Whether `rows` texts can be written in machine code: a CPU, one direction, one float type, no dropout, no autocast."""
    parts, recurrent = list(model.parameters()), model.recurrent
    kinds = {(part.device.type, part.dtype) for part in parts}
    dropout = model.training and (model.dropout.p or recurrent.dropout)
    one = len(kinds) == 1 and kinds <= {("cpu", torch.float32), ("cpu", torch.float64)}
    return one and not (recurrent.bidirectional or dropout or torch.is_autocast_enabled("cpu")) and rows <= ROWS


@torch.no_grad()
def laid_out(model: CharacterModel) -> Weights:
    """The weights as they are now; copies, so that a later change of the model changes nothing here."""
    recurrent, weights = model.recurrent, dict(model.recurrent.named_parameters())
    layers, width = range(recurrent.num_layers), recurrent.width
    ways, sides = ([weights[f"bias_{kind}_l{layer}"] for layer in layers] for kind in ("ih", "hh"))
    if _CELLS[recurrent.cell] < GRU:  # both biases are added to the same sum
        ways, sides = [a + b for a, b in zip(ways, sides)], [torch.zeros_like(b) for b in sides]
    inward = [weights[f"weight_ih_l{layer}"] for layer in layers]
    bare = ways[0].new_zeros(3, width)

    def stacked(parts: Sequence[Tensor], *shape: int) -> NDArray[Any]:
        return torch.stack(list(parts)).contiguous().numpy() if parts else ways[0].new_zeros(0, *shape).numpy()

    size = len(ways[0])
    return Weights(
        (model.embedding.weight @ inward[0].t() + ways[0]).numpy(),
        stacked([part.t() for part in inward[1:]], width, size),
        stacked(ways[1:], size),
        stacked([weights[f"weight_hh_l{layer}"].t() for layer in layers]),
        stacked(sides),
        stacked([weights.get(f"peepholes_l{layer}", bare) for layer in layers]),
        model.readout.weight.t().clone(memory_format=torch.contiguous_format).numpy(),
        model.readout.bias.clone().numpy(),
    )


def stream(
    model: CharacterModel,
    prompt: Tensor,
    count: int,
    *,
    pads: Tensor | None = None,
    generator: decoding.Dice = None,
    **rules: Any,
) -> Iterator[Tensor]:
    """Yield `count` times the next character of every row, (B,) int64; see `decoding.stream`.

    `rules` are temperature, top_k, top_p and greedy, see `decoding.pick`. Raises UserError where the network gives no numbers.
    """
    for piece in _pieces(model, prompt, count, 1, pads, generator, rules):
        yield from piece


def generate(
    model: CharacterModel,
    prompt: Tensor,
    count: int,
    *,
    pads: Tensor | None = None,
    generator: decoding.Dice = None,
    **rules: Any,
) -> Tensor:
    """The prompt and what `stream` adds to it: (B, P) → (B, P + count)."""
    numbers = AT_ONCE // (len(prompt) * model.readout.out_features)
    found = list(_pieces(model, prompt, count, max(1, numbers), pads, generator, rules))
    return torch.cat([prompt, torch.cat(found).t()], 1) if found else prompt


@torch.no_grad()
def _pieces(
    model: CharacterModel,
    prompt: Tensor,
    count: int,
    at_once: int,
    pads: Tensor | None,
    generator: decoding.Dice,
    rules: dict[str, Any],
) -> Iterator[Tensor]:
    """Tokens (n, B), n ≤ at_once."""
    settings, rows = {"generator": generator, **rules}, len(prompt)
    if count < FEW or not fits(model, rows):
        yield from (token[None] for token in decoding.stream(model, prompt, count, pads=pads, **settings))
        return
    memory = model.start(rows)
    token = decoding.generate(model, prompt, 1, pads=pads, cache=memory, **settings)[:, -1]  # says what is wrong
    yield token[None]
    by, cell, vocabulary = laid_out(model), _CELLS[model.recurrent.cell], model.readout.out_features
    hs, *cs = (part.clone().numpy() for part in memory.state)
    room = Room(*(np.empty((rows, size), hs.dtype) for size in (by.across.shape[2],) * 2 + (hs.shape[2], vocabulary)))
    how = GREEDY if rules.get("greedy") else DRAWN
    if how == DRAWN and (rules.get("top_k") is not None or rules.get("top_p") is not None):
        how, at_once = GIVEN, 1
    exact, logits, run = hs.dtype == np.float64, torch.from_numpy(room.logits), _compiled()
    temperature = float(rules.get("temperature", 1.0))
    noise = torch.empty(1 if how != DRAWN else min(at_once, count), rows, vocabulary)
    for begin in range(1, count, at_once):
        tokens = np.zeros((min(at_once, count - begin) + 1, rows), np.int64)
        tokens[0] = token.numpy()
        if how == DRAWN:
            _roll(noise[: len(tokens) - 1], generator)
        run(cell, exact, how, temperature, noise.numpy(), by, hs, cs[0] if cs else hs, room, tokens)
        if tokens.min() < 0 or (how == GIVEN and not logits.isfinite().all()):
            raise UserError("the network's outputs are not finite numbers: it has no next character")
        drawn = torch.from_numpy(tokens[1:])
        if how == GIVEN:
            drawn[0] = decoding.pick(logits, **settings)
        token = drawn[-1]
        yield drawn


def _roll(noise: Tensor, generator: decoding.Dice) -> None:
    """Exponential numbers (n, B, V) as `decoding.pick` has them drawn: in each step of all rows, or of each from its own dice."""
    for each in noise:
        if isinstance(generator, Sequence):
            for row, dice in zip(cast(Any, each), generator, strict=True):
                row.exponential_(1, generator=dice)
        else:
            each.exponential_(1, generator=generator)
