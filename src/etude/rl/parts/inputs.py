"""What a fitted function sees of a state: z = s · scale + shift, standardised, the place on a grid, or one-hot as it came."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import Environment
from etude.core.errors import UserError
from etude.rl.parts.maps import grid


class Fitted(nn.Module):
    """States (N, D) → Q (N, A), or V (N, 1): one of the functions, `body`, of z = s · scale + shift (N, d)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, body: nn.Module, size: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("scale", torch.zeros(size, inputs, dtype=dtype))
        self.register_buffer("shift", torch.zeros(inputs, dtype=dtype))

    def inputs(self, state: NDArray[Any] | Tensor) -> Tensor:
        """z (N, d) of states (N, D)."""
        return torch.as_tensor(state).to(self.scale) @ self.scale + self.shift

    def forward(self, state: Tensor) -> Tensor:
        return self.body(self.inputs(state))

    @torch.no_grad()
    def of(self, state: NDArray[Any]) -> NDArray[np.float64]:
        """The same of arrays: (N, D) → (N, A) float64."""
        return self(torch.from_numpy(state)).double().cpu().numpy()


def places(name: str, kind: Environment | None, size: int, one_hot: bool) -> NDArray[np.float64]:
    """What stands for each discrete state, (S, d): itself (`one_hot`), else its place on a grid, in [−1, 1]², or 1 and 2.

    Raises UserError where the states are the cells of no grid.
    """
    if one_hot:
        return np.eye(size)
    if kind is None:
        return np.array([[1.0], [2.0]])
    if (cells := grid(kind, size)) is None:
        raise UserError(f"the states of --env {name} are no numbers to fit polynomials to; take --features tabular")
    row, column = np.divmod(np.arange(size), cells[0][1])
    return np.stack([row, column], 1) * 2 / np.maximum(1, np.array(cells[0]) - 1) - 1


def standardised(x: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """scale (D, D) and shift (D,) with which the rows (N, D) have mean 0 and deviation 1 (constant columns: 0)."""
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    factor = 1 / np.where(deviation > 0, deviation, 1.0)
    return np.diag(factor), -mean * factor
