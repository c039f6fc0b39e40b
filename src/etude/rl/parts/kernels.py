"""PPO's networks, loss and update as array loops, for machine code: no dispatch stands between two minibatches.

Plain functions of NumPy arrays, which numba compiles when `compiled` is first asked for one; uncompiled they are the same,
slowly. `theta` (P,) holds all parameters as `optim.flat.flatten` lays them out, each layer's W (outputs, inputs) and then its b;
`gradient` and Adam's averages are like it. What leaves the layers stands in `kept`, the derivatives by it in `slopes`. N rows, M
of them in a minibatch, D numbers observed, A actions. Float32 or float64 as `theta` is; means over rows in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.blocks.nn.tanh import bend

INPUTS, OUTPUTS, PLACE, BENT, UNITS, BELOW = range(6)
"""Columns of a table of layers: the two widths, where W begins in θ, whether a tanh follows, where its outputs stand in `kept`,
and the layer whose outputs it takes (−1: the state)."""


class Networks(NamedTuple):
    """Layers of a trunk (none, or shared), then of the policy from `policy` on, then of the critic from `critic` on."""

    layers: NDArray[np.int64]
    """(L, 6)"""
    policy: int
    critic: int


class Rule(NamedTuple):
    """The numbers of one segment's updates."""

    batch: int
    clip: float
    value_coefficient: float
    entropy_bonus: float
    normalise: bool
    target_kl: float
    clip_norm: float


class Adam(NamedTuple):
    """The numbers of the optimizer, and how many steps it has taken."""

    alpha: float
    beta1: float
    beta2: float
    eps: float
    taken: int


class Data(NamedTuple):
    """What a segment's updates learn from."""

    state: NDArray[Any]
    """(N, D)"""
    action: NDArray[np.int64]
    """(N,)"""
    old: NDArray[Any]
    """(N,); log π of the action under the policy that acted"""
    advantage: NDArray[Any]
    """(N,)"""
    returns: NDArray[Any]
    """(N,)"""


# ------------------------------------------------------------------------------------------------------- networks


def weight(vector, layers, layer):
    """W (outputs, inputs) of a layer: a view of θ, or of its gradient."""
    size = layers[layer, INPUTS] * layers[layer, OUTPUTS]
    start = layers[layer, PLACE]
    return vector[start : start + size].reshape((layers[layer, OUTPUTS], layers[layer, INPUTS]))


def bias(vector, layers, layer):
    """b (outputs,) of a layer, likewise."""
    start = layers[layer, PLACE] + layers[layer, INPUTS] * layers[layer, OUTPUTS]
    return vector[start : start + layers[layer, OUTPUTS]]


def units(space, layers, layer, count):
    """(N, outputs) of what leaves a layer: a view of `kept`, or of `slopes`."""
    start = layers[layer, UNITS]
    return space[start : start + count * layers[layer, OUTPUTS]].reshape((count, layers[layer, OUTPUTS]))


def bend_exactly(h):
    """tanh of numbers (n,) in place, by the C library."""
    for i in range(len(h)):
        h[i] = math.tanh(h[i])


def add_bias(h, b):
    """h (N, outputs) + b (outputs,) in place."""
    for i in range(len(h)):
        for j in range(len(b)):
            h[i, j] += b[j]


def add_up(delta, total):
    """Sums over the rows of delta (N, outputs) into total (outputs,)."""
    for j in range(len(total)):
        total[j] = 0
    for i in range(len(delta)):
        for j in range(len(total)):
            total[j] += delta[i, j]


def add(x, y):
    """x (n,) + y (n,) into x."""
    for i in range(len(x)):
        x[i] += y[i]


def unbend(delta, h):
    """∂L/∂x in place of ∂L/∂h (n,), for h = tanh x (n,)."""
    one = h.dtype.type(1)
    for i in range(len(h)):
        delta[i] *= one - h[i] * h[i]


def forward(theta, networks, first, last, state, kept):
    """Fill `kept` with what leaves layers first ≤ l < last (for which the ones below them stand there), for states (N, D)."""
    layers = networks.layers
    for layer in range(first, last):
        below, h = layers[layer, BELOW], units(kept, layers, layer, len(state))
        x = state if below < 0 else units(kept, layers, below, len(state))
        np.dot(x, weight(theta, layers, layer).T, h)
        add_bias(h, bias(theta, layers, layer))
        if layers[layer, BENT]:
            if theta.itemsize == 4:
                bend(h.reshape(h.size))
            else:
                bend_exactly(h.reshape(h.size))


def backward(theta, networks, state, kept, slopes, other, gradient):
    """Write ∂L/∂θ (P,) into `gradient`, from ∂L/∂ the heads' outputs in `slopes`. `other` is room for one more of them."""
    layers, count = networks.layers, len(state)
    for layer in range(len(layers) - 1, -1, -1):
        below, delta = layers[layer, BELOW], units(slopes, layers, layer, count)
        if layers[layer, BENT]:
            unbend(delta.reshape(delta.size), units(kept, layers, layer, count).reshape(delta.size))
        x = state if below < 0 else units(kept, layers, below, count)
        np.dot(delta.T, x, weight(gradient, layers, layer))
        add_up(delta, bias(gradient, layers, layer))
        if below >= 0:
            onward = units(slopes, layers, below, count)
            if layer == networks.policy:  # on a shared trunk, which has the critic's already
                found = other[: onward.size].reshape(onward.shape)
                np.dot(delta, weight(theta, layers, layer), found)
                add(onward.reshape(onward.size), found.reshape(onward.size))
            else:
                np.dot(delta, weight(theta, layers, layer), onward)


# ----------------------------------------------------------------------------------------------------- the method


def log_softmax(logits, out):
    """log π (A,) float64 of logits (A,); returns the entropy."""
    top, total, entropy = logits[0], 0.0, 0.0
    for a in range(1, len(logits)):
        top = max(top, logits[a])
    for a in range(len(logits)):
        out[a] = np.float64(logits[a]) - np.float64(top)
        total += math.exp(out[a])
    for a in range(len(logits)):
        out[a] -= math.log(total)
        entropy -= math.exp(out[a]) * out[a]
    return entropy


def standardise(advantage):
    """(Â − mean)/(deviation + 1e-8) in place (M,); one step alone stays as it is."""
    count, mean, square = len(advantage), 0.0, 0.0
    if count < 2:
        return
    for i in range(count):
        mean += advantage[i] / count
    for i in range(count):
        square += (advantage[i] - mean) ** 2
    for i in range(count):
        advantage[i] = (advantage[i] - mean) / (math.sqrt(square / (count - 1)) + 1e-8)


def objective(rule, logits, value, action, old, advantage, returns, by_logits, by_value):
    """loss, ½ mean (V − R̂)², mean entropy, mean of ρ − 1 − log ρ, and how many ratios lie beyond the clip, of a minibatch.

    The loss's derivatives go into `by_logits` (M, A) and `by_value` (M, 1); `logits` and `value` are like them, the others (M,).
    """
    count, log_pi = len(logits), np.empty(logits.shape[1])
    gain, error, entropy, kl, beyond = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(count):
        spread = log_softmax(logits[i], log_pi)
        log_ratio = log_pi[action[i]] - old[i]
        ratio = math.exp(log_ratio)
        plain = ratio * advantage[i]
        held = min(max(ratio, 1 - rule.clip), 1 + rule.clip) * advantage[i]
        slope = plain if plain <= held else 0.0  # no gradient where ρ is beyond the clip to the better side
        over = value[i, 0] - returns[i]
        for a in range(len(log_pi)):
            pi = math.exp(log_pi[a])
            by = slope * ((a == action[i]) - pi) - rule.entropy_bonus * pi * (log_pi[a] + spread)
            by_logits[i, a] = -by / count
        by_value[i, 0] = rule.value_coefficient * over / count
        gain += min(plain, held) / count
        error += 0.5 * over * over / count
        entropy += spread / count
        kl += (ratio - 1 - log_ratio) / count
        beyond += abs(ratio - 1) > rule.clip
    return rule.value_coefficient * error - gain - rule.entropy_bonus * entropy, error, entropy, kl, beyond


def descend(theta, gradient, mean, square, adam, factor, k):
    """Adam's k-th step on the gradient times `factor`, in place: θ ← θ − α m̂/(√v̂ + ε)."""
    kind = theta.dtype.type
    scale, new, newer = kind(factor), kind(1 - adam.beta1), kind(1 - adam.beta2)
    rate = kind(adam.alpha / (1 - adam.beta1**k))
    root, eps = kind(1 / math.sqrt(1 - adam.beta2**k)), kind(adam.eps)
    for i in range(len(theta)):
        g = gradient[i] * scale
        mean[i] += new * (g - mean[i])
        square[i] += newer * (g * g - square[i])
        theta[i] -= rate * mean[i] / (np.sqrt(square[i]) * root + eps)


def learn(theta, gradient, mean, square, adam, networks, rule, data, orders, room, losses):
    """K passes over N steps, rows in the order of `orders` (K, N); Adam's averages are `mean`, of the gradient, and `square`.

    Returns how many minibatches there were, whether all was finite, the share of their ratios beyond the clip, and the last one's
    kl, entropy and value loss; their losses stand in `losses`. A loss or gradient that is not finite ends it before the update.
    """
    layers, (kept, slopes, other) = networks.layers, room
    pi, v, most = networks.critic - 1, len(layers) - 1, min(rule.batch, orders.shape[1])
    state = np.empty((most, data.state.shape[1]), theta.dtype)
    action, numbers = np.empty(most, np.int64), np.empty((3, most), theta.dtype)
    done, rows, beyond, kl, entropy, error = 0, 0, 0, 0.0, 0.0, 0.0
    for order in orders:
        for start in range(0, len(order), rule.batch):
            index = order[start : start + rule.batch]
            count = len(index)
            for i in range(count):
                row = index[i]
                for j in range(state.shape[1]):
                    state[i, j] = data.state[row, j]
                action[i] = data.action[row]
                numbers[0, i], numbers[1, i], numbers[2, i] = data.old[row], data.advantage[row], data.returns[row]
            old, advantage, returns = numbers[0, :count], numbers[1, :count], numbers[2, :count]
            if rule.normalise:
                standardise(advantage)
            x = state[:count]
            forward(theta, networks, 0, len(layers), x, kept)
            loss, error, entropy, kl, outside = objective(
                rule, units(kept, layers, pi, count), units(kept, layers, v, count), action[:count], old, advantage, returns,
                units(slopes, layers, pi, count), units(slopes, layers, v, count),
            )  # fmt: skip
            backward(theta, networks, x, kept, slopes, other, gradient)
            losses[done] = loss
            done, rows, beyond = done + 1, rows + count, beyond + outside
            norm = length(gradient)
            if not (math.isfinite(norm) and math.isfinite(loss)):
                return done, False, beyond / rows, kl, entropy, error
            factor = min(1.0, rule.clip_norm / norm) if norm > 0 else 1.0
            descend(theta, gradient, mean, square, adam, factor, adam.taken + done)
        if rule.target_kl and kl > rule.target_kl:
            break
    return done, True, beyond / rows, kl, entropy, error


def act(theta, networks, state, uniform, kept, action):
    """Draw actions (n,) for states (n, D), uniform numbers in [0, 1) (n,): `policies.categorical_draw`."""
    forward(theta, networks, 0, networks.critic, state, kept)
    logits = units(kept, networks.layers, networks.critic - 1, len(state))
    rising = np.empty(logits.shape[1])
    for i in range(len(logits)):
        log_softmax(logits[i], rising)
        total = 0.0
        for a in range(len(rising)):
            total += math.exp(rising[a])
            rising[a] = total
        action[i] = 0
        for a in range(len(rising) - 1):
            action[i] += uniform[i] * total >= rising[a]


def judge(theta, networks, state, action, kept, rows, log_prob, entropy, value):
    """log π(a | s), the entropy of π(· | s) and V(s), (N,) each, of states (N, D) and actions (N,), `rows` at a time."""
    layers = networks.layers
    log_pi = np.empty(layers[networks.critic - 1, OUTPUTS])
    for start in range(0, len(state), rows):
        x = state[start : start + rows]
        forward(theta, networks, 0, len(layers), x, kept)
        logits, v = units(kept, layers, networks.critic - 1, len(x)), units(kept, layers, len(layers) - 1, len(x))
        for i in range(len(x)):
            entropy[start + i] = log_softmax(logits[i], log_pi)
            log_prob[start + i] = log_pi[action[start + i]]
            value[start + i] = v[i, 0]


def values(theta, networks, state, kept, rows, value):
    """V(s) (N,) of states (N, D), `rows` at a time."""
    layers = networks.layers
    for start in range(0, len(state), rows):
        x = state[start : start + rows]
        forward(theta, networks, 0, networks.policy, x, kept)
        forward(theta, networks, networks.critic, len(layers), x, kept)
        value[start : start + rows] = units(kept, layers, len(layers) - 1, len(x))[:, 0]


def lambda_advantages(reward, terminated, truncated, value, behind, gamma, lam, found):
    """Generalised advantages (T, n): `returns.lambda_advantages`; `behind` (T, n) is V of what each step reached."""
    for t in range(len(found) - 1, -1, -1):
        for i in range(found.shape[1]):
            found[t, i] = reward[t, i] - value[t, i]
            if not terminated[t, i]:
                found[t, i] += gamma * behind[t, i]
            if t + 1 < len(found) and not (terminated[t, i] or truncated[t, i]):
                found[t, i] += gamma * lam * found[t + 1, i]


def length(gradient):
    """‖g‖ (float64) of numbers (P,)."""
    total = 0.0
    for i in range(len(gradient)):
        total += np.float64(gradient[i]) * np.float64(gradient[i])
    return math.sqrt(total)


EXACT: dict[str, Any] = {"error_model": "numpy"}
LOOSE: dict[str, Any] = {**EXACT, "fastmath": {"contract", "nsz"}}
SUMS: dict[str, Any] = {**EXACT, "fastmath": {"contract", "nsz", "reassoc"}}


@functools.cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """One of the loops above in machine code (some seconds the first time ever, then from numba's cache)."""
    from numba import njit

    _parts()
    try:
        return njit(cache=True, **EXACT)(loop)
    except RuntimeError:  # no writable place for the cache
        return njit(**EXACT)(loop)


@functools.cache
def _parts() -> None:
    from numba.extending import register_jitable

    for part in (weight, bias, units, bend_exactly, forward, backward, log_softmax, standardise, objective):
        register_jitable(**EXACT)(part)
    for part in (bend, add_bias, add_up, add, unbend, descend):
        register_jitable(**LOOSE)(part)
    register_jitable(**SUMS)(length)
