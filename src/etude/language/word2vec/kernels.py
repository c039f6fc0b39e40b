"""The functions of `objective` and `pairs` on a CPU: tensors and numbers for the loops that stand in `machine`.

numba, which those need, is imported when one is first called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Kernels", "draw", "pairs"]

Array = NDArray[Any]


def _loops() -> Any:
    from etude.language.word2vec import machine

    return machine


def draw(count: int, key: int, share: Array, alias: Array) -> Array:
    """(count,) int32 words, see `pairs.Noise`."""
    out = np.empty(count, np.int32)
    _loops().draw(np.uint64(key), share, alias, out)
    return out


def pairs(
    text: Array,
    first: int,
    last: int,
    reach: Array,
    negatives: int,
    key: int,
    share: Array,
    alias: Array,
    threads: int = 1,
) -> tuple[Array, Array]:
    """See `pairs.neighbours`."""
    most, starts = 2 * int(reach.sum()), np.empty(last - first + 1, np.int64)
    centre, targets = np.empty(most, np.int32), np.empty((most, 1 + negatives), np.int32)
    _loops().pairs(threads, text, first, reach, starts, np.uint64(key), share, alias, centre, targets)
    return centre[: starts[-1]], targets[: starts[-1]]


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
        by_v, by_noise = v.new_empty(len(rows), width), v.new_empty(len(noise), width)
        starts = np.searchsorted(centre.numpy(), np.arange(0, blocks * many + 1, many, dtype=np.int32))
        arrays = [part.numpy() for part in (v, u, rows, centre, targets)]
        results = [part.numpy() for part in (slope, by_v, by_noise, value)]
        _loops().negatives(self.threads, *arrays, starts, noise.numpy(), weight.numpy(), *results)
        return value.sum(), slope, by_v, by_noise

    def spread(
        self, into: Tensor, v: Tensor, rows: Tensor, centre: Tensor, targets: Tensor, slope: Tensor, noise: Tensor,
        by_noise: Tensor, rate: Tensor,
    ) -> None:  # fmt: skip
        arrays = [part.numpy() for part in (into, v, rows, centre, targets, slope, noise, by_noise, rate)]
        _loops().spread(self.threads, *arrays)

    def add(self, into: Tensor, rows: Tensor, change: Tensor, rate: Tensor) -> None:
        _loops().add(self.threads, into.numpy(), rows.numpy(), change.numpy(), rate.numpy())
