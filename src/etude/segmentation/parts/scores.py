"""What a segmentation is worth: loss, pixel accuracy, mean intersection over union, Rand error

Rand error: Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, Frontiers
in Neuroanatomy, 2015: one minus the F-score of pairs of pixels that lie in one segment, foreground-restricted.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etude.blocks.metrics import confusion_matrix, mean_iou
from etude.core.run import Run
from etude.segmentation.parts.scenes import VOID, Part, Scenes
from etude.segmentation.parts.tiles import PixelNetwork, logits

PIXELS = 1 << 18
"""Pixels that are scored at once (at least one picture)."""


def pixel_loss(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy (nats) over the pixels that are not void, weighted by their class's `weight` (K,); 0-dim.

    scores (N, K, H, W); labels (N, H, W) int64, 255 for void. All void: 0.
    """
    total = F.cross_entropy(scores.float(), labels, weight, ignore_index=VOID, reduction="sum")
    kept = labels != VOID
    count = kept.sum() if weight is None else weight[labels.where(kept, 0)].where(kept, 0).sum()
    return total / count.clamp(min=1e-12)


def evaluate(
    run: Run, model: PixelNetwork, data: Scenes, split: Literal["validation", "test"], tile: int = 0
) -> dict[str, float]:
    """`<split>_loss`, `_pixel_accuracy`, `_mean_iou`, and `_rand_error` where the data have segments; in eval mode.

    Over ranks each picture is scored once. The model's mode stays as it was.
    """
    part: Part = getattr(data, split)
    training, classes = model.training, len(data.spec.classes)
    model.eval()
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in groups(part, run.rank, run.world):
        with run.autocast():
            scores = logits(model, x.to(run.device), tile).float()
        labels = y.to(run.device).long()
        sums[0] += float(F.cross_entropy(scores, labels, ignore_index=VOID, reduction="sum"))
        answers = scores.argmax(1)
        matrix += confusion_matrix(labels, answers, classes, VOID).cpu()
        if data.spec.extra["segments"]:
            for mask, answer in zip(y.numpy(), answers.byte().cpu().numpy()):
                sums[1] += rand_error(segments(mask), segments(answer))
    if run.world > 1:
        torch.distributed.all_reduce(matrix)
        torch.distributed.all_reduce(sums)
    model.train(training)
    counted = max(1, int(matrix.sum()))
    found = {
        f"{split}_loss": float(sums[0]) / counted,
        f"{split}_pixel_accuracy": int(matrix.diagonal().sum()) / counted,
        f"{split}_mean_iou": float(mean_iou(matrix)),
    }
    if data.spec.extra["segments"]:
        found[f"{split}_rand_error"] = float(sums[1]) / len(part)
    return found


def groups(part: Part, rank: int = 0, world: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The pictures of this rank, neighbours of one size stacked: uint8 (N, C, H, W) and (N, H, W)."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for x, y in list(zip(part.x, part.y))[rank::world]:
        fits = found and found[-1][1][0].shape == y.shape and (len(found[-1][1]) + 1) * y.numel() <= PIXELS
        if not fits:
            found.append(([], []))
        found[-1][0].append(x)
        found[-1][1].append(y)
    return [(torch.stack(x), torch.stack(y)) for x, y in found]


def segments(mask: np.ndarray) -> np.ndarray:
    """Connected parts (4 neighbours) of one class, numbered from 1: int (H, W). Class 0 and void are 0."""
    from scipy import ndimage

    out = np.zeros(mask.shape, np.int64)
    for label in np.unique(mask):
        if label not in (0, VOID):
            found: Any = ndimage.label(mask == label)
            parts = found[0]
            out += np.where(parts, parts + out.max(), 0)
    return out


def rand_error(truth: np.ndarray, predicted: np.ndarray) -> float:
    """1 − 2 Σ p_ij² / (Σ s_i² + Σ t_j²) over the pixels of true segments, p_ij those in true i and predicted j.

    Both int (H, W), 0 for no segment. A pixel that the prediction gives to none is a segment of its own. Without any true
    segment it is 0.
    """
    inside = truth.ravel() > 0
    t, p = truth.ravel()[inside], predicted.ravel()[inside].astype(np.int64)
    if not len(t):
        return 0.0
    alone = p == 0
    p[alone] = p.max() + 1 + np.arange(alone.sum())
    joint, truths, answers = (
        float((np.unique(key, return_counts=True)[1].astype(np.float64) ** 2).sum())
        for key in (t * (p.max() + 1) + p, t, p)
    )
    return 1 - 2 * joint / (truths + answers)
