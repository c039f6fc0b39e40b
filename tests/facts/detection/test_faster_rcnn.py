"""Faster R-CNN: anchors, the loss of the proposal network and its proposals, by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.detection import faster_rcnn
from etude.detection.faster_rcnn import Config, Said, anchors, build, propose, rpn_objective
from etude.detection.parts import boxes as box
from etude.detection.parts.scenes import Scene


def test_anchors_are_the_golden_ones():
    """Two scales and two aspects on a 2 × 2 map of stride 16 (E40: k anchors at each place)."""
    made = anchors(32, 16, (0.5, 1.0), (1.0, 4.0))
    assert made.shape == (16, 4)
    assert made[0].tolist() == [0, 0, 16, 16]
    assert made[1].tolist() == [4, -8, 12, 24]
    assert made[2].tolist() == [-8, -8, 24, 24]
    assert made[3].tolist() == [0, -24, 16, 40]
    assert made[4].tolist() == [16, 0, 32, 16]  # one cell to the right
    assert made[8].tolist() == [0, 16, 16, 32]  # one cell down
    sides = made[:, 2:] - made[:, :2]
    assert sides.prod(1).view(4, 2, 2)[:, 0].allclose(torch.tensor(256.0))


def small(config=None):
    spec = Spec((1, 32, 32), ("a", "b"), (0.5,), (0.5,), {"boxes": True})
    config = config or Config(size=32, width=4, head_width=8, bins=2, scales=(0.3, 0.5), aspects=(1.0,))
    torch.manual_seed(0)
    return config, build(config, spec)["model"]


def test_what_is_said_belongs_to_the_anchor_at_its_place():
    """A convolution that answers the column shows which anchors its outputs belong to."""
    model = small()[1]
    with torch.no_grad():
        model.slide.weight.zero_()
        model.slide.weight[:, 0, 1, 1] = 1  # the first channel of the features, as it is
        model.objectness.weight.zero_()
        model.objectness.weight[1, 0] = 1  # the second scale's objectness is that channel
        model.codes.weight.zero_()
        model.codes.weight[4 + 2, 0] = 1  # and its width
        model.eval()
        features, said = model(torch.rand(2, 1, 32, 32))
    value = features[:, 0].relu().flatten(1)  # (N, cells)
    torch.testing.assert_close(said.objectness.view(2, 16, 2)[..., 1], value)
    torch.testing.assert_close(said.codes.view(2, 16, 2, 4)[:, :, 1, 2], value)
    assert said.objectness.view(2, 16, 2)[..., 0].abs().max() == 0
    assert len(model.anchors) == 32


def test_objective_of_the_proposal_network_by_hand():
    """Every anchor drawn: cross-entropy of all, smooth L1 (β = 1/9) of those at objects, divided by their number."""
    near = anchors(32, 8, (0.3, 0.5), (1.0,)).double()
    objects = torch.tensor([[[3.0, 2, 12, 14], [14.0, 15, 31, 30]]], dtype=torch.float64)
    scene = Scene(torch.zeros(1, 1, 32, 32), objects, torch.tensor([[1, 0]]), torch.zeros(1, 2, dtype=torch.bool))
    g = torch.Generator().manual_seed(1)
    said = Said(torch.randn(1, 32, generator=g).double(), torch.randn(1, 32, 4, generator=g).double())
    overlap = box.iou(near, objects[0])
    best, owner = overlap.max(1)
    at, empty = best >= 0.7, best < 0.3
    for m in range(2):
        for a in range(32):
            if overlap[a, m] == overlap[:, m].max():
                at[a], owner[a], empty[a] = True, m, False
    used = at | empty
    wanted = F.binary_cross_entropy_with_logits(said.objectness[0][used], at[used].double(), reduction="sum")
    code = box.encode(objects[0][owner[at]], near[at])
    wanted = wanted + 2.0 * F.smooth_l1_loss(said.codes[0][at], code, beta=1 / 9, reduction="sum")
    assert 2 <= int(at.sum()) < 16
    found = rpn_objective(said, near, scene, 1000, 2.0, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(wanted / used.sum()), rel=1e-9)


def test_half_of_the_anchors_are_at_objects_at_most():
    """Objectness 0 everywhere: the loss is log 2 whatever is drawn, and without places its gradient says how many."""
    near = anchors(32, 8, (0.3,), (1.0,))
    objects = near[None, [0, 5, 10, 15]]
    scene = Scene(
        torch.zeros(1, 1, 32, 32), objects, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)
    )
    logit = torch.zeros(1, 16, requires_grad=True)
    said = Said(logit, torch.zeros(1, 16, 4))
    loss = rpn_objective(said, near, scene, 6, 0.0, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert int((logit.grad < 0).sum()) == 3
    assert int((logit.grad > 0).sum()) == 3


def test_proposals_are_the_best_by_objectness_that_do_not_overlap():
    near = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [20.0, 20, 30, 30], [5.0, 5, 5.5, 9], [-8.0, 16, 8, 32]])
    said = Said(torch.tensor([[2.0, 3.0, 1.0, 9.0, 0.0]]), torch.zeros(1, 5, 4))
    found = propose(said, near, 32, 4)
    assert found[0].tolist() == [[1, 0, 11, 10], [20, 20, 30, 30], [0, 16, 8, 32], [0, 0, 0, 0]]
    moved = Said(said.objectness, torch.tensor([[[0.0, 0, 0, 0]] * 2 + [[0.1, 0.2, math.log(2), 0]] + [[0.0] * 4] * 2]))
    assert propose(moved, near, 64, 4)[0, 1].tolist() == pytest.approx([16, 22, 36, 32])
    assert not propose(said, near, 32, 2).requires_grad


def test_a_size_that_cuts_cells_is_refused():
    with pytest.raises(UserError, match="multiple of --stride"):
        build(Config(size=36), Spec((1, 36, 36), ("a",), (0.0,), (1.0,)))


def test_detection_is_the_heads_on_the_proposals():
    """A picture's detections are independent of the others in its batch."""
    config, model = small()
    model.eval()
    x = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        whole = faster_rcnn.detect(config, model, x)
        alone = faster_rcnn.detect(config, model, x[1:2])
    for a, b in zip(whole, alone):
        torch.testing.assert_close(a[1:2].float(), b.float(), atol=1e-4, rtol=1e-4)
