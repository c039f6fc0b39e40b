"""Non-maximum suppression: of boxes of one class that overlap, the one of the highest score stays

Equation: boxes in the order of their scores (equal ones in the order given); box i stays unless one that stays, of its class
    and before it, has IoU > threshold with it.

`nms` takes one list of boxes and answers like torchvision's; long lists go through machine code (numba). `pick` takes the
candidates of a whole batch of pictures and never leaves the device: greedy suppression is the fixed point of
    stays[i] = no j < i with stays[j] and over[j, i],
which is reached after as many sweeps as the longest chain of boxes that suppress one another (a few).

Differences:
- E36: the notes take away boxes *nearby* one of higher probability. Nearby means IoU above a threshold, for boxes of one class,
  greedily from the highest score: a box that was itself taken away takes nothing away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.detection.parts.boxes import iou

_SHORT = 200  # below this many boxes the matrix is cheaper than compiled code that has to be loaded


def nms(boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None = None) -> Tensor:
    """Indices of the boxes that stay, highest score first: (N, 4), (N,) → int64 (K,). With `classes` (N,) within each class.

    A box goes when its IoU with one that stays is strictly greater than `threshold`; equal scores are ranked as given.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order].float()
    kinds = torch.zeros_like(order) if classes is None else classes[order]
    if len(order) <= _SHORT or not boxes.is_cpu:
        return order[_greedy(_over(ranked[None], kinds[None], threshold))[0]]
    kept = _swept()(np.ascontiguousarray(ranked.T.numpy()), kinds.long().numpy(), np.float32(threshold))
    return order[torch.from_numpy(kept)]


def pick(
    boxes: Tensor, scores: Tensor, least: float, threshold: float, most: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of each picture from its candidates: boxes (N, A, 4) or (N, A, C, 4), scores (N, A, C).

    A candidate may be detected as every class whose score exceeds `least`. Returns boxes (N, most, 4), scores (N, most) and
    classes (N, most), highest score first; an empty place has the score 0 and the class −1. What a picture gets does not
    depend on the others of the batch.
    """
    count, places, kinds = scores.shape
    flat = scores.float().reshape(count, -1)
    if flat.shape[1] < most:
        flat = torch.nn.functional.pad(flat, (0, most - flat.shape[1]))
    best, index = flat.sort(dim=1, descending=True, stable=True)
    best, index = best[:, :most], index[:, :most].clamp(max=places * kinds - 1)
    label = index % kinds
    source = boxes.reshape(count, -1, 4)
    place = index if boxes.ndim == 4 else index // kinds
    chosen = source.gather(1, place[..., None].expand(-1, -1, 4)).float()
    valid = best > least
    stays = _greedy(_over(chosen, label, threshold) & valid[:, :, None] & valid[:, None, :]) & valid
    first = (~stays).to(torch.uint8).argsort(dim=1, stable=True)  # what stays comes first, in its order
    stays = stays.gather(1, first)
    chosen = torch.where(stays[..., None], chosen.gather(1, first[..., None].expand(-1, -1, 4)), 0.0)
    return (
        chosen,
        torch.where(stays, best.gather(1, first), 0.0),
        torch.where(stays, label.gather(1, first), -1),
    )


def _over(boxes: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """bool (N, K, K): [j, i] where j comes before i, is of its class, and overlaps it too much."""
    alike = classes[:, :, None] == classes[:, None, :]
    return ((iou(boxes, boxes) > threshold) & alike).triu(1)


def _greedy(over: Tensor) -> Tensor:
    """bool (N, K): the fixed point of `stays[i] = no j with stays[j] and over[j, i]`."""
    stays = torch.ones(over.shape[:2], dtype=torch.bool, device=over.device)
    for _ in range(over.shape[1]):
        now = ~(over & stays[:, :, None]).any(1)
        if torch.equal(now, stays):
            break
        stays = now
    return stays


@functools.cache
def _swept() -> Callable[..., Any]:
    """The greedy loop in machine code: each box against those that stay, 64 at a time (compiled once, then cached).

    The first look at a block needs no division and no class: w·h > share·(A + B), with share a little below t/(1 + t), is
    necessary for IoU > t. The answer itself is computed as it is everywhere else.
    """
    from numba import njit

    @njit(cache=True, nogil=True)
    def sweep(boxes, classes, threshold):  # type: ignore[no-untyped-def]
        count, block = boxes.shape[1], 64
        kept, kind = np.empty(count, np.int64), np.empty(count, np.int64)
        stays = np.zeros((5, (count + block - 1) // block * block), np.float32)  # x1, y1, x2, y2, area
        zero, one = np.float32(0), np.float32(1)
        share = max(threshold / (one + threshold) * np.float32(1 - 1e-5), zero)
        n = 0
        for i in range(count):
            x1, y1, x2, y2, c = boxes[0, i], boxes[1, i], boxes[2, i], boxes[3, i], classes[i]
            own = max(x2 - x1, zero) * max(y2 - y1, zero)
            gone, start = False, 0
            while start < n and not gone:
                at = stays[:, start : start + block]
                near = np.uint32(0)
                for j in range(block):
                    w = (x2 if x2 < at[2, j] else at[2, j]) - (x1 if x1 > at[0, j] else at[0, j])
                    h = (y2 if y2 < at[3, j] else at[3, j]) - (y1 if y1 > at[1, j] else at[1, j])
                    w = w if w > zero else zero
                    near |= np.uint32(w * h > share * (own + at[4, j]))
                if near:
                    for j in range(min(block, n - start)):
                        w = max(min(x2, at[2, j]) - max(x1, at[0, j]), zero)
                        h = max(min(y2, at[3, j]) - max(y1, at[1, j]), zero)
                        shared = w * h
                        union = own + at[4, j] - shared
                        if shared > zero and kind[start + j] == c and shared / union > threshold:
                            gone = True
                            break
                start += block
            if not gone:
                stays[0, n], stays[1, n], stays[2, n], stays[3, n], stays[4, n] = x1, y1, x2, y2, own
                kind[n], kept[n] = c, i
                n += 1
        return kept[:n]

    return sweep
