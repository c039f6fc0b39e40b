"""RoI pooling and RoIAlign equal their definitions bin by bin, on both paths, and their gradients are the adjoints."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from etude.detection.parts import regions

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))

SCALE = 1 / 4


def some(seed=0, pictures=2, count=9, channels=5, height=11, width=13):
    """Features, and boxes in pixels: small, large, thin, half outside, and without an area."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(pictures, channels, height, width, generator=g, dtype=torch.float64)
    corner = torch.rand(pictures, count, 2, generator=g, dtype=torch.float64) * 40 - 4
    sides = torch.rand(pictures, count, 2, generator=g, dtype=torch.float64) ** 2 * 40
    boxes = torch.cat([corner, corner + sides], -1)
    boxes[0, 0] = torch.tensor([8.0, 8.0, 8.0, 8.0])
    boxes[0, 1] = torch.tensor([-30.0, -30.0, -20.0, -20.0])
    boxes[1, 0] = torch.tensor([0.0, 0.0, 52.0, 44.0])
    boxes[1, 1] = torch.tensor([3.9, 40.0, 60.0, 70.0])
    return features, boxes


@pytest.mark.parametrize(("size", "samples"), [(3, 2), (2, 1), (5, 3)])
def test_aligning_is_interpolation_point_by_point(size, samples):
    """The notes name regions only (E39): here they lie on the picture, and the map is read where they are projected."""
    features, boxes = some()
    wanted = plain.align(features, boxes, size, SCALE, samples)
    found = regions.roi_align(features, boxes, size, SCALE, samples)
    assert (found - wanted).abs().max() < 1e-12
    assert found[0, 1].abs().max() == 0  # far outside


@pytest.mark.parametrize("size", [1, 3, 7])
def test_pooling_is_the_maximum_of_each_bin(size):
    features, boxes = some(1)
    assert torch.equal(regions.roi_pool(features, boxes, size, SCALE), plain.pool(features, boxes, size, SCALE))


def test_products_and_masks_equal_machine_code():
    """The path of other devices: the same numbers."""
    features, boxes = some(2)
    h, w = features.shape[2:]
    tall = regions.interpolation(boxes[..., 1] * SCALE, boxes[..., 3] * SCALE, 3, 2, h)
    wide = regions.interpolation(boxes[..., 0] * SCALE, boxes[..., 2] * SCALE, 3, 2, w)
    products = regions.aligned_by_products(features, regions.dense(*tall, h), regions.dense(*wide, w))
    assert (products - regions.roi_align(features, boxes, 3, SCALE)).abs().max() < 1e-12
    rows = regions.bins(boxes[..., 1] * SCALE, boxes[..., 3] * SCALE, 3, h)
    columns = regions.bins(boxes[..., 0] * SCALE, boxes[..., 2] * SCALE, 3, w)
    assert torch.equal(regions.pooled_by_masks(features, rows, columns), regions.roi_pool(features, boxes, 3, SCALE))


def test_interpolation_merges_the_points_of_a_bin():
    """Points that share a cell are read once; the weights of a bin sum to 1 inside the map."""
    cell, weight = regions.interpolation(torch.tensor([[2.0]]), torch.tensor([[4.0]]), 4, 2, 8)
    assert weight.sum(-1).allclose(torch.ones(1, 1, 4))
    assert int((weight > 0).sum()) < weight.numel()
    used = [c[w > 0].tolist() for c, w in zip(cell[0, 0], weight[0, 0])]
    assert all(len(set(row)) == len(row) for row in used)


@pytest.mark.parametrize("kind", ["align", "pool"])
def test_backward_is_the_adjoint(kind):
    features, boxes = some(3)
    call = regions.roi_align if kind == "align" else regions.roi_pool
    assert torch.autograd.gradcheck(lambda f: call(f, boxes, 3, SCALE), (features.requires_grad_(),), eps=1e-7)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [((0, 0, 3, 3), [0, 0, 2, 2], [0, 2, 0, 2]), ((0, 0, 3, 1), [0, 0, 1, 1], [0, 2, 0, 2])]
    + [((0, 0, 1, 3), [0, 0, 2, 2], [0, 1, 0, 1]), ((0, 0, 2, 0), [0, 0, 0, 0], [0, 1, 0, 1])],
    ids=["four cells", "two beside", "two above", "rows and columns shared"],
)
def test_gradient_of_pooling_goes_to_the_first_maximum_alone(box, rows, columns):
    features = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    regions.roi_pool(features, torch.tensor([[box]], dtype=torch.float64), 2, 1.0).sum().backward()
    assert features.grad is not None
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    wanted.index_put_((torch.tensor(rows), torch.tensor(columns)), torch.ones((), dtype=torch.float64), accumulate=True)
    assert torch.equal(features.grad[0, 0], wanted)


def test_layout_and_precision_of_the_features_do_not_matter():
    features, boxes = some(4)
    for call in (regions.roi_align, regions.roi_pool):
        one = call(features.float(), boxes.float(), 3, SCALE)
        other = call(features.float().contiguous(memory_format=torch.channels_last), boxes.float(), 3, SCALE)
        assert torch.equal(one, other)
        assert (one - call(features, boxes, 3, SCALE)).abs().max() < 1e-4
