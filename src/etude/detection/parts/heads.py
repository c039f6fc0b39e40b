"""What the region detectors share behind their regions: the two heads, their loss, and what is detected from them

Paper: Girshick, Fast R-CNN, 2015, arXiv:1504.08083, §2.1 to 2.3.

Equation: p = softmax over C classes and background; a box code t^k for each class k. For a region of class u, whose object has
the code v relative to it,
    L = −log p_u + λ [u is a class] Σ smooth_L1(t^u_i − v_i),   smooth_L1(d) = d²/2 where |d| < 1, |d| − ½ elsewhere.

Codes are divided by the deviations (0.1, 0.1, 0.2, 0.2), which makes the head's outputs about 1, as the authors' code does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.detection.parts import boxes as box
from etude.detection.parts.matching import assign, sample
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


def chosen_regions(
    regions: Tensor,
    scene_boxes: Tensor,
    labels: Tensor,
    difficult: Tensor,
    count: int,
    share: float,
    least: float,
    classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The regions of a mini-batch: proposals (N, A, 4) → regions (N, K, 4), classes (N, K), codes to say (N, K, 4), and which
    regions are at an object (N, K). Class C is background, −1 does not count.

    At an object: IoU ≥ 0.5; background: IoU in [least, 0.5). At most `share` of the `count` are at objects.
    """
    overlap = box.iou(regions, scene_boxes)
    flat = (regions[..., 2:] <= regions[..., :2]).any(-1)  # empty places of a list of proposals
    assigned = assign(overlap, labels, 0.5, 0.5, least=least, difficult=difficult).masked_fill(flat, -2)
    index, valid = sample(assigned, count, share, generator)
    owner = assigned.gather(1, index)
    region = regions.gather(1, index[..., None].expand(-1, -1, 4))
    at = (owner >= 0) & valid
    kind = torch.where(at, labels.gather(1, owner.clamp(min=0)), classes).masked_fill(~valid, -1)
    target = scene_boxes.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    safe = torch.where(at[..., None], region, region.new_tensor([0.0, 0.0, 1.0, 1.0]))
    wanted = torch.where(at[..., None], target, safe)
    return region, kind, box.encode(wanted, safe) / region.new_tensor(DEVIATIONS), at


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
    chance = scores.float().softmax(-1)[..., :-1]
    flat = (regions[..., 2:] <= regions[..., :2]).any(-1, keepdim=True)
    chance = chance.masked_fill(flat, 0.0)
    anchors = torch.where(flat, regions.new_tensor([0.0, 0.0, 1.0, 1.0]), regions)
    found = box.decode(codes.float() * codes.new_tensor(DEVIATIONS).float(), anchors[:, :, None])
    return pick(box.clip(found, size, size), chance, least, overlap)
