"""OverFeat's maps against the classifier on every crop, offset pooling against nine poolings, merging against brute force."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from etude.core.spec import Spec
from etude.detection.overfeat import Config, all_windows, build, objective, said, squares
from etude.detection.parts import windows
from etude.detection.parts.merging import merge, merged

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_windows.py"))))
SPEC = Spec((2, 40, 40), ("a", "b", "c"), (0.1, 0.2), (0.3, 0.2))


def network(side=20):
    torch.manual_seed(0)
    model = build(Config(side=side, width=4, head_width=8), SPEC)["model"]
    model(torch.rand(64, 2, side, side))  # running statistics that are no identity
    return model.eval()


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("side", "high", "wide"), [(20, 20, 20), (20, 41, 53), (14, 27, 30), (26, 44, 37)])
@torch.no_grad()
def test_the_maps_are_the_classifier_and_the_regression_applied_to_every_crop(side, high, wide, offsets):
    """At the total stride, 6 pixels, and with the offsets at 2 pixels: no window is missing, and none differs."""
    model, x = network(side).double(), torch.rand(3, 2, high, wide).double()
    crops = windows.unfolded(x, side, 2 if offsets else 6)
    scores, codes = model(crops.flatten(0, 2))
    maps = model.maps(x, offsets)
    for found, wanted in zip(maps, (scores, codes)):
        assert (found - wanted.view(*crops.shape[:3], -1)).abs().max() < 1e-12


@torch.no_grad()
def test_the_maps_in_single_precision():
    model, x = network(), torch.rand(2, 2, 61, 50)
    crops = windows.unfolded(x, 20, 2)
    wanted = model(crops.flatten(0, 2))
    assert all((a - b.view_as(a)).abs().max() < 1e-5 for a, b in zip(model.maps(x, True), wanted))


@torch.no_grad()
def test_offset_pooling_is_nine_poolings_interleaved():
    """E35: the offsets come before the pooling, and together their maps are the fine grid."""
    model, x = network().double(), torch.rand(2, 2, 47, 58).double()
    features = model.features(model.standardise(x))
    fine = model.maps(x, True)[0]
    kernel = model.hidden.weight.view(8, -1, model.cells, model.cells)
    filled = torch.zeros_like(fine)
    for down in range(3):
        for across in range(3):
            pooled = F.max_pool2d(features[:, :, down:, across:], 3)
            one = model.scores(F.conv2d(pooled, kernel, model.hidden.bias).relu().permute(0, 2, 3, 1))
            filled[:, down::3, across::3] = one
    torch.testing.assert_close(fine, filled, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.maps(x, False)[0], filled[:, ::3, ::3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("offsets", [False, True])
def test_every_window_says_a_box_relative_to_itself(offsets):
    config = Config(size=40, side=14, scales=(0.4, 0.7), width=4, head_width=8, offsets=offsets)
    torch.manual_seed(1)
    model = build(config, SPEC)["model"].eval()
    torch.nn.init.normal_(model.codes.weight, std=0.5)
    x = torch.randint(0, 256, (2, 2, 40, 40), dtype=torch.uint8)
    boxes, scores = said(config, model, x)
    rows = plain.every(40, 14, 2 if offsets else 6, (0.4, 0.7), (1.0,))
    assert len(all_windows(config).boxes()) == len(rows) == boxes.shape[1]
    net = plain.Plain(model, SPEC).eval()
    for n, one in enumerate(x.double() / 255):
        with torch.no_grad():
            logits, codes = net(torch.stack([plain.crop(one, row, 14) for row in rows]))
        wanted = torch.tensor([plain.plain.decoded(code, row[4], 40) for code, row in zip(codes.tolist(), rows)])
        assert (boxes[n] - wanted).abs().max() < 1e-3
        assert (scores[n] - logits).abs().max() < 1e-4


def test_coordinates_are_averaged_and_confidences_added():
    """E35: the mean has no weights, however unequal the confidences; another class stays apart, as does a box far away."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    found, sums, kinds = merge(boxes, torch.tensor([0.9, 0.1, 0.3, 0.2]), torch.tensor([1, 1, 2, 1]), 1.0)
    assert found.tolist() == [[1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]]
    assert sums.tolist() == pytest.approx([1.0, 0.3, 0.2])
    assert kinds.tolist() == [1, 2, 1]
    far = merge(boxes, torch.tensor([0.9, 0.1, 0.3, 0.2]), torch.tensor([1, 1, 2, 1]), 0.5)  # 1 − 2/3 + 0.2 is more
    assert len(far[0]) == 4


def test_the_pair_that_matches_best_merges_first():
    """0 and 2 first, then their mean with 1: in the order given it would be (0 + 1)/2 and 2."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [1, 0, 11, 10]])
    found, sums, _ = merge(boxes, torch.tensor([0.5, 0.5, 0.5]), torch.zeros(3, dtype=torch.int64), 2.0)
    assert found.tolist() == [[2.25, 0, 12.25, 10]]
    assert sums.tolist() == [1.5]
    assert merge(boxes[:0], sums[:0], torch.zeros(0, dtype=torch.int64), 1.0)[0].shape == (0, 4)


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.6), (1, 1.0), (2, 0.8)])
def test_merging_is_brute_force_over_all_pairs(seed, threshold):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(30, 2, generator=g, dtype=torch.float64) * 30
    boxes = torch.cat([low, low + 8 + 12 * torch.rand(30, 2, generator=g, dtype=torch.float64)], 1)
    scores, kinds = torch.rand(30, generator=g, dtype=torch.float64), torch.randint(3, (30,), generator=g)
    wanted = plain.merged(zip(boxes.tolist(), scores.tolist(), kinds.tolist()), threshold)
    found = merge(boxes, scores, kinds, threshold)
    assert 3 < len(wanted) < 30
    torch.testing.assert_close(found[0], torch.tensor([row[0] for row in wanted], dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.tensor([row[1] for row in wanted], dtype=torch.float64))
    assert found[2].tolist() == [row[2] for row in wanted]


def test_detections_are_the_best_candidates_merged():
    g = torch.Generator().manual_seed(3)
    low = torch.rand(2, 12, 2, generator=g) * 20
    boxes = torch.cat([low, low + 6 + 6 * torch.rand(2, 12, 2, generator=g)], 2)
    scores = torch.rand(2, 12, 3, generator=g)
    scores[1] = 0.1
    found = merged(boxes, scores, 0.25, 0.8, candidates=15, most=9)
    rows = sorted(
        ((boxes[0, a].tolist(), scores[0, a, k].item(), k) for a in range(12) for k in range(3)),
        key=lambda row: -row[1],
    )
    wanted = plain.merged([row for row in rows[:15] if row[1] > 0.25], 0.8)[:9]
    assert found[2][0].tolist() == [row[2] for row in wanted] + [-1] * (9 - len(wanted))
    assert found[1][0, : len(wanted)].tolist() == pytest.approx([row[1] / (1 + row[1]) for row in wanted])
    assert found[1][1].tolist() == [0] * 9
    assert found[2][1].tolist() == [-1] * 9


def test_a_window_is_measured_by_the_square_around_an_object():
    boxes = torch.tensor([[4.0, 0, 6, 10], [0, 2, 12, 6]])
    assert squares(boxes).tolist() == [[0, 0, 10, 10], [0, -2, 12, 10]]


def test_the_loss_by_hand():
    """Background and windows that do not count have no box; the mean is over those that count."""
    scores, codes = torch.zeros(4, 3), torch.tensor([[0.5, 0, 0, 0], [9.0, 9, 9, 9], [9.0, 9, 9, 9], [0, 3, 0, 0]])
    kind, code = torch.tensor([0, 2, -1, 1]), torch.zeros(4, 4)
    wanted = torch.tensor(3.0).log() + 2 * (0.125 + 2.5) / 3
    assert objective(scores, codes, kind, code, 2.0).item() == pytest.approx(wanted.item())


def test_the_gradient_of_the_boxes_does_not_reach_the_features():
    model = network().train()
    _, codes = model(torch.rand(8, 2, 20, 20))
    codes.sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith(("moves", "codes")))
    assert model.codes.weight.grad.abs().sum() > 0
