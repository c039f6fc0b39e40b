"""Scores of predictions, each a pure function whose value does not depend on how the data were cut into batches.

Two forms keep that promise: means over items (`accuracy`, `nll`, …) weigh every item equally, so a data set in ragged
batches is summed with ``reduction="sum"`` and divided once; and `confusion_matrix` counts, so the matrices of batches
add up and everything derived from the sum (`macro_f1`, `mean_iou`) is the score of the whole set, not a mean of batch
scores. All results are on the input's device; nothing here synchronises.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def accuracy(scores: Tensor, targets: Tensor) -> Tensor:
    """Share of items whose highest score is the target. scores (..., C), targets (...) int64 → 0-dim float64 in [0, 1].

    A tie counts for the lowest class index, as argmax gives it, whatever the target; NaN for no items. Raises ValueError
    if the shapes do not agree.
    """
    _agree(scores, targets)
    return (scores.argmax(-1) == targets).double().mean()


def top_k_accuracy(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Share of items whose target is among the k highest scores. scores (..., C), targets (...) → 0-dim float64.

    Ties at the k-th place go to the lowest class indices, so constant scores earn no more than k classes. Raises
    ValueError unless 1 ≤ k ≤ C, or if the shapes do not agree.
    """
    _agree(scores, targets)
    classes = scores.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k is {k}; it must be between 1 and the number of classes, {classes}")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (order[..., :k] == targets[..., None]).any(-1).double().mean()


def nll(logits: Tensor, targets: Tensor, reduction: Reduction = "mean", ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood −log softmax(logits)[target], in nats. logits (..., C), targets (...) int64 → float64.

    Targets equal to ``ignore_index`` do not count: they add 0 to "sum", are 0 in "none" and are no part of the mean.
    """
    classes = logits.shape[-1]
    each = F.cross_entropy(
        logits.reshape(-1, classes).double(), targets.reshape(-1), reduction="none", ignore_index=ignore_index
    )
    if reduction == "none":
        return each.reshape(targets.shape)
    if reduction == "sum":
        return each.sum()
    return each.sum() / (targets != ignore_index).sum()


def perplexity(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """exp of the mean negative log-likelihood a token. logits (..., V), targets (...) → 0-dim float64 ≥ 1.

    For ragged batches add up ``nll(..., "sum")``, divide by the number of tokens, then take exp: the mean of batch
    perplexities is a different, larger number.
    """
    return nll(logits, targets, ignore_index=ignore_index).exp()


def bits_per_dim(nats: Tensor | float, dimensions: int) -> Tensor | float:
    """Bits a dimension from the negative log-likelihood of whole items in nats: nats / (dimensions · ln 2).

    ``dimensions`` counts the numbers in one item (C · H · W). For densities on data scaled from {0, …, 255} to [0, 1]
    add 8 bits, the log-determinant of the scaling, before comparing with a discrete model.
    """
    return nats / (dimensions * math.log(2))


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Counts (classes, classes) int64: entry [i, j] is how often truth i was predicted as j. Inputs: int64, one shape.

    Items whose truth is ``ignore_index`` do not count. Matrices of disjoint batches add up to the matrix of the union.
    Raises ValueError if the shapes differ and IndexError if a label lies outside [0, classes).
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth has shape {tuple(truth.shape)}, predicted {tuple(predicted.shape)}; they must agree")
    truth, predicted = truth.reshape(-1), predicted.reshape(-1)
    if ignore_index is not None:
        kept = truth != ignore_index
        truth, predicted = truth[kept], predicted[kept]
    for name, labels in (("truth", truth), ("predicted", predicted)):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise IndexError(f"{name} holds a label outside 0 … {classes - 1}")
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(matrix: Tensor) -> Tensor:
    """Mean over classes of F1 = 2·TP / (2·TP + FP + FN). matrix (C, C) counts → 0-dim float64 in [0, 1].

    Classes that occur neither in truth nor in predictions have no F1 and are left out; NaN if none is left.
    """
    hits, total = _hits(matrix)
    return _mean_over_present(2 * hits, total, total > 0)


def mean_iou(matrix: Tensor) -> Tensor:
    """Mean over classes of intersection over union TP / (TP + FP + FN). matrix (C, C) counts → 0-dim float64 in [0, 1].

    Classes that occur neither in truth nor in predictions are left out; NaN if none is left.
    """
    hits, total = _hits(matrix)
    return _mean_over_present(hits, total - hits, total > 0)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Reliability diagram: for each of ``bins`` equal bins of confidence the count, mean confidence and accuracy.

    confidence (N,) in [0, 1]; correct (N,) bool or 0/1 → three (bins,) float64 tensors; means of empty bins are 0.
    Bin m is ((m−1)/M, m/M] as in Guo et al., 2017; the first also holds 0, the last 1, so each confidence falls in one.
    Raises ValueError for a confidence outside [0, 1] or NaN.
    """
    confidence, correct = confidence.reshape(-1).double(), correct.reshape(-1).double()
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("confidence must lie in [0, 1]; these look like logits or hold NaN")
    inner = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    place = torch.bucketize(confidence, inner)
    counts = torch.bincount(place, minlength=bins).double()
    shared = counts.clamp(min=1)
    return (
        counts,
        torch.bincount(place, weights=confidence, minlength=bins) / shared,
        torch.bincount(place, weights=correct, minlength=bins) / shared,
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """ECE = Σ_m (n_m / N) · |accuracy_m − confidence_m| over equal bins (Guo et al., 2017, arXiv:1706.04599, eq. 3).

    confidence (N,) in [0, 1], the probability of the predicted class; correct (N,) bool → 0-dim float64 (NaN if N = 0).
    """
    counts, mean_confidence, hit_rate = reliability(confidence, correct, bins)
    return (counts * (hit_rate - mean_confidence).abs()).sum() / counts.sum()


def _agree(scores: Tensor, targets: Tensor) -> None:
    """ValueError unless scores are (..., C) for targets (...): (N, 1) for (N,) would be broadcast to N × N comparisons."""
    if scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} need targets of shape {tuple(scores.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )


def _hits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """True positives of each class, and how often it occurs in truth plus in predictions (2·TP + FP + FN)."""
    matrix = matrix.double()
    return matrix.diagonal(), matrix.sum(0) + matrix.sum(1)


def _mean_over_present(part: Tensor, whole: Tensor, present: Tensor) -> Tensor:
    ratio = torch.where(present, part / whole.where(present, torch.ones_like(whole)), torch.zeros_like(part))
    return ratio.sum() / present.sum()
