"""Suppression against the greedy loop in plain Python, on lists short and long and on whole batches."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from etude.detection.parts import suppression
from etude.detection.parts.suppression import nms, pick

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
greedy = plain.greedy


def draw(count, seed, side=32, kinds=3, levels=20):
    """Boxes of whole pixels, so that IoU is exact; scores with many ties."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(-4, side, (count, 2), generator=g)
    boxes = torch.cat([low, low + torch.randint(0, side // 2, (count, 2), generator=g)], 1).float()
    return boxes, torch.randint(1, levels, (count,), generator=g) / levels, torch.randint(kinds, (count,), generator=g)


@pytest.mark.parametrize("short", [0, 10**6])
@pytest.mark.parametrize(
    ("seed", "count", "threshold"), [(0, 60, 0.3), (1, 150, 0.5), (2, 1, 0.5), (3, 150, 0.0), (4, 150, 1.0)]
)
def test_nms_is_the_greedy_loop(short, seed, count, threshold, monkeypatch):
    monkeypatch.setattr(suppression, "_SHORT", short)  # 0: compiled, otherwise the fixed point
    boxes, scores, kinds = draw(count, seed)
    expected = greedy(boxes.tolist(), scores.tolist(), threshold, kinds.tolist())
    assert nms(boxes, scores, threshold, kinds).tolist() == expected
    assert nms(boxes, scores, threshold).tolist() == greedy(boxes.tolist(), scores.tolist(), threshold, [0] * count)


def test_the_threshold_is_strict_and_equal_scores_keep_their_order():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 1, 2, 3], [0, 0, 2, 2]])  # IoU 1/3 and 1
    scores = torch.tensor([0.5, 0.5, 0.5])
    assert nms(boxes, scores, 1 / 3).tolist() == [0, 1]
    assert nms(boxes, scores, 0.3333).tolist() == [0]
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_a_chain_of_boxes_is_undone_from_the_top():
    """B is taken away by A, so it takes nothing away: C stays (E36)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3).tolist() == [0, 2]


@pytest.mark.parametrize("own", [False, True])
def test_pick_is_the_loop_for_every_picture(own):
    pictures, places, kinds, most = 4, 12, 3, 9
    g = torch.Generator().manual_seed(0)
    boxes = torch.stack([draw(places * (kinds if own else 1), n)[0] for n in range(pictures)])
    boxes = boxes.view(pictures, places, kinds, 4) if own else boxes
    scores = torch.randint(0, 10, (pictures, places, kinds), generator=g) / 10
    found = pick(boxes, scores, 0.15, 0.4, most)
    for n in range(pictures):
        rows = [(a, c) for a in range(places) for c in range(kinds)]
        rows = sorted(rows, key=lambda row: -scores[n, row[0], row[1]].item())[:most]  # sorted is stable
        rows = [row for row in rows if scores[n, row[0], row[1]] > 0.15]
        corners = [(boxes[n, a, c] if own else boxes[n, a]).tolist() for a, c in rows]
        values = [scores[n, a, c].item() for a, c in rows]
        kept = greedy(corners, values, 0.4, [c for _, c in rows])
        assert found[0][n, : len(kept)].tolist() == [corners[k] for k in kept]
        assert found[1][n].tolist() == [values[k] for k in kept] + [0] * (most - len(kept))
        assert found[2][n].tolist() == [rows[k][1] for k in kept] + [-1] * (most - len(kept))
        alone = pick(boxes[n : n + 1], scores[n : n + 1], 0.15, 0.4, most)
        assert all(torch.equal(a[0], b[n]) for a, b in zip(alone, found))


def test_pick_of_fewer_candidates_than_places():
    found = pick(torch.tensor([[[0.0, 0, 1, 1]]]), torch.tensor([[[0.5]]]), 0.1, 0.5, 4)
    assert found[1].tolist() == [[0.5, 0, 0, 0]]
    assert found[2].tolist() == [[0, -1, -1, -1]]
