"""Boxes: area, intersection over union, clipping, mirroring, and the code by which a box is said relative to another

A box is (x1, y1, x2, y2) in pixels, continuous edges: a box that covers one pixel has x2 − x1 = 1, and nothing adds 1.

Paper: Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010 (overlap); Girshick et al., Rich feature
hierarchies, 2013, arXiv:1311.2524, appendix C (code).

Equation: IoU = |A ∩ B| / |A ∪ B|, 0 where neither has an area; the code of box b relative to a (centres x, y, sides w, h):
    t = ((x_b − x_a)/w_a, (y_b − y_a)/h_a, log w_b/w_a, log h_b/h_a)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST = math.log(1000 / 16)  # a side grows at most so much in a step: exp of an untrained layer stays finite


def area(boxes: Tensor) -> Tensor:
    """(…, 4) → (…): width times height in float32 or better, 0 for a box whose edges are swapped."""
    x1, y1, x2, y2 = _exact(boxes).unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Every box of a with every box of b: (…, N, 4), (…, M, 4) → (…, N, M) in [0, 1], float32 or better.

    Half precision is widened first: the area of a box of 300 pixels does not fit it.
    """
    return _ratio(_exact(a).unsqueeze(-2), _exact(b).unsqueeze(-3))


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Each box with its partner: (…, 4), (…, 4) → (…) in [0, 1]."""
    return _ratio(_exact(a), _exact(b))


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """(…, 4) moved into the picture: 0 ≤ x ≤ width, 0 ≤ y ≤ height."""
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def mirror(boxes: Tensor, width: float) -> Tensor:
    """(…, 4) in the picture that was flipped left to right; x1 ≤ x2 stays, twice is the identity."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], -1)


def centred(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) → (centre x, centre y, width, height), (…, 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def cornered(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) → (x1, y1, x2, y2), (…, 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes said relative to anchors, both (…, 4) with an area: (…, 4), zero where they are equal."""
    box, anchor = centred(boxes), centred(anchors)
    return torch.cat([(box[..., :2] - anchor[..., :2]) / anchor[..., 2:], (box[..., 2:] / anchor[..., 2:]).log()], -1)


def decode(code: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`: (…, 4), (…, 4) → boxes (…, 4). A side is at most 62.5 times the anchor's."""
    anchor = centred(anchors)
    centre = code[..., :2] * anchor[..., 2:] + anchor[..., :2]
    return cornered(torch.cat([centre, code[..., 2:].clamp(max=_LARGEST).exp() * anchor[..., 2:]], -1))


def _exact(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(a) + area(b) - shared
    return torch.where(union > 0, shared / union.where(union > 0, 1.0), 0.0)
