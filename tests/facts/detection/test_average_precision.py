"""Average precision against hand-worked lists, a plain loop, and pycocotools where it is installed."""

import contextlib
import io

import numpy as np
import pytest
import torch

from etude.detection.parts.average_precision import coco, curves, localisation_error, recall_of, voc

OBJECTS = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]]])
LABELS = torch.tensor([[0, 0, 0]])


def listed(*rows):
    """Detections of one picture: (box, score, class) each."""
    boxes, scores, classes = zip(*rows)
    return torch.tensor([boxes], dtype=torch.float32), torch.tensor([scores]), torch.tensor([classes])


def test_five_boxes_by_hand():
    """Right, a duplicate, right, wrong, and one whose IoU is exactly 1/2: hits at ranks 1, 3 and 5 of three objects."""
    found = listed(
        ((0, 0, 10, 10), 0.9, 0),
        ((0, 0, 10, 9), 0.8, 0),
        ((20, 20, 30, 30), 0.7, 0),
        ((60, 60, 70, 70), 0.6, 0),
        ((40, 0, 50, 5), 0.5, 0),
    )
    judged = voc(found, OBJECTS, LABELS)
    assert judged.average == {0: pytest.approx((1 + 2 / 3 + 3 / 5) / 3)}
    assert judged.recall == {0: 1.0}
    # of 11 recalls 0 to .3 see precision 1, .4 to .6 see 2/3, .7 to 1 see 3/5
    assert voc(found, OBJECTS, LABELS, points=11).mean == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    recall, precision = curves(found, OBJECTS, LABELS)[0]
    assert recall == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert precision == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])


def test_a_difficult_object_is_neither_right_nor_wrong():
    hard = torch.tensor([[False, True, False]])
    found = listed(((20, 20, 30, 30), 0.9, 0), ((20, 20, 30, 30), 0.85, 0), ((0, 0, 10, 10), 0.8, 0))
    judged = voc(found, OBJECTS, LABELS, hard)
    assert judged.average == {0: pytest.approx(1 / 2)}  # one of two that count, at precision 1


def test_a_detection_that_prefers_a_taken_object_is_wrong_for_voc_and_right_for_coco():
    objects = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 16]]])
    labels = torch.tensor([[0, 0]])
    found = listed(((0, 0, 10, 10), 0.9, 0), ((0, 0, 10, 11), 0.8, 0))
    assert voc(found, objects, labels).average[0] == pytest.approx(1 / 2)
    assert coco(found, objects, labels)["AP50"] == pytest.approx(1)


def test_classes_pictures_and_thresholds():
    found = tuple(
        torch.cat(part)
        for part in zip(
            listed(((0, 0, 10, 10), 0.9, 1), ((0, 0, 10, 8), 0.5, 0)),
            listed(((0, 0, 10, 10), 0.95, 0), ((0, 0, 1, 1), 0.0, -1)),
        )
    )
    objects = torch.tensor([[[0.0, 0, 10, 10]], [[0.0, 0, 0, 0]]])
    labels = torch.tensor([[0], [-1]])
    judged = voc(found, objects, labels)
    assert judged.average == {
        0: pytest.approx(1 / 2)
    }  # one in the picture without objects comes first; class 1 has none
    assert voc(found, objects, labels, threshold=0.81).average == {0: 0}
    order = torch.tensor([1, 0])
    turned = voc(tuple(part[order] for part in found), objects[order], labels[order])
    assert turned.average == judged.average
    assert voc(found, objects, torch.full((2, 1), -1)).mean == 0


def plain(found, boxes, labels, threshold):
    """VOC's rule, one detection at a time."""
    scores = {}
    for kind in sorted({int(k) for k in labels.flatten() if k >= 0}):
        rows = [
            (-float(found[1][n, k]), n, k)
            for n in range(len(boxes))
            for k in range(found[1].shape[1])
            if found[2][n, k] == kind
        ]
        taken, hits = set(), []
        for _, n, k in sorted(rows):
            best, where = -1.0, -1
            for m in range(boxes.shape[1]):
                if labels[n, m] == kind:
                    a, b = found[0][n, k].tolist(), boxes[n, m].tolist()
                    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                    shared = max(wide, 0) * max(high, 0)
                    value = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
                    if value > best:
                        best, where = value, m
            hits.append(best >= threshold and (n, where) not in taken)
            if best >= threshold:
                taken.add((n, where))
        objects, total, seen = int((labels == kind).sum()), 0.0, 0
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
        for i, hit in enumerate(hits):
            seen += hit
            total += hit * max(precisions[i:])
        scores[kind] = total / objects
    return scores


def scene(seed, pictures=6, objects=5, answers=12, kinds=3):
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 40, (pictures, objects, 2), generator=g)
    boxes = torch.cat([low, low + torch.randint(8, 20, (pictures, objects, 2), generator=g)], 2).float()
    labels = torch.randint(-1, kinds, (pictures, objects), generator=g)
    source = torch.randint(objects, (pictures, answers), generator=g)
    moved = boxes.gather(1, source[..., None].expand(-1, -1, 4)) + torch.randint(
        -3, 4, (pictures, answers, 4), generator=g
    )
    classes = labels.gather(1, source)
    wrong = torch.rand(pictures, answers, generator=g) < 0.2
    classes = torch.where(wrong, torch.randint(-1, kinds, classes.shape, generator=g), classes)
    scores = torch.randint(1, 30, (pictures, answers), generator=g) / 30
    return (moved, scores, classes), boxes, labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_random_scenes_against_a_plain_loop(seed, threshold):
    found, boxes, labels = scene(seed)
    assert voc(found, boxes, labels, threshold=threshold).average == pytest.approx(
        plain(found, boxes, labels, threshold)
    )


def test_a_higher_threshold_on_scores_never_helps():
    found, boxes, labels = scene(5)
    last = 1.0
    for least in (0.0, 0.2, 0.4, 0.6, 0.8):
        now = voc((found[0], found[1], torch.where(found[1] > least, found[2], -1)), boxes, labels).mean
        assert now <= last + 1e-12
        last = now


@pytest.mark.parametrize("seed", range(3))
def test_coco_is_that_of_pycocotools(seed):
    tools = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    found, boxes, labels = scene(seed)
    found = (found[0], found[1] + torch.arange(found[1].numel()).view_as(found[1]) / 1e5, found[2])  # no ties
    told = tools.COCO()
    rows = [
        {"id": 1 + n * 100 + m, "image_id": n + 1, "category_id": int(labels[n, m]) + 1, "iscrowd": 0}
        | {"bbox": _sides(boxes[n, m]), "area": float(np.prod(_sides(boxes[n, m])[2:]))}
        for n in range(len(boxes))
        for m in range(boxes.shape[1])
        if labels[n, m] >= 0
    ]
    told.dataset = {
        "info": {},
        "images": [{"id": n + 1} for n in range(len(boxes))],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(3)],
        "annotations": rows,
    }
    answers = [
        {
            "image_id": n + 1,
            "category_id": int(found[2][n, k]) + 1,
            "score": float(found[1][n, k]),
            "bbox": _sides(found[0][n, k]),
        }
        for n in range(len(boxes))
        for k in range(found[1].shape[1])
        if found[2][n, k] >= 0
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        told.createIndex()
        judge = evaluation.COCOeval(told, told.loadRes(answers), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    mine = coco(found, boxes, labels)
    assert [mine["AP"], mine["AP50"], mine["AP75"]] == pytest.approx(list(judge.stats[:3]), abs=1e-9)


def _sides(box):
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def test_recall_of_proposals_and_localisation():
    proposals = torch.tensor([[[0.0, 0, 10, 6], [20, 20, 30, 24]]])
    assert recall_of(proposals, OBJECTS, LABELS) == pytest.approx(1 / 3)
    assert recall_of(proposals, OBJECTS, torch.tensor([[0, -1, -1]])) == 1
    box, truth = torch.tensor([[0.0, 0, 10, 10]] * 3), torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4]])
    assert localisation_error(box, torch.tensor([1, 1, 1]), truth, torch.tensor([1, 1, 1])) == pytest.approx(1 / 3)
    assert localisation_error(box, torch.tensor([0, 1, 1]), truth, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)
