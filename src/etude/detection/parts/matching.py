"""Which object a box is to find, and which boxes a mini-batch learns from

Paper: Ren, He, Girshick, Sun, Faster R-CNN, 2015, arXiv:1506.01497, §3.1.2; Girshick, Fast R-CNN, 2015, arXiv:1504.08083, §2.3.

Equation: with o the object that box a overlaps most,
    a is to find o if IoU(a, o) ≥ positive, or if no box overlaps o more than a does (`rescue`);
    a is background if least ≤ IoU(a, o) < negative; all other boxes are ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND, IGNORED = -1, -2


def assign(
    overlap: Tensor,
    labels: Tensor,
    positive: float,
    negative: float,
    *,
    least: float = 0.0,
    rescue: bool = False,
    difficult: Tensor | None = None,
) -> Tensor:
    """IoU (N, A, M) of boxes and objects, labels (N, M), −1 for none → int64 (N, A): the object's number, BACKGROUND or IGNORED.

    With `rescue` every object has a box at least (one that overlaps it at all): the one that overlaps it most, and all that
    equal it within 1e-6; a box that several objects claim goes to the one it overlaps most. Boxes at `difficult` objects (N, M)
    are ignored.
    """
    real = labels >= 0
    overlap = overlap.masked_fill(~real[:, None], -1.0)
    best, index = overlap.max(-1)
    out = torch.where(best >= positive, index, IGNORED)
    # where a picture has no object, everything is background
    out = torch.where((best < negative) & (best.clamp(min=0) >= least), BACKGROUND, out)
    if rescue:
        top = overlap.amax(1, keepdim=True)  # (N, 1, M)
        claimed = torch.where((overlap > top - 1e-6) & (top > 0) & (overlap > 0), overlap, -1.0)  # equal to rounding
        most, owner = claimed.max(-1)
        out = torch.where(most > 0, owner, out)
    if difficult is not None:
        hard = difficult.gather(1, out.clamp(min=0)) & (out >= 0)
        out = torch.where(hard, IGNORED, out)
    return out


def sample(assigned: Tensor, count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random choice of `count` boxes of each picture, of which at most `share` are at objects: assigned (N, A) as of `assign`.

    Returns their numbers int64 (N, K), K = min(count, A), those at objects first, and which of them count, bool (N, K): a picture
    may have too few. Background fills what objects leave free. The draws are made on the CPU.
    """
    boxes = assigned.shape[1]
    count = min(count, boxes)
    dice = torch.rand(assigned.shape, generator=generator).to(assigned.device)
    found, empty = assigned >= 0, assigned == BACKGROUND
    most = min(boxes, int(count * share))
    rank = torch.where(found, dice, 2.0).argsort(1).argsort(1)  # 0 for the first of the shuffled ones at objects
    taken = found & (rank < most)
    free = count - taken.sum(1, keepdim=True)
    rank = torch.where(empty, dice, 2.0).argsort(1).argsort(1)
    order = torch.where(taken, 0.0, torch.where(empty & (rank < free), 1.0, 2.0)) + dice / 2
    index = order.argsort(1)[:, :count]
    return index, order.gather(1, index) < 2
