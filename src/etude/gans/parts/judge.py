"""The Fréchet distance of Gaussians fitted to features, and the LeNet whose features they are

Paper: Heusel et al., 2017, arXiv:1706.08500 (Fréchet Inception distance).

Equation: d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), μ and Σ the mean and covariance of features of a classifier.

Differences:
- The features are the 84 units before the output of *our own LeNet*, trained for 400 steps on the training split at
  hand with a seed of its own, so that every run on the same data has the same judge. The number is therefore called
  `lenet_frechet_distance`: it can be compared between runs of etude, never with a published Inception FID.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.blocks.nn.init import initialise
from etude.data.batches import Stream

JUDGE_SIZE, JUDGE_STEPS, JUDGE_BATCH = 32, 400, 128


def frechet(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Fréchet distance between N(μ₁, Σ₁) and N(μ₂, Σ₂), from float64 means (d,) and covariances (d, d).

    (Σ₁Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric, so eigenvalues of symmetric matrices suffice.
    """
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    total = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return max(total.item(), 0.0)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), float64, of features (N, d)."""
    features = features.double()
    return features.mean(0), features.T.cov()


@torch.no_grad()
def judgement(judge: nn.Module, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """What our LeNet sees in images (N, C, H, W), uint8 or float in [0, 1]: features (N, 84) and classes (N,)."""
    seen = []
    for part in images.split(batch):
        x = judge.features(judge.standardise(_judge_size(part)))  # type: ignore[operator]
        seen.append(judge.classifier[:-1](x))  # type: ignore[index]
    features = torch.cat(seen)
    return features.cpu(), judge.classifier[-1](features).argmax(1).cpu()  # type: ignore[index]


def _judge_size(images: Tensor) -> Tensor:
    images = images.to(torch.get_default_dtype()) / 255 if images.dtype == torch.uint8 else images
    if images.shape[-1] == JUDGE_SIZE:
        return images
    return F.interpolate(images, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=images.shape[-1] > JUDGE_SIZE)


def teach(judge: nn.Module, x: Tensor, y: Tensor, device: torch.device, steps: int) -> None:
    """Train our LeNet on images (N, C, H, W) uint8 and classes (N,); the same result for every seed of the run."""
    initialise(judge, "he", generator=None if device.type != "cpu" else torch.Generator().manual_seed(0))
    optimizer = optim.make("adam", judge.parameters(), lr=3e-3)
    rate, stream = optim.schedule("one_cycle", 3e-3, steps), Stream(len(y), JUDGE_BATCH, seed=0)
    judge.train().requires_grad_(True)
    for step in range(steps):
        optim.set_lr(optimizer, rate(step))
        index = stream.indices(step)
        loss = F.cross_entropy(judge(_judge_size(x[index].to(device))), y[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge.eval().requires_grad_(False)
