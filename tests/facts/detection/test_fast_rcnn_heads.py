"""The heads on regions: their loss is torch's, their mini-batches are the papers'."""

import pytest
import torch
from torch.nn import functional as F

from etude.detection.parts import boxes as box
from etude.detection.parts import heads
from etude.detection.parts.scenes import Scene


def scene(boxes, labels, difficult=None):
    boxes, labels = torch.tensor(boxes), torch.tensor(labels)
    hard = torch.zeros_like(labels, dtype=torch.bool) if difficult is None else torch.tensor(difficult)
    return Scene(torch.zeros(len(boxes), 1, 32, 32, dtype=torch.uint8), boxes, labels, hard)


@pytest.mark.parametrize("beta", [1.0, 1 / 9])
def test_smooth_l1_is_torchs(beta):
    d = torch.linspace(-3, 3, 61, dtype=torch.float64)
    wanted = F.smooth_l1_loss(d, torch.zeros_like(d), reduction="none", beta=beta)
    torch.testing.assert_close(heads.smooth_l1(d, beta), wanted, rtol=1e-12, atol=0)


def test_objective_is_cross_entropy_and_the_codes_of_the_right_class():
    g = torch.Generator().manual_seed(0)
    scores, codes = torch.randn(7, 4, generator=g).double(), torch.randn(7, 3, 4, generator=g).double()
    kind, code = torch.tensor([0, 2, 3, -1, 1, 3, 3]), torch.randn(7, 4, generator=g).double()
    wanted = F.cross_entropy(scores, kind, ignore_index=-1, reduction="sum")
    for row in (0, 1, 4):
        wanted = wanted + 0.7 * F.smooth_l1_loss(codes[row, kind[row]], code[row], reduction="sum")
    assert float(heads.objective(scores, codes, kind, code, 0.7)) == pytest.approx(float(wanted) / 6, rel=1e-12)
    nothing = torch.full((7,), -1)
    assert float(heads.objective(scores, codes, nothing, code, 1.0)) == 0.0


def test_regions_of_a_batch_say_the_object_they_overlap_most():
    """At objects, background, between, at a difficult object, an empty place; codes are those of `encode`, divided."""
    part = scene([[[0.0, 0, 10, 10], [16.0, 16, 32, 32]]], [[1, 0]])
    regions = torch.tensor([[[1.0, 1, 11, 11], [17.0, 15, 31, 30], [5.0, 0, 18, 12], [0.0, 0, 0, 0], [20.0, 0, 30, 9]]])
    found = heads.chosen_regions(regions, part, 5, 1.0, 0.0, 3, torch.Generator().manual_seed(0))
    rows = {tuple(b): (int(k), c) for b, k, c in zip(found.boxes[0].tolist(), found.kinds[0], found.codes[0])}
    assert {b: k for b, (k, _) in rows.items()} == {
        (1.0, 1, 11, 11): 1, (17.0, 15, 31, 30): 0, (5.0, 0, 18, 12): 3, (0.0, 0, 0, 0): -1, (20.0, 0, 30, 9): 3,
    }  # fmt: skip
    wanted = box.encode(part.boxes[0, 0], regions[0, 0]) / torch.tensor([0.1, 0.1, 0.2, 0.2])
    torch.testing.assert_close(rows[(1.0, 1, 11, 11)][1], wanted)
    assert rows[(5.0, 0, 18, 12)][1].abs().max() == 0
    # background has IoU 0.1 at least: the last region has none
    found = heads.chosen_regions(regions, part, 5, 1.0, 0.1, 3, torch.Generator().manual_seed(0))
    assert int((found.kinds == 3).sum()) == 1
    # a quarter of four at objects at most
    found = heads.chosen_regions(regions, part, 4, 0.25, 0.0, 3, torch.Generator().manual_seed(0))
    assert int(((found.kinds >= 0) & (found.kinds < 3)).sum()) == 1
    hard = scene([[[0.0, 0, 10, 10], [16.0, 16, 32, 32]]], [[1, 0]], [[False, True]])
    found = heads.chosen_regions(regions, hard, 5, 1.0, 0.0, 3, torch.Generator().manual_seed(0))
    assert sorted(found.kinds[0].tolist()) == [-1, -1, 1, 3, 3]


def test_answers_undo_the_codes():
    """Heads that say the right class and the right code give back the objects, best first; empty places give nothing."""
    part = scene([[[2.0, 3, 12, 11], [16.0, 16, 30, 31]]], [[1, 0]])
    regions = torch.tensor([[[1.0, 1, 11, 11], [17.0, 15, 31, 30], [0.0, 0, 0, 0]]])
    scores = torch.full((1, 3, 3), -9.0)
    scores[0, 0, 1], scores[0, 1, 0], scores[0, 2, 1] = 5.0, 4.0, 9.0
    codes = torch.zeros(1, 3, 2, 4)
    for row, kind in ((0, 1), (1, 0)):
        codes[0, row, kind] = box.encode(part.boxes[0, row], regions[0, row]) / torch.tensor(heads.DEVIATIONS)
    found, chance, kinds = heads.answers(scores, codes, regions, 32.0, 0.5, 0.5)
    assert kinds[0, :3].tolist() == [1, 0, -1]
    torch.testing.assert_close(found[0, :2], part.boxes[0], atol=1e-4, rtol=0)
    assert chance[0, 0] > chance[0, 1] > 0.99
