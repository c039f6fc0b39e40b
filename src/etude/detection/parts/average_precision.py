"""Average precision of detections: the PASCAL VOC rule (11 points or area) and the COCO rule (101 points, IoU .5 to .95)

Paper: Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, §4.2; Lin et al., Microsoft COCO, 2014,
arXiv:1405.0312.

Equation: detections of a class in all pictures, by falling score; each is a true positive if the object of its class that it
    overlaps most has IoU ≥ threshold and no earlier detection has it, nothing if that object is difficult, else a false positive;
    precision p(r) = TP / (TP + FP) as a function of recall r = TP / objects, and AP the mean over r of max_{r' ≥ r} p(r').

Equal scores are ranked by picture, then as given. A class without objects has no AP and does not enter the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.detection.parts.boxes import iou, paired_iou


@dataclass(frozen=True, eq=False)
class Judged:
    """Detections against the objects of the pictures, by one IoU threshold."""

    average: dict[int, float]
    """AP of each class that has objects."""
    recall: dict[int, float]
    """Share of its objects that were found at all."""

    @property
    def mean(self) -> float:
        """mAP; 0 where no class has objects."""
        return float(np.mean(list(self.average.values()))) if self.average else 0.0


def voc(
    found: tuple[Tensor, Tensor, Tensor],
    boxes: Tensor,
    labels: Tensor,
    difficult: Tensor | None = None,
    threshold: float = 0.5,
    points: int = 0,
) -> Judged:
    """VOC average precision of each class.

    `found` is what `suppression.pick` gives (boxes (N, K, 4), scores (N, K), classes (N, K), −1 for none); the objects are
    boxes (N, M, 4) with labels (N, M), −1 for none, and `difficult` (N, M) bool. `points` 11 is the rule of VOC 2007, 0 the
    area under the curve (from 2010).
    """
    average, recall = {}, {}
    for kind, (right, objects) in _ranked(found, boxes, labels, difficult, threshold).items():
        average[kind] = _voc_average(right, objects, points)
        recall[kind] = float(right.sum() / objects)
    return Judged(average, recall)


def curves(
    found: tuple[Tensor, Tensor, Tensor],
    boxes: Tensor,
    labels: Tensor,
    difficult: Tensor | None = None,
    threshold: float = 0.5,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(recall, precision) of each class after each of its detections; arguments as for `voc`."""
    return {kind: _curve(*row) for kind, row in _ranked(found, boxes, labels, difficult, threshold).items()}


def _ranked(
    found: tuple[Tensor, Tensor, Tensor], boxes: Tensor, labels: Tensor, difficult: Tensor | None, threshold: float
) -> dict[int, tuple[np.ndarray, int]]:
    """Of each class with objects: which of its detections, by falling score, are true positives; and its objects."""
    given, scores, classes = (part.detach().cpu() for part in found)
    boxes, labels = boxes.cpu(), labels.cpu()
    hard = torch.zeros_like(labels, dtype=torch.bool) if difficult is None else difficult.cpu()
    overlaps = iou(given, boxes)  # (N, K, M)
    overlaps = overlaps.masked_fill(classes[:, :, None] != labels[:, None, :], -1)
    best, index = overlaps.max(2)
    owner = (index + boxes.shape[1] * torch.arange(len(boxes))[:, None]).numpy()
    hit = (best >= threshold).numpy()
    rows: dict[int, tuple[np.ndarray, int]] = {}
    for kind in labels[labels >= 0].unique().tolist():
        objects = int(((labels == kind) & ~hard).sum())
        if not objects:
            continue
        mine = np.flatnonzero((classes == kind).numpy().ravel())
        mine = mine[np.argsort(-scores.numpy().ravel()[mine], kind="stable")]
        claims, right = owner.ravel()[mine], hit.ravel()[mine]
        counted = ~(right & hard.numpy().ravel()[claims])  # a difficult object is neither right nor wrong
        claims, right = claims[counted], right[counted]
        first = np.zeros(len(claims), bool)
        hits = np.flatnonzero(right)
        first[hits[np.unique(claims[hits], return_index=True)[1]]] = True  # the earliest claim of each object
        rows[kind] = (first, objects)
    return rows


def coco(found: tuple[Tensor, Tensor, Tensor], boxes: Tensor, labels: Tensor) -> dict[str, float]:
    """COCO's AP (mean over IoU .50:.05:.95), AP50 and AP75, at most 100 detections a picture; tensors as for `voc`.

    Unlike VOC's rule, a detection takes the best object that is still free.
    """
    given, scores, classes = (part.detach().cpu() for part in found)
    boxes, labels = boxes.cpu(), labels.cpu()
    thresholds = np.linspace(0.5, 0.95, 10)
    overlaps = iou(given.double(), boxes.double()).numpy()
    rows: list[np.ndarray] = []
    for kind in labels[labels >= 0].unique().tolist():
        right, marks = [], []
        objects = int((labels == kind).sum())
        for picture in range(len(boxes)):
            mine = np.flatnonzero((classes[picture] == kind).numpy())
            mine = mine[np.argsort(-scores[picture].numpy()[mine], kind="stable")][:100]
            truth = np.flatnonzero((labels[picture] == kind).numpy())
            right.append(_free_matches(overlaps[picture][np.ix_(mine, truth)], thresholds))
            marks.append(scores[picture].numpy()[mine])
        order = np.argsort(-np.concatenate(marks), kind="stable")
        hits = np.concatenate(right, axis=1)[:, order]
        rows.append(np.array([_coco_average(row, objects) for row in hits]))
    table = np.mean(rows, axis=0) if rows else np.zeros(len(thresholds))
    return {"AP": float(table.mean()), "AP50": float(table[0]), "AP75": float(table[5])}


def recall_of(proposals: Tensor, boxes: Tensor, labels: Tensor, threshold: float = 0.5) -> float:
    """Share of the objects (N, M) that some of their picture's proposals (N, P, 4) overlaps by at least `threshold`."""
    if not int((labels >= 0).sum()):
        return 0.0
    best = iou(boxes, proposals.to(boxes.device)).amax(2)
    return float((best >= threshold)[labels >= 0].float().mean())


def localisation_error(box: Tensor, label: Tensor, boxes: Tensor, labels: Tensor, threshold: float = 0.5) -> float:
    """Share of pictures whose one answer, box (N, 4) and label (N,), has the wrong class or IoU < threshold with its object."""
    right = (label == labels) & (paired_iou(box, boxes) >= threshold)
    return float((~right).float().mean())


def _free_matches(overlaps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """bool (T, K): detections (K, M), best first, each take the free object they overlap most, of equal ones the last."""
    out = np.zeros((len(thresholds), len(overlaps)), bool)
    for row, threshold in enumerate(thresholds):
        free = np.ones(overlaps.shape[1], bool)
        for place, values in enumerate(overlaps):
            least, chosen = min(threshold, 1 - 1e-10), -1
            for other in np.flatnonzero(free):
                if values[other] >= least:
                    least, chosen = values[other], other
            if chosen >= 0:
                free[chosen], out[row, place] = False, True
    return out


def _curve(right: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) after each detection."""
    true = np.cumsum(right)
    return true / objects, true / np.arange(1, len(right) + 1)


def _voc_average(right: np.ndarray, objects: int, points: int) -> float:
    recall, precision = _curve(right, objects)
    if points:
        best = [precision[recall >= at - 1e-12].max(initial=0) for at in np.linspace(0, 1, points)]
        return float(np.mean(best))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def _coco_average(right: np.ndarray, objects: int) -> float:
    recall, precision = _curve(right, objects)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(
        np.mean(np.where(place < len(recall), envelope[np.minimum(place, len(recall) - 1)], 0)) if len(recall) else 0.0
    )
