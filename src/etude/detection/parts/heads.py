"""What the region detectors share behind their regions: the two heads, their loss, and what is detected from them

Paper: Girshick, Fast R-CNN, 2015, arXiv:1504.08083, §2.1 to 2.3.

Equation: p = softmax over C classes and background; a box code t^k for each class k. For a region of class u, whose object has
the code v relative to it,
    L = −log p_u + λ [u is a class] Σ smooth_L1(t^u_i − v_i),   smooth_L1(d) = d²/2 where |d| < 1, |d| − ½ elsewhere.

Codes are divided by the deviations (0.1, 0.1, 0.2, 0.2), which makes the head's outputs about 1, as the authors' code does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.detection.parts import boxes as box
from etude.detection.parts.matching import IGNORED, assign, sample
from etude.detection.parts.regions import widened
from etude.detection.parts.scenes import Scene
from etude.detection.parts.suppression import pick

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


class Heads(nn.Module):
    """Features of regions (K, features) → class scores (K, C + 1), background last, and codes (K, C, 4); two hidden layers."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden), nn.ReLU(inplace=True)
        )
        self.scores, self.codes = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4 * classes)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.normal_(self.codes.weight, std=0.001)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.codes.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hidden(x)
        return self.scores(x), self.codes(x).unflatten(-1, (-1, 4))


def smooth_l1(difference: Tensor, beta: float = 1.0) -> Tensor:
    """Elementwise: d²/(2β) where |d| < β, |d| − β/2 elsewhere."""
    size = difference.abs()
    return torch.where(size < beta, difference.square() / (2 * beta), size - beta / 2)


class Chosen(NamedTuple):
    """The regions of a mini-batch."""

    boxes: Tensor
    """(N, K, 4) in pixels."""
    kinds: Tensor
    """int64 (N, K): the object's class, C for background, −1 for a place that does not count."""
    codes: Tensor
    """(N, K, 4): the object's box relative to the region, divided by the deviations; 0 away from objects."""


def chosen_regions(
    regions: Tensor, scene: Scene, count: int, share: float, least: float, classes: int, generator: torch.Generator
) -> Chosen:
    """Of the regions (N, A, 4), `count` a picture, at most `share` of them at an object (IoU ≥ 0.5), else with IoU ≥ `least`."""
    empty = (regions[..., 2:] <= regions[..., :2]).any(-1)  # places of a list that are not filled
    overlap = box.iou(regions, scene.boxes)
    assigned = assign(overlap, scene.labels, 0.5, 0.5, least=least, difficult=scene.difficult)
    index, valid = sample(assigned.masked_fill(empty, IGNORED), count, share, generator)
    owner = assigned.gather(1, index)
    region = regions.gather(1, index[..., None].expand(-1, -1, 4))
    at = (owner >= 0) & valid
    kind = torch.where(at, scene.labels.gather(1, owner.clamp(min=0)), classes).masked_fill(~valid, -1)
    target = scene.boxes.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    unit = region.new_tensor([0.0, 0.0, 1.0, 1.0])
    code = box.encode(torch.where(at[..., None], target, unit), torch.where(at[..., None], region, unit))
    return Chosen(region, kind, code / region.new_tensor(DEVIATIONS))


def objective(scores: Tensor, codes: Tensor, kind: Tensor, code: Tensor, weight: float) -> Tensor:
    """L of the file's docstring, mean over the regions that count: scores (K, C + 1), codes (K, C, 4), kind (K,), code (K, 4)."""
    classes = codes.shape[1]
    counted = kind >= 0
    each = F.cross_entropy(scores, kind.clamp(min=0), reduction="none") * counted
    at = counted & (kind < classes)
    said = codes.gather(1, kind.clamp(0, classes - 1).view(-1, 1, 1).expand(-1, 1, 4))[:, 0]
    places = smooth_l1(said - code).sum(-1) * at
    return (each + weight * places).sum() / counted.sum().clamp(min=1)


def answers(
    scores: Tensor, codes: Tensor, regions: Tensor, size: float, least: float, overlap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of each picture, as of `suppression.pick`: scores (N, R, C + 1), codes (N, R, C, 4), regions (N, R, 4)."""
    chance = widened(scores).softmax(-1)[..., :-1]
    flat = (regions[..., 2:] <= regions[..., :2]).any(-1, keepdim=True)
    chance = chance.masked_fill(flat, 0.0)
    anchors = torch.where(flat, regions.new_tensor([0.0, 0.0, 1.0, 1.0]), regions)
    found = box.decode(widened(codes) * regions.new_tensor(DEVIATIONS), anchors[:, :, None])
    return pick(box.clip(found, size, size), chance, least, overlap)
