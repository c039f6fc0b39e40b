"""Windows, their number, their crops and their boxes against plain enumeration; localisation by hand."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.detection.parts import windows
from etude.detection.parts.boxes import iou
from etude.detection.parts.scenes import Scene
from etude.detection.sliding_window import Config, all_windows, build, detect, windows_scored

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_windows.py"))))
SPEC = Spec((1, 32, 32), ("a", "b", "c"), (0.1,), (0.3,))


@pytest.mark.parametrize(("length", "side", "stride"), [(20, 20, 4), (64, 20, 4), (63, 14, 3), (21, 20, 2)])
def test_the_number_of_places_is_the_formula_and_the_count(length, side, stride):
    assert windows.places(length, side, stride) == (length - side) // stride + 1
    assert windows.places(length, side, stride) == sum(1 for at in range(0, length, stride) if at + side <= length)


def test_boxes_and_order_are_those_of_the_enumeration():
    grid = windows.grid(48, 14, 3, (0.3, 0.5), (0.7, 1.5))
    rows = plain.every(48, 14, 3, (0.3, 0.5), (0.7, 1.5))
    assert len(grid.boxes()) == len(rows) == sum(high * wide for high, wide in grid.rows())
    torch.testing.assert_close(grid.boxes(), torch.tensor([row[4] for row in rows]))
    wide = grid.boxes()[:, 2:] - grid.boxes()[:, :2]
    torch.testing.assert_close(
        wide[0].prod() ** 0.5, torch.tensor(0.3 * 48), rtol=0.03, atol=0
    )  # the scale is a share of the side
    assert (wide[0, 1] / wide[0, 0]).item() == pytest.approx(0.7, rel=0.05)


def test_windows_are_those_of_unfold_and_of_numpy():
    x = torch.rand(2, 3, 23, 31)
    crops = windows.unfolded(x, 14, 4)
    assert crops.data_ptr() == x.data_ptr()  # a view
    columns = F.unfold(x, 14, stride=4).transpose(1, 2).reshape(2, crops.shape[1], crops.shape[2], 3, 14, 14)
    assert torch.equal(crops, columns)
    theirs = np.lib.stride_tricks.sliding_window_view(x.numpy(), (14, 14), axis=(2, 3))[:, :, ::4, ::4]
    assert np.array_equal(crops.numpy(), theirs.transpose(0, 2, 3, 1, 4, 5))


def test_a_window_cut_alone_is_the_one_of_the_whole_sweep():
    x = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    grid = windows.grid(40, 14, 5, (0.4, 0.6), (1.0, 1.6))
    rows = plain.every(40, 14, 5, (0.4, 0.6), (1.0, 1.6))
    index = torch.stack([torch.randperm(len(rows))[:9] for _ in range(2)])
    found = windows.cut(x, grid, index)
    for n in range(2):
        for k, w in enumerate(index[n].tolist()):
            torch.testing.assert_close(
                found[n, k].double(), plain.crop(x[n].double() / 255, rows[w], 14), atol=1e-5, rtol=0
            )


def test_every_window_is_scored_by_itself():
    config = Config(size=32, side=14, stride=3, scales=(0.45, 0.6), aspects=(1.0, 1.4), width=4, head_width=8)
    model = build(config, SPEC)["model"].eval()
    x = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    said = windows_scored(model, x, all_windows(config), most=40)
    net = plain.Plain(build(config, SPEC)["model"], SPEC)
    net.load_state_dict(plain.Plain(model, SPEC).state_dict())
    rows = plain.every(32, 14, 3, (0.45, 0.6), (1.0, 1.4))
    wanted = [net.eval()(torch.stack([plain.crop(one, row, 14) for row in rows])) for one in x.double() / 255]
    assert (said.double() - torch.stack(wanted)).abs().max() < 1e-5


def test_localisation_by_hand():
    """E34: right is the class of an object label with IoU ≥ 0.5; the second detection does not help."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]]).repeat(4, 1, 1)
    labels = torch.tensor([[3, 5], [3, 5], [3, -1], [3, 5]])
    part = Scene(torch.zeros(4), boxes, labels, labels < 0)
    first = torch.tensor([[20.0, 20, 30, 28], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 4.9]])
    found = torch.stack([first, boxes[:, 0]], 1), torch.ones(4, 2), torch.tensor([[5, 5], [5, 3], [5, 3], [3, 3]])
    assert windows.localised(found, part) == 0.25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"side": 18}, "none of 14"),
        ({"scales": (1.1,)}, "larger than the picture"),
        ({"negative": 0.9}, "would be both"),
    ],
)
@pytest.mark.parametrize("name", ["sliding_window", "overfeat"])
def test_settings_that_make_no_sense_are_one_sentence(name, flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run(f"detection/{name}", preset="tiny", quiet=True, out=tmp_path / "run", **flags)


def test_windows_that_are_found_overlap_no_more_than_allowed():
    """Of one class and picture; another `--overlap` leaves other windows."""
    torch.manual_seed(0)
    counts = []
    for overlap in (0.05, 0.6):
        config = Config(size=32, side=14, stride=4, width=4, least_score=0.0, overlap=overlap)
        model = build(config, SPEC)["model"].eval()
        found = detect(config, model, torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8))
        counts.append(int((found[1] > 0).sum()))
        for boxes, scores, classes in zip(*found):
            for kind in range(3):
                own = boxes[(classes == kind) & (scores > 0)]
                assert (iou(own, own) - torch.eye(len(own)) <= overlap + 1e-6).all()
    assert counts[0] < counts[1]
