"""Boxes against pixel masks, plain Python and hand-made numbers."""

import math

import pytest
import torch

from etude.detection.parts.boxes import (
    area,
    centred,
    clip,
    cornered,
    decode,
    encode,
    iou,
    mirror,
    paired_iou,
)


def random_boxes(count, seed, side=20):
    draw = torch.Generator().manual_seed(seed)
    low = torch.randint(0, side - 1, (count, 2), generator=draw)
    high = low + torch.randint(0, side // 2, (count, 2), generator=draw)
    return torch.cat([low, high.clamp(max=side)], 1)


def test_iou_is_that_of_pixel_masks():
    a, b = random_boxes(40, 0), random_boxes(30, 1)
    masks = []
    for boxes in (a, b):
        mask = torch.zeros(len(boxes), 20, 20, dtype=torch.bool)
        for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            mask[row, y1:y2, x1:x2] = True
        masks.append(mask)
    shared = (masks[0][:, None] & masks[1]).sum((2, 3))
    union = (masks[0][:, None] | masks[1]).sum((2, 3))
    expected = torch.where(union > 0, shared / union.clamp(min=1), 0.0)
    torch.testing.assert_close(iou(a.float(), b.float()), expected.float())
    torch.testing.assert_close(paired_iou(a[:30].double(), b.double()), expected[:30].diagonal().double())


def test_iou_of_boxes_by_hand():
    one, other = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    assert iou(one, other).item() == pytest.approx(1 / 3)
    assert torch.equal(iou(one, other), iou(other, one))
    assert iou(7 * one, 7 * other).item() == pytest.approx(1 / 3)
    assert iou(one, one).item() == 1
    point = torch.tensor([[1.0, 1, 1, 1]])
    swapped = torch.tensor([[2.0, 2, 0, 0]])
    assert iou(point, point).item() == 0
    assert iou(swapped, one).item() == 0
    assert area(swapped).item() == 0
    assert iou(one, torch.zeros(0, 4)).shape == (1, 0)


def test_iou_in_half_precision_is_that_of_single():
    boxes = torch.tensor([[0.0, 0, 300, 300], [100, 100, 400, 400]])
    for dtype in (torch.float16, torch.bfloat16):
        half = boxes.to(dtype)
        assert torch.equal(iou(half, half), iou(half.float(), half.float()))
        assert area(half).isfinite().all()


def test_the_code_is_zero_for_equal_boxes_and_goes_back():
    draw = torch.Generator().manual_seed(0)
    low, other = (torch.rand(50, 2, generator=draw, dtype=torch.float64) * 40 for _ in range(2))
    a = torch.cat([low, low + 1 + torch.rand(50, 2, generator=draw, dtype=torch.float64) * 20], 1)
    b = torch.cat([other, other + 1 + torch.rand(50, 2, generator=draw, dtype=torch.float64) * 20], 1)
    assert encode(a, a).abs().max() < 1e-12
    torch.testing.assert_close(decode(encode(b, a), a), b)
    torch.testing.assert_close(encode(decode(encode(b, a), a), a), encode(b, a))
    by_hand = encode(torch.tensor([[0.0, 0, 4, 8]]), torch.tensor([[1.0, 1, 3, 5]]))
    torch.testing.assert_close(by_hand, torch.tensor([[0.0, 0.25, math.log(2), math.log(2)]]))
    assert decode(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]])).isfinite().all()


def test_centres_corners_clipping_and_mirrors():
    box = torch.tensor([[1.0, 2, 5, 10]])
    assert centred(box).tolist() == [[3, 6, 4, 8]]
    assert torch.equal(cornered(centred(box)), box)
    assert clip(torch.tensor([[-3.0, -1, 30, 9]]), height=8, width=20).tolist() == [[0, 0, 20, 8]]
    assert mirror(box, 20).tolist() == [[15, 2, 19, 10]]
    assert torch.equal(mirror(mirror(box, 20), 20), box)
