"""Least squares on polynomials of the state, prepared once for any number of targets."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Linear(nn.Module):
    """w·ψ(z), ψ the monomials of z (d,) up to a degree, or z itself (degree 0: a table of one-hot z): (N, d) → (N, A) float64."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: int, degree: int, constant: bool, start: float) -> None:
        super().__init__()
        powers = range(0 if constant else 1, degree + 1)
        chosen = [c for k in powers for c in itertools.combinations_with_replacement(range(inputs), k)]
        self.monomials = [list(c) for c in chosen] if degree else []
        shape = (len(self.monomials) or inputs, outputs)
        self.register_buffer("weight", torch.full(shape, float(start), dtype=torch.float64))

    def features(self, z: Tensor) -> Tensor:
        """ψ(z): (N, d) → (N, F)."""
        return torch.stack([z[:, c].prod(1) for c in self.monomials], 1) if self.monomials else z

    def forward(self, z: Tensor) -> Tensor:
        return self.features(z) @ self.weight


def solvers(
    features: NDArray[np.float64], action: NDArray[np.int64], outputs: int, l2: float
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """For each output its rows (n,) and the matrix (F, n) that takes their targets to argmin ½ Σ (w·ψ − y)² + ½ l2 ‖w‖²."""
    found = []
    for output in range(outputs):
        rows = np.flatnonzero(action == output)
        part = np.concatenate([features[rows], np.sqrt(l2) * np.eye(features.shape[1])]) if l2 else features[rows]
        cut = np.finfo(float).eps * max(1, *part.shape)
        found.append((rows, np.linalg.pinv(part, rcond=cut)[:, : len(rows)]))
    return found
