"""YOLO's grid, loss and detections against hand-made cells and plain Python."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.detection import yolo
from etude.detection.yolo import Config, Target, build, candidates, corners, detect, objective, place, target

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
SPEC = Spec((1, 32, 32), ("a", "b", "c"), (0.1,), (0.3,))


def test_the_grid_of_two_objects_by_hand():
    """In 8 × 8 cells of 8 pixels: centres (20, 44) and (61, 3), so cells (row 5, column 2) and (row 0, column 7)."""
    boxes = torch.tensor([[[12.0, 36, 28, 52], [58, 0, 64, 6]]])
    assert place(boxes, 64, 8).tolist() == [[5 * 8 + 2, 7]]
    aim = target(boxes, torch.tensor([[1, 2]]), 64, 8)
    assert aim.present.nonzero().tolist() == [[0, 0, 7], [0, 5, 2]]
    torch.testing.assert_close(aim.box[0, 5, 2], torch.tensor([0.5, 0.5, 0.25, 0.25]))
    torch.testing.assert_close(aim.box[0, 0, 7], torch.tensor([61 / 8 - 7, 3 / 8, 6 / 64, 6 / 64]))
    assert aim.kind[0, 5, 2] == 1
    assert aim.kind[0, 0, 7] == 2


def test_the_cell_of_the_centre_is_responsible_and_not_the_one_of_most_overlap():
    """E38: a wide box fills the cells beside its centre as much, and of the grid only the centre's cell is present."""
    boxes = torch.tensor([[[0.0, 8, 64, 16]]])
    aim = target(boxes, torch.tensor([[0]]), 64, 8)
    assert aim.present.sum() == 1
    assert aim.present[0, 1, 4]
    out = torch.zeros(1, 8, 8, 5 * 2 + 3)
    out[0, 1, 0, :5] = torch.tensor([0.0, 0.5, 1.0, 8**-0.5, 1.0])  # a perfect box, said by the wrong cell
    out.requires_grad_(True)
    objective(out, aim, 2, 64, no_object=0).backward()
    assert out.grad.abs().sum((0, 3)).nonzero().tolist() == [[1, 4]]


def test_of_objects_in_one_cell_the_first_is_kept_and_padding_is_none():
    boxes = torch.tensor(
        [[[8.0, 8, 12, 12], [9, 9, 14, 14], [0, 0, 0, 0]], [[0.0, 0, 0, 0], [0, 0, 6, 6], [0, 0, 0, 0]]]
    )
    aim = target(boxes, torch.tensor([[2, 1, -1], [-1, 1, -1]]), 32, 4)
    assert aim.present.sum() == 2
    assert aim.kind[0, 1, 1] == 2
    assert aim.box[0, 1, 1].tolist() == pytest.approx([0.25, 0.25, 4 / 32, 4 / 32])
    assert aim.present[1, 0, 0]
    assert aim.kind[1, 0, 0] == 1


def test_what_cells_say_goes_back_to_the_boxes():
    g = torch.Generator().manual_seed(0)
    low = torch.rand(6, 1, 2, generator=g, dtype=torch.float64) * 40
    boxes = torch.cat([low, low + 2 + 20 * torch.rand(6, 1, 2, generator=g, dtype=torch.float64)], 2)
    aim = target(boxes, torch.zeros(6, 1, dtype=torch.int64), 64, 8)
    back = corners(aim.box, 64)[aim.present]
    torch.testing.assert_close(back, boxes[:, 0])


def perfect(aim, boxes, kinds):
    """The output of a network that is always right: its first box says the object, the other nothing."""
    out = torch.zeros(*aim.present.shape, 5 * boxes + kinds, dtype=torch.float64)
    out[..., :2], out[..., 2:4] = aim.box[..., :2], aim.box[..., 2:].sqrt()
    out[..., 4] = aim.present
    out[..., 5 * boxes :] = F.one_hot(aim.kind, kinds) * aim.present[..., None]
    return out


def random_scene(seed, count=3, size=32, cells=4):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, 2, generator=g, dtype=torch.float64) * 20
    boxes = torch.cat([low, low + 4 + 8 * torch.rand(count, 3, 2, generator=g, dtype=torch.float64)], 2)
    labels = torch.randint(-1, 3, (count, 3), generator=g)
    return boxes, labels, target(boxes, labels, size, cells), g


def test_the_loss_of_a_perfect_answer_is_zero_and_it_is_detected():
    boxes, labels, aim, _ = random_scene(1)
    out = perfect(aim, 2, 3)
    assert objective(out, aim, 2, 32).item() == pytest.approx(0, abs=1e-12)
    found, scores = candidates(out, 2, 32)
    sure = (scores > 0.99).nonzero()
    assert len(sure) == int(aim.present.sum())
    real = {tuple(round(v, 6) for v in box) for box in boxes[labels >= 0].tolist()}
    assert {tuple(round(v, 6) for v in found[n, k].tolist()) for n, k, _ in sure.tolist()} <= real


@pytest.mark.parametrize(("seed", "count"), [(2, 2), (3, 3), (4, 1)])
def test_the_loss_is_the_one_written_out(seed, count):
    boxes, labels, aim, g = random_scene(seed)
    out = torch.rand(3, 4, 4, 5 * count + 3, generator=g, dtype=torch.float64)
    expected = plain.yolo_loss(out, boxes, labels, count, 32, 5.0, 0.5).item()
    assert objective(out, aim, count, 32).item() == pytest.approx(expected)
    assert objective(out, aim, count, 32, 2.0, 0.25).item() == pytest.approx(
        plain.yolo_loss(out, boxes, labels, count, 32, 2.0, 0.25).item()
    )
    doubled = Target(*(torch.cat([part, part]) for part in aim))
    assert objective(torch.cat([out, out]), doubled, count, 32).item() == pytest.approx(expected)


def test_the_gradient_is_finite_at_a_box_without_width_and_without_objects():
    _, _, aim, _ = random_scene(5)
    out = torch.zeros(3, 4, 4, 13, dtype=torch.float64, requires_grad=True)
    objective(out, aim, 2, 32).backward()
    assert out.grad.isfinite().all()
    empty = target(torch.zeros(3, 1, 4), torch.full((3, 1), -1), 32, 4)
    assert objective(out.detach() + 1, empty, 2, 32).item() == pytest.approx(0.5 * 32)


def test_classes_are_said_once_a_cell():
    """E37: S × S × (5B + C) numbers, and both boxes of a cell are scored by the same class probabilities."""
    net = build(Config(size=32, width=4), SPEC)["model"]
    assert net(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 4, 4, 5 * 2 + 3)
    out = torch.rand(1, 4, 4, 13)
    _, scores = candidates(out, 2, 32)
    scores = scores.view(4, 4, 2, 3)
    torch.testing.assert_close(scores[1, 2, 0] / out[0, 1, 2, 4], out[0, 1, 2, 10:])
    torch.testing.assert_close(scores[1, 2, 1] / out[0, 1, 2, 9], out[0, 1, 2, 10:])


def test_detection_is_threshold_then_suppression_within_each_class():
    out = torch.zeros(1, 4, 4, 13)
    out[0, 1, 1, :5] = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9])
    out[0, 1, 1, 5:10] = torch.tensor([0.6, 0.5, 0.5, 0.5, 0.8])
    out[0, 1, 1, 10:] = torch.tensor([1.0, 0.5, 0.0])
    model = lambda _: out  # noqa: E731
    boxes, scores, kinds = detect(Config(size=32, least_score=0.05), model, torch.zeros(1))
    assert kinds[0, :3].tolist() == [0, 1, -1]  # the second box goes, and the same box stays for another class
    assert scores[0, :2].tolist() == pytest.approx([0.9, 0.45])
    assert boxes[0, 0].tolist() == pytest.approx([8, 8, 16, 16])
    loose = detect(Config(size=32, least_score=0.05, overlap=0.99), model, torch.zeros(1))
    assert loose[2][0, :5].tolist() == [0, 0, 1, 1, -1]
    strict = detect(Config(size=32, least_score=0.5), model, torch.zeros(1))
    assert strict[2][0, :2].tolist() == [0, -1]


@pytest.mark.parametrize(
    ("flags", "said"), [({"size": 60}, "no multiple"), ({"data": "nowhere"}, "nothing|there is no")]
)
def test_settings_that_make_no_sense_are_one_sentence(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("detection/yolo", preset="tiny", quiet=True, out=tmp_path / "run", **flags)


def test_the_trunk_halves_and_doubles():
    for stride, channels in ((8, 16), (16, 32), (32, 64)):
        config = dataclasses.replace(Config(size=32, width=4), stride=stride)
        net = build(config, SPEC)["model"]
        assert net.trunk.channels == channels
        assert net(torch.zeros(2, 1, 32, 32)).shape[1:3] == (32 // stride, 32 // stride)
    x = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    net = build(yolo.PRESETS["tiny"], SPEC)["model"].eval()
    torch.testing.assert_close(net(x), net(x.float() / 255))
