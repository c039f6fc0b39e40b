"""Boxes go to the objects that the papers' rules give them, and mini-batches of boxes are drawn evenly."""

import pytest
import torch

from etude.detection.parts.boxes import iou
from etude.detection.parts.matching import BACKGROUND, IGNORED, assign, sample


def overlaps(seed=0, pictures=3, boxes=40, objects=5):
    g = torch.Generator().manual_seed(seed)

    def some(count):
        corner = torch.rand(pictures, count, 2, generator=g, dtype=torch.float64) * 20
        return torch.cat(
            [corner, corner + 2 + torch.rand(pictures, count, 2, generator=g, dtype=torch.float64) * 12], -1
        )

    labels = torch.randint(0, 3, (pictures, objects), generator=g)
    labels[0, 3:] = -1
    labels[2] = -1
    return iou(some(boxes), some(objects)), labels


def plain(overlap, labels, positive, negative, least, rescue):
    """Box by box."""
    out = torch.full(overlap.shape[:2], IGNORED)
    for n in range(len(overlap)):
        objects = [m for m in range(overlap.shape[2]) if labels[n, m] >= 0]
        for a in range(overlap.shape[1]):
            best = max(objects, key=lambda m: overlap[n, a, m], default=None)
            value = float(overlap[n, a, best]) if best is not None else 0.0
            if best is not None and value >= positive:
                out[n, a] = best
            elif least <= value < negative:
                out[n, a] = BACKGROUND
        if rescue:
            for a in range(overlap.shape[1]):
                claims = [m for m in objects if 0 < overlap[n, a, m] == overlap[n, :, m].max()]
                if claims:
                    out[n, a] = max(claims, key=lambda m: overlap[n, a, m])
    return out


@pytest.mark.parametrize(
    ("positive", "negative", "least", "rescue"), [(0.7, 0.3, 0.0, True), (0.5, 0.5, 0.1, False), (0.9, 0.2, 0.0, False)]
)
def test_assignment_is_the_rule_box_by_box(positive, negative, least, rescue):
    """Faster R-CNN's anchors (E40) and Fast R-CNN's regions; pictures without an object are all background."""
    overlap, labels = overlaps()
    found = assign(overlap, labels, positive, negative, least=least, rescue=rescue)
    assert torch.equal(found, plain(overlap, labels, positive, negative, least, rescue))
    if rescue:
        for n in range(2):
            assert {int(m) for m in found[n] if m >= 0} == {m for m in range(5) if labels[n, m] >= 0}


def test_boxes_at_difficult_objects_are_ignored():
    overlap = torch.tensor([[[0.9, 0.0], [0.0, 0.8], [0.1, 0.1]]])
    hard = torch.tensor([[False, True]])
    assert assign(overlap, torch.tensor([[0, 1]]), 0.5, 0.5, difficult=hard).tolist() == [[0, IGNORED, BACKGROUND]]


def test_a_sample_has_at_most_the_share_of_objects_and_is_filled_with_background():
    assigned = torch.tensor([[0, 1, 2, 3] + [BACKGROUND] * 8 + [IGNORED] * 4, [0] + [BACKGROUND] * 3 + [IGNORED] * 12])
    index, valid = sample(assigned, 8, 0.25, torch.Generator().manual_seed(0))
    kinds = [assigned[n][index[n]][valid[n]] for n in range(2)]
    assert [int((k >= 0).sum()) for k in kinds] == [2, 1]
    assert [int((k == BACKGROUND).sum()) for k in kinds] == [6, 3]
    assert all((k != IGNORED).all() for k in kinds)
    assert (assigned[0][index[0][:2]] >= 0).all()  # those at objects come first
    assert all(len(set(row.tolist())) == 8 for row in index)


def test_samples_are_even():
    """Each of 8 candidates is drawn in half of the draws of 4: 400 draws, five standard deviations are 50."""
    assigned = torch.tensor([[BACKGROUND] * 8])
    g = torch.Generator().manual_seed(1)
    counts = torch.zeros(8)
    for _ in range(400):
        index, valid = sample(assigned, 4, 0.5, g)
        counts[index[0][valid[0]]] += 1
    assert counts.sum() == 1600
    assert (counts - 200).abs().max() < 50
