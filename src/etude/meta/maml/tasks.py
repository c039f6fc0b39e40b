"""What MAML learns from: batches of small tasks, sinusoids or characters to be told apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Task", "episodes", "sinusoids"]


class Task(NamedTuple):
    """A batch of T tasks."""

    support_x: Tensor  # (T, S, …)
    support_y: Tensor  # (T, S, …)
    query_x: Tensor  # (T, Q, …)
    query_y: Tensor  # (T, Q, …)

    def to(self, device: torch.device) -> Task:
        """The same tasks on another device."""
        return Task(*(part.to(device) for part in self))


def sinusoids(tasks: int, support: int, queries: int, dice: torch.Generator) -> tuple[Task, Tensor, Tensor]:
    """y = A sin(x − φ), A ∈ [0.1, 5], φ ∈ [0, π], x ∈ [−5, 5] (paper, section 5.1); also A and φ, each (T, 1, 1)."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=dice)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=dice)
    x = 10 * torch.rand(tasks, support + queries, 1, generator=dice) - 5
    y = amplitude * torch.sin(x - phase)
    return Task(x[:, :support], y[:, :support], x[:, support:], y[:, support:]), amplitude, phase


def episodes(
    drawings: Tensor, tasks: int, ways: int, shots: int, queries: int, dice: torch.Generator, turn: bool
) -> Task:
    """T tasks of `ways` characters with fresh labels 0 … W−1 in random order: images float (T, W·n, 1, H, W) in [0, 1].

    drawings: uint8 (classes, 20, H, W). With `turn`, every character of a task is rotated by a random multiple of
    90°, the same for all its drawings: a rotated character is a class of its own.
    """
    classes, copies = drawings.shape[:2]
    chosen = torch.rand(tasks, classes, generator=dice).topk(ways, 1).indices  # (T, W), no repeats, random order
    drawn = torch.rand(tasks, ways, copies, generator=dice).topk(shots + queries, 2).indices
    x = drawings[chosen[:, :, None], drawn] / 255  # (T, W, n, H, W)
    if turn:
        turns = torch.randint(4, (tasks, ways), generator=dice)
        for k in range(1, 4):
            x = torch.where((turns == k)[:, :, None, None, None], torch.rot90(x, k, (-2, -1)), x)
    y = torch.arange(ways).view(1, ways, 1).expand(tasks, ways, shots + queries)

    def flat(part: slice) -> tuple[Tensor, Tensor]:
        return x[:, :, part].flatten(1, 2).unsqueeze(2), y[:, :, part].flatten(1, 2)

    return Task(*flat(slice(shots)), *flat(slice(shots, None)))
