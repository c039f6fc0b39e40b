"""The two networks of the paper's supervised experiments, and how the one with batch norm answers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from etude.meta.maml.adaptation import Predict, Weights

__all__ = ["Convolutional", "ReferenceNorm", "Regressor", "answer"]


class Regressor(nn.Sequential):
    """(N, 1) → (N, 1): two hidden layers of `width` ReLUs, as in the paper's section 5.1."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class ReferenceNorm(nn.Module):
    """Batch norm whose statistics come from the first `reference` images of the batch (None: from all of them)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, reference: int | None = None) -> Tensor:
        """(N, C, H, W) → the same shape."""
        variance, mean = torch.var_mean(x[:reference], (0, 2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (x - mean) * scale + self.bias[:, None, None]


class Convolutional(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] → logits (N, ways): four 3×3 convolutions of stride 2 (paper, section 5.2)."""

    def __init__(self, ways: int, width: int) -> None:
        super().__init__()
        channels = [1, width, width, width, width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        self.norms = nn.ModuleList(ReferenceNorm(width) for _ in range(4))
        self.out = nn.Linear(width, ways)

    def forward(self, x: Tensor, reference: int | None = None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x), reference).relu()
        return self.out(x.mean((2, 3)))


def answer(module: nn.Module, normalizer: str) -> Predict:
    """How the convolutional network answers: with the support's statistics, or (transductive) with the questions' own."""

    def predict(weights: Weights, x: Tensor, support: Tensor) -> Tensor:
        if normalizer == "transductive" or x is support:
            return functional_call(module, weights, (x,))
        return functional_call(module, weights, (torch.cat([support, x]), len(support)))[len(support) :]

    return predict
