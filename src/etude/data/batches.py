"""Which images make batch number `step`: a pure function of (seed, step), so nothing has to be saved to resume.

The infinite list of samples is the concatenation of one permutation of 0 … n−1 an epoch. The global batch of step s is
positions s·B·W up to (s+1)·B·W of that list for W ranks with B samples each; rank r takes the r-th B of them.

This answers the three questions that "shuffle the data" leaves open (erratum E13 of our notes on §3.4.3):
a new permutation every epoch; within an epoch every sample exactly once (no replacement); and no short last batch,
because a batch may take its first samples from the end of one epoch and the rest from the start of the next.
Two ranks with B samples each see together exactly what one process sees with 2B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etude.core.errors import UserError
from etude.core.randomness import fold

if TYPE_CHECKING:
    import torch


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch number `epoch`: int64 (n,), the ranking of n raw 64-bit words of a Philox stream.

    NumPy guarantees raw words, not `Generator.permutation`, to stay equal across its versions; hence the ranking.
    """
    keys = np.random.Philox(key=fold(seed, epoch, 0, "order of samples")).random_raw(n)
    return np.argsort(keys, kind="stable")


class Stream:
    """Sample numbers of every batch: `n` samples, `batch` per rank and step.

    `indices(step)` may be asked for any step in any order; only the permutations of two epochs are kept, and they are
    no state (they follow from the seed). Raises `UserError` when `n` or `batch` is not positive or `rank` is not below
    `world`.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if n < 1 or batch < 1 or world < 1 or not 0 <= rank < world:
            raise UserError(
                f"No batches can be made of n={n} samples, batch={batch}, rank={rank} of {world}: "
                "n and batch must be at least 1 and rank below the number of ranks."
            )
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self._kept: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> torch.Tensor:
        """Sample numbers of this rank's batch at `step` (from 0): int64 (batch,)."""
        import torch

        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        out = np.empty(self.batch, np.int64)
        position, filled = (step * self.world + self.rank) * self.batch, 0
        while filled < self.batch:
            epoch, start = divmod(position + filled, self.n)
            count = min(self.n - start, self.batch - filled)
            out[filled : filled + count] = self._order(epoch)[start : start + count]
            filled += count
        return torch.from_numpy(out)

    def epoch(self, step: int) -> int:
        """The epoch in which the global batch of `step` begins."""
        return step * self.batch * self.world // self.n

    def steps(self, epochs: float) -> int:
        """The number of steps after which every sample has been seen at least `epochs` times."""
        return int(-(-self.n * epochs // (self.batch * self.world)))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            if len(self._kept) == 2:
                del self._kept[min(self._kept)]
            self._kept[epoch] = permutation(self.n, self.seed, epoch)
        return self._kept[epoch]


class Grouped:
    """Sample numbers of batches of like lengths, so that little of a padded batch is padding: a function of (seed, step).

    Each epoch shuffles all samples, sorts each stretch of `pool` batches by length, cuts it into batches and shuffles those.
    Every sample comes once an epoch; the last stretch may leave one batch smaller. Step s of W ranks takes batches s·W to
    (s+1)·W − 1 of this list, rank r the r-th of them.
    """

    def __init__(
        self, lengths: np.ndarray, batch: int, seed: int, rank: int = 0, world: int = 1, *, pool: int = 50
    ) -> None:
        if len(lengths) < 1 or batch < 1 or world < 1 or not 0 <= rank < world:
            raise UserError(f"No batches can be made of {len(lengths)} samples, batch={batch}, rank={rank} of {world}.")
        self.lengths, self.batch, self.seed, self.rank, self.world = lengths, batch, seed, rank, world
        self.pool, self.per_epoch = pool, -(-len(lengths) // batch)
        self._kept: tuple[int, list[np.ndarray]] = (-1, [])

    def indices(self, step: int) -> np.ndarray:
        """Sample numbers of this rank's batch at `step` (from 0): int64 (at most `batch`,)."""
        epoch, place = divmod(step * self.world + self.rank, self.per_epoch)
        if self._kept[0] != epoch:
            self._kept = (epoch, self._batches(epoch))
        return self._kept[1][place]

    def _batches(self, epoch: int) -> list[np.ndarray]:
        order, stretch = permutation(len(self.lengths), self.seed, epoch), self.batch * self.pool
        cut = []
        for begin in range(0, len(order), stretch):
            part = order[begin : begin + stretch]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            cut += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        return [cut[i] for i in permutation(len(cut), fold(self.seed, 0, 0, "order of batches"), epoch)]
