"""Scores against scikit-learn and counted pairs; crops, tiles and readers against what they say."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F

from etude.blocks.metrics import confusion_matrix, mean_iou
from etude.core.errors import UserError
from etude.segmentation.parts.crops import deformed, mirrored, turned
from etude.segmentation.parts.looks import coloured, mask_image, overlaid
from etude.segmentation.parts.nulls import shuffled
from etude.segmentation.parts.scenes import VOID, draw, read
from etude.segmentation.parts.scores import pixel_loss, rand_error, segments
from etude.segmentation.parts.tiles import PixelNetwork, logits


def random(*shape, high=4, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def test_void_pixels_count_as_if_they_were_not_there():
    scores, labels = torch.randn(2, 4, 5, 6, dtype=torch.float64), random(2, 5, 6)
    labels[random(2, 5, 6, high=3, seed=1) == 0] = VOID
    kept = labels != VOID
    flat = scores.movedim(1, -1)[kept].float()
    assert float(pixel_loss(scores, labels)) == pytest.approx(float(F.cross_entropy(flat, labels[kept])), rel=1e-6)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    weighted = F.cross_entropy(flat, labels[kept], weight)
    assert float(pixel_loss(scores, labels, weight)) == pytest.approx(float(weighted), rel=1e-6)
    assert float(pixel_loss(scores, torch.full_like(labels, VOID))) == 0


def test_mean_iou_is_scikit_learns_jaccard():
    truth, said = random(500), random(500, seed=1)
    found = float(mean_iou(confusion_matrix(truth, said, 4)))
    assert found == pytest.approx(jaccard_score(truth, said, average="macro"), abs=1e-12)
    absent = float(mean_iou(confusion_matrix(truth, said, 9)))  # classes that are nowhere count for nothing
    assert absent == pytest.approx(found)


@pytest.mark.parametrize("seed", range(4))
def test_rand_error_is_that_of_counted_pairs(seed):
    truth, said = random(5, 6, high=3, seed=seed).numpy(), random(5, 6, high=3, seed=seed + 9).numpy()
    inside = [(t, p if p else -place) for place, (t, p) in enumerate(zip(truth.flat, said.flat), 1) if t]
    both = one = two = 0
    for (t, p), (u, q) in itertools.product(inside, inside):
        both += t == u and p == q
        one += t == u
        two += p == q
    precision, recall = both / two, both / one
    assert rand_error(truth, said) == pytest.approx(1 - 2 * precision * recall / (precision + recall), abs=1e-12)
    assert rand_error(truth, truth) == pytest.approx(0)
    assert rand_error(np.zeros((3, 3), int), said[:3, :3]) == 0


def test_segments_are_connected_parts_of_one_class():
    mask = np.array([[1, 1, 0, 1], [2, 0, 1, 1], [2, 255, 0, 2]], np.uint8)
    found = segments(mask)
    groups = {frozenset(zip(*np.nonzero(found == k))) for k in range(1, found.max() + 1)}
    assert groups == {
        frozenset({(0, 0), (0, 1)}), frozenset({(0, 3), (1, 3), (1, 2)}), frozenset({(1, 0), (2, 0)}), frozenset({(2, 3)}),
    }  # fmt: skip


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (2, 1, 3, 2), (9, 11, 14, 7)])
def test_mirroring_is_numpys(pad):
    x = random(2, 3, 4, high=50)
    top, bottom, left, right = pad
    expected = np.pad(x.numpy(), ((0, 0), (top, bottom), (left, right)), mode="reflect")
    assert np.array_equal(mirrored(x, *pad).numpy(), expected)
    assert mirrored(x[:, :1, :1], 2, 2, 2, 2).shape == (2, 5, 5)


def test_turns_are_the_eight_and_mirrors_the_two():
    x = random(3, 3, high=99)
    every = {tuple(turned(x, i / 8 + 0.01, "all").flatten().tolist()) for i in range(8)}
    assert every == {
        tuple(np.rot90(m, k).flatten().tolist()) for m in (x.numpy(), x.numpy()[:, ::-1]) for k in range(4)
    }
    two = {tuple(turned(x, i / 8 + 0.01, "mirror").flatten().tolist()) for i in range(8)}
    assert two == {tuple(m.flatten().tolist()) for m in (x, x.flip(-1))}
    assert torch.equal(turned(x, 0.9, "none"), x)


def test_bending_moves_picture_and_mask_alike_and_invents_no_label():
    y = torch.zeros(2, 32, 32, dtype=torch.uint8)
    y[:, 8:20, 10:26] = 3
    y[:, 12:14] = VOID
    x = (y * 40)[:, None]
    bent, labels = deformed(x, y, 2.0, torch.Generator().manual_seed(0))
    assert set(labels.unique().tolist()) <= {0, 3, VOID}
    assert not torch.equal(labels, y)
    near = torch.where(labels == 3, 120, torch.where(labels == VOID, (VOID * 40) % 256, 0)).float() / 255
    assert float((bent[:, 0] - near).abs().mean()) < 0.06  # the rims are blended, nothing else
    still, same = deformed(x, y, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(same, y)
    torch.testing.assert_close(still[:, 0], x[:, 0].float() / 255, atol=1e-5, rtol=0)


class Blur(PixelNetwork):
    """A network whose answer can be told: pixels, or their sums over a window."""

    def __init__(self, reach, margin, stride, residue=0):
        super().__init__()
        self.reach, self.margin, self.stride, self.residue = reach, margin, stride, residue
        self.layer = nn.Conv2d(1, 1, 2 * reach + 1, padding=reach - margin, bias=False)
        nn.init.uniform_(self.layer.weight)

    def forward(self, x):
        assert (x.shape[-1] - 2 * self.margin - self.residue) % self.stride == 0
        return self.layer(x)


@pytest.mark.parametrize("tile", [3, 8, 11, 40])
@pytest.mark.parametrize(
    ("reach", "margin", "stride", "residue"), [(0, 0, 1, 0), (3, 0, 4, 0), (2, 2, 1, 0), (3, 3, 4, 1)]
)
def test_tiles_make_up_one_pass(reach, margin, stride, residue, tile):
    net, x = Blur(reach, margin, stride, residue).double(), torch.randn(2, 1, 29, 18, dtype=torch.float64)
    whole = logits(net, x)
    assert whole.shape == (2, 1, 29, 18)
    torch.testing.assert_close(logits(net, x, tile), whole)
    if margin:  # what lies outside is the picture mirrored
        expected = F.conv2d(F.pad(x, (margin,) * 4, mode="reflect"), net.layer.weight)
        torch.testing.assert_close(whole, expected)


def test_canvases_hold_digits_where_the_mask_says():
    x = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    x[0, 0, 4:12, 4:12], x[1, 0, 2:5] = 200, 100
    part = draw(x, torch.tensor([0, 6]), 5, 0)
    for picture, mask in zip(part.x, part.y):
        assert torch.equal(mask == 1, picture[0] == 200)
        assert torch.equal(mask == VOID, picture[0] == 100)
    assert sum(int((mask == 1).any()) for mask in part.y)
    again = draw(x, torch.tensor([0, 6]), 5, 0)
    assert all(torch.equal(a, b) for a, b in zip(part.x, again.x))


def test_shuffled_masks_belong_to_other_pictures():
    data, other = read("digits"), shuffled("digits")
    assert torch.equal(other.train.y[1], data.train.y[0])
    assert torch.equal(other.train.x[1], data.train.x[1])
    assert torch.equal(other.test.y[1], data.test.y[1])


def own(folder, count=5, size=(10, 8), values=(0, 1, 2), names=""):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        shape = (size[0] + i, size[1])
        Image.fromarray(np.full(shape, 40 * i, np.uint8)).save(folder / "images" / f"p{i}.png")
        mask = np.full(shape, values[i % len(values)], np.uint8)
        mask[0, 0] = VOID
        Image.fromarray(mask).save(folder / "masks" / f"p{i}.png")
    if names:
        (folder / "classes.txt").write_text(names)
    return str(folder)


def test_own_folder_of_pictures_and_masks(tmp_path):
    data = read(own(tmp_path / "a"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [3, 1, 1]
    assert data.spec.classes == ("class 0", "class 1", "class 2")
    for part in (data.train, data.validation, data.test):
        for x, y in zip(part.x, part.y):
            index = int(x[0, 0, 0]) // 40
            assert int(y[1, 1]) == index % 3
            assert int(y[0, 0]) == VOID
            assert x.shape[1:] == y.shape == (10 + index, 8)
    pixels = torch.cat([x.flatten().double() for x in data.train.x]) / 255
    assert data.spec.mean == pytest.approx((float(pixels.mean()),), abs=1e-6)
    assert read(own(tmp_path / "b", names="sky\nroad\ncar\n")).spec.classes == ("sky", "road", "car")
    two = read(own(tmp_path / "c", values=(0, 255)))
    assert two.spec.classes == ("background", "object")
    assert {int(v) for y in two.train.y for v in y.unique()} <= {0, 1}


def test_unusable_data_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no data 'digitz'"):
        read("digitz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no folder images"):
        read(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="at least three"):
        read(own(tmp_path / "few", count=2))
    folder = own(tmp_path / "odd")
    (tmp_path / "odd/masks/p1.png").rename(tmp_path / "odd/masks/q1.png")
    with pytest.raises(UserError, match="every picture needs one mask"):
        read(folder)
    folder = own(tmp_path / "rgb")
    Image.new("RGB", (8, 11)).save(tmp_path / "rgb/masks/p1.png")
    with pytest.raises(UserError, match=r"p1\.png is RGB"):
        read(folder)
    Image.new("L", (3, 3)).save(tmp_path / "rgb/masks/p1.png")
    with pytest.raises(UserError, match="make them equal"):
        read(folder)
    with pytest.raises(UserError, match="name each"):
        read(own(tmp_path / "names", names="one\ntwo"))
    with pytest.raises(UserError, match="names 'one' twice"):
        read(own(tmp_path / "twice", names="one\none\ntwo"))
    with pytest.raises(UserError, match="holds the number 3 alone"):
        read(own(tmp_path / "all", values=(3,)))
    folder = own(tmp_path / "nothing")
    for path in (tmp_path / "nothing/masks").iterdir():
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size).save(path)
    with pytest.raises(UserError, match="holds the number 0 alone: with one class there is nothing to learn"):
        read(folder)
    folder = own(tmp_path / "bytes")
    (tmp_path / "bytes/classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read(folder)
    folder = own(tmp_path / "jpeg")
    Image.open(tmp_path / "jpeg/masks/p1.png").save(tmp_path / "jpeg/masks/p1.jpg")
    (tmp_path / "jpeg/masks/p1.png").unlink()
    with pytest.raises(UserError, match="a JPEG, which does not keep class numbers"):
        read(folder)
    folder = own(tmp_path / "cut", size=(60, 80))
    whole = Image.open(tmp_path / "cut/masks/p1.png")
    (tmp_path / "cut/masks/p1.png").unlink()
    whole.save(tmp_path / "cut/masks/p1.bmp")
    path = tmp_path / "cut/masks/p1.bmp"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"p1\.bmp cannot be read"):
        read(folder)
    folder = own(tmp_path / "script")
    (tmp_path / "script/masks/p1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 11\n%%EndComments\n")
    with pytest.raises(UserError, match=r"p1\.png cannot be read"):
        read(folder)
    monkeypatch.setenv("ETUDE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="isbi2012 are not here"):
        read("isbi2012")


def test_overlays_and_masks(tmp_path):
    mask = np.array([[0, 1], [2, VOID]], np.uint8)
    mask_image(mask).save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask)
        assert np.array_equal(np.asarray(image.convert("RGB")), coloured(mask))
    x = np.full((1, 2, 2), 100, np.uint8)
    over = overlaid(x, mask, 0.25)
    assert (over[0, 0] == 100).all()
    assert (over[1, 1] == 100).all()
    assert over[0, 1] == pytest.approx(75 + coloured(mask)[0, 1] * 0.25, abs=0.51)
