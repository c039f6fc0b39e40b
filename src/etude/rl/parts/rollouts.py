"""Segments: a fixed number of steps in n worlds that go on living, and the advantages of what was done in them.

T steps, n worlds, D numbers observed. A world whose episode has ended spends its next step on the reset (`Worlds`); that row is
not `real`, nothing of it is learned from, and as the row before it ends an episode, nothing passes over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.blocks.acting.returns import lambda_advantages
from etude.blocks.acting.worlds import Worlds


class Segment(NamedTuple):
    """T steps of n worlds; time first."""

    state: Tensor
    """(T + 1, n, D) float32, or images (T + 1, n, C, H, W) uint8; the last row is where the worlds stand behind the segment"""
    action: Tensor
    """(T, n) int64; or (T, n, A) float32 as they were drawn, which may be beyond the bounds"""
    reward: Tensor
    """(T, n) float32"""
    terminated: Tensor
    """(T, n) bool; the task is over and nothing follows"""
    truncated: Tensor
    """(T, n) bool; cut by a time limit: the value of what was reached still counts"""
    real: Tensor
    """(T, n) bool; a transition, not a reset"""
    reached: Tensor
    """(K, …) like `state`; the states in which the K truncated steps ended, in the order of `truncated.nonzero()`"""


def collect(worlds: Worlds, act: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Segment:
    """Let `act` (states (n, …) → actions (n,) or (n, A)) take `steps` steps in the worlds, which go on from where they stand."""
    count = worlds.count
    state = np.empty((steps + 1, count, *worlds.shape), worlds.observation.dtype)
    kind = ((worlds.actions,), np.float32) if worlds.box else ((), np.int64)
    action, reward = np.empty((steps, count, *kind[0]), kind[1]), np.zeros((steps, count), np.float32)
    flags = np.zeros((3, steps, count), bool)  # terminated, truncated, real
    reached: list[NDArray[Any]] = []
    for t in range(steps):
        state[t] = worlds.observation
        action[t] = act(torch.from_numpy(state[t]).to(device)).cpu().numpy()
        row = worlds.step(action[t])
        reward[t, row.world] = row.reward
        flags[0, t, row.world], flags[1, t, row.world], flags[2, t, row.world] = row.terminated, row.truncated, True
        if row.truncated.any():
            reached.append(row.next_state[row.truncated])
    state[-1] = worlds.observation
    last = np.concatenate(reached) if reached else state[:0, 0]
    return Segment(*(torch.from_numpy(x).to(device) for x in (state, action, reward, *flags, last)))


@torch.no_grad()
def advantages(segment: Segment, value: Callable[[Tensor], Tensor], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages A (T, n) and the returns A + V(s) (T, n) that V is fitted to; `value`: (M, D) → (M,).

    λ = 1 gives n-step returns: Σ γ^k r to the end of the segment or of the episode, with V behind it unless the task was
    over. Rows that are not real hold numbers of no meaning.
    """
    steps, count = segment.reward.shape
    v = value(segment.state.flatten(0, 1)).view(steps + 1, count)
    behind = v[1:].clone()
    if len(segment.reached):
        behind[segment.truncated] = value(segment.reached)
    found = lambda_advantages(segment.reward, segment.terminated, segment.truncated, v[:-1], behind, gamma, lam)
    return found, found + v[:-1]
