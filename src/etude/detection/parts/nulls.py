"""Nulls of the detectors: what stands in a method's file while a control of an experiment runs"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etude.detection.fast_rcnn import pooled  # imported here, before a control puts a null in its place
from etude.detection.faster_rcnn import propose


def transposed(boxes: Tensor, size: float, cells: int) -> Tensor:
    """YOLO's `place` with row and column exchanged: another cell than the one that holds the centre."""
    cell = ((boxes[..., :2] + boxes[..., 2:]) / 2 * (cells / size)).long().clamp(0, cells - 1)
    return cell[..., 0] * cells + cell[..., 1]


def proposals_of_others(said: Any, anchors: Tensor, size: float, count: int) -> Tensor:
    """Faster R-CNN's `propose`, each picture with the proposals of the one before it (of an empty one, where it is alone)."""
    own = propose(said, anchors, size, count)
    return own.roll(1, 0) if len(own) > 1 else torch.zeros_like(own)


def pooled_elsewhere(config: Any, features: Tensor, regions: Tensor) -> Tensor:
    """Fast R-CNN's `pooled` with the features of the picture before."""
    return pooled(config, features.roll(1, 0) if len(features) > 1 else torch.zeros_like(features), regions)
