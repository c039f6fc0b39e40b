"""Segments that remember what the networks computed while they acted: the update needs no second forward pass.

Where the policy that acts is the one that learns, and learns once from each segment (A2C, A3C), its activations in the states
it was asked in are those that the gradient needs. `Collector` keeps them in place, asks the critic once for a whole segment, and
writes the gradient out through the layers. T steps, n worlds, D numbers observed, A actions; N = T n rows, time first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.worlds import Worlds
from etude.rl.parts.actor_critic import ActorCritic


class Remembered(NamedTuple):
    """T steps of n worlds. The collector writes the next segment over it."""

    state: NDArray[np.float32]
    """(T + 1, n, D); the last row is where the worlds stand behind the segment"""
    action: NDArray[np.int64]
    """(T, n)"""
    reward: NDArray[np.float32]
    """(T, n)"""
    terminated: NDArray[np.bool_]
    """(T, n); the task is over and nothing follows"""
    truncated: NDArray[np.bool_]
    """(T, n); cut by a time limit: the value of what was reached still counts"""
    real: NDArray[np.bool_]
    """(T, n); a transition, not a reset"""
    value: NDArray[np.float32]
    """(T, n); V of the states in which was acted"""
    behind: NDArray[np.float32]
    """(T, n); V of the states that were reached (of a cut episode: its last, not the next one's first)"""
    logits: Tensor
    """(N, A), on the networks' device"""


class _Layer(NamedTuple):
    """One linear layer; all of it lies in the parameters and their gradients."""

    weight: Tensor
    turned: Tensor
    bias: Tensor
    by_weight: Tensor
    by_bias: Tensor
    squashed: bool
    """Whether a tanh follows"""


class Collector:
    """Lets an actor-critic act in worlds, and knows its gradient. `model` is flat (`etude.optim.flat.flatten`) before."""

    def __init__(self, model: ActorCritic, worlds: Worlds, steps: int) -> None:
        self.model, self.worlds, self.steps = model, worlds, steps
        self.device = next(model.parameters()).device
        count, self._rows = worlds.count, steps * worlds.count
        self._trunk, self._policy, self._critic = map(_layers, (model.trunk, model.policy, model.critic))
        self._state = torch.zeros(steps + 1, count, worlds.size)
        self._input = self._state.to(self.device)  # on the CPU the same memory
        self._paths = [
            [torch.empty(rows, count, len(layer.bias), device=self.device) for layer in layers]
            for layers, rows in ((self._trunk, steps + 1), (self._policy, steps), (self._critic, steps + 1))
        ]
        trunk, policy, critic = self._paths
        acting = self._trunk + self._policy
        self._acting = [(acting, self._input[t], [kept[t] for kept in trunk + policy]) for t in range(steps)]
        self._last = self._trunk, self._input[-1], [kept[-1] for kept in trunk]
        seen = trunk[-1] if trunk else self._input
        self._judging = self._critic, seen.flatten(0, 1), [kept.flatten(0, 1) for kept in critic]
        self._kept = [  # inputs and outputs of each network in the N states
            [kept.flatten(0, 1)[: self._rows] for kept in (first, *path)]
            for first, path in ((self._input, trunk), (seen, policy), (seen, critic))
        ]
        self._numbers = np.zeros((steps, count), np.int64), np.zeros((steps, count), np.float32)
        self._flags = np.zeros((3, steps, count), bool)  # terminated, truncated, real

    @torch.no_grad()
    def play(self, dice: torch.Generator) -> Remembered:
        """Take T steps in the worlds, which go on from where they stand, with actions drawn from the policy."""
        worlds, state, (action, reward) = self.worlds, self._state.numpy(), self._numbers
        terminated, truncated, real = self._flags
        uniform = torch.rand(self.steps, worlds.count, generator=dice, dtype=torch.float64).numpy()
        same, cut = self.device.type == "cpu", []
        for t, (layers, given, out) in enumerate(self._acting):
            state[t] = worlds.observation
            if not same:
                given.copy_(self._state[t])
            action[t] = drawn(_forward(layers, given, out).cpu().numpy(), uniform[t])
            row = worlds.step(action[t])
            if len(row.world) == worlds.count:
                reward[t], terminated[t], truncated[t], real[t] = row.reward, row.terminated, row.truncated, True
            else:
                self._flags[:, t], reward[t] = False, 0.0
                reward[t, row.world], real[t, row.world] = row.reward, True
                terminated[t, row.world], truncated[t, row.world] = row.terminated, row.truncated
            if row.truncated.any():
                cut.append(row.next_state[row.truncated])
        state[-1] = worlds.observation
        if not same:
            self._input[-1].copy_(self._state[-1])
        _forward(*self._last)
        value = _forward(*self._judging).cpu().numpy().reshape(self.steps + 1, worlds.count)
        behind = value[1:]
        if cut:
            behind = behind.copy()
            last = torch.from_numpy(np.concatenate(cut)).to(self.device)
            behind[truncated] = self.model.value(last).cpu().numpy()
        return Remembered(
            state, action, reward, terminated, truncated, real, value[:-1], behind, self._kept[1][-1]
        )  # fmt: skip

    @torch.no_grad()
    def backward(self, by_logits: Tensor, by_value: Tensor) -> None:
        """Write the gradient of a loss into every .grad, from its derivatives by logits (N, A) and values (N,)."""
        trunk, policy, critic = self._kept
        onward = bool(self._trunk)
        delta = _backward(self._policy, policy, by_logits, onward)
        other = _backward(self._critic, critic, by_value[:, None], onward)
        if onward:
            _backward(self._trunk, trunk, delta + other, False)


def drawn(logits: NDArray[np.float32], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Actions (n,) with π = softmax(logits) (n, A), for uniform numbers in [0, 1) (n,): `policies.categorical_draw` in NumPy."""
    with np.errstate(invalid="ignore"):  # logits that are not finite end the run at its update
        weight = logits - logits.max(1, keepdims=True)
        rising = np.exp(weight, dtype=np.float64).cumsum(1)
        return np.minimum((uniform[:, None] * rising[:, -1:] >= rising).sum(1), logits.shape[1] - 1)


def advantages(rows: Remembered, gamma: float, lam: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Generalised advantages A (T, n) and the returns A + V(s) (T, n): `rollouts.advantages` where all values are known."""
    later = np.where(rows.terminated, np.float32(0), rows.behind)
    error = np.asarray(rows.reward + gamma * later - rows.value, np.float32)
    fade = (gamma * lam * ~(rows.terminated | rows.truncated)).astype(np.float32)
    for t in range(len(error) - 2, -1, -1):
        error[t] += fade[t] * error[t + 1]
    return error, np.asarray(error + rows.value, np.float32)


def _layers(net: nn.Module) -> list[_Layer]:
    found: list[_Layer] = []
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight, layer.bias
            assert weight.grad is not None
            assert bias.grad is not None
            found.append(_Layer(weight.data, weight.data.t(), bias.data, weight.grad, bias.grad, False))
        elif isinstance(layer, nn.Tanh):
            found[-1] = found[-1]._replace(squashed=True)
    return found


def _forward(layers: list[_Layer], x: Tensor, out: list[Tensor]) -> Tensor:
    for layer, kept in zip(layers, out):
        torch.addmm(layer.bias, x, layer.turned, out=kept)
        x = kept.tanh_() if layer.squashed else kept
    return x


def _backward(layers: list[_Layer], kept: list[Tensor], delta: Tensor, onward: bool) -> Tensor:
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        if layer.squashed:
            delta = torch.ops.aten.tanh_backward(delta, kept[index + 1])
        torch.mm(delta.t(), kept[index], out=layer.by_weight)
        torch.sum(delta, 0, out=layer.by_bias)
        if index or onward:
            delta = torch.mm(delta, layer.weight)
    return delta
