"""The user's own folders: layouts, the split, grey and colour, orientation, and every fault."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from etude import data
from etude.core.errors import UserError
from etude.data import folders


def paint(path, colour=(200, 10, 10), size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def fill(root, classes=("cat", "dog"), count=10, **options):
    for name in classes:
        for number in range(count):
            paint(root / name / f"{number:03d}.png", **options)
    return root


def test_class_folders_with_our_split(tmp_path):
    fill(tmp_path, count=50)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / "empty").mkdir()
    read = data.images(tmp_path)
    assert read.spec.classes == ("cat", "dog")
    assert read.spec.shape == (3, 8, 8)
    assert len(read.train) + len(read.test) == 100
    assert 8 <= len(read.test) <= 32  # binomial(100, 0.2), five standard deviations
    assert set(read.test.y.tolist()) == set(read.train.y.tolist()) == {0, 1}
    assert read.train.x[0, :, 0, 0].tolist() == [200, 10, 10]
    assert "1 other files left alone" in read.source
    assert data.images(str(tmp_path)).name == str(tmp_path)


def test_the_split_does_not_move_when_images_are_added_and_is_disjoint(tmp_path):
    def names(root):
        test = {}
        for name, paths in folders._listed(root)[0].items():
            train, held = folders._divided(name, paths, 0, 0.2)
            assert not set(train) & set(held)
            assert set(train) | set(held) == set(paths)
            test[name] = {path.name for path in held}
        return test

    def touch(first, last):  # the split looks at names only
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            for number in range(first, last):
                (tmp_path / name / f"{number:03d}.png").touch()
        return names(tmp_path)

    before, after = touch(0, 200), touch(200, 500)
    for name in before:
        assert before[name] == {file for file in after[name] if int(file[:3]) < 200}
    paths = folders._listed(tmp_path)[0]["cat"]
    assert folders._divided("cat", paths, 0, 0.2) == folders._divided("cat", paths[::-1], 0, 0.2)
    assert folders._divided("cat", paths, 0, 0.2) != folders._divided("cat", paths, 1, 0.2)


def test_every_class_of_two_gets_one_of_each(tmp_path):
    fill(tmp_path, classes=[f"class{number}" for number in range(12)], count=2)
    read = data.images(tmp_path)
    assert read.train.y.tolist() == read.test.y.tolist() == list(range(12))


@pytest.mark.parametrize("other", ["test", "val"])
def test_given_splits_are_kept(tmp_path, other):
    fill(tmp_path / "train", count=3, colour=(1, 1, 1))
    fill(tmp_path / other, count=2, colour=(2, 2, 2))
    read = data.images(tmp_path)
    assert read.train.x.unique().tolist() == [1]
    assert read.test.x.unique().tolist() == [2]
    assert read.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert other in read.source
    fill(tmp_path / other, classes=("fox",), count=1)
    with pytest.raises(UserError, match=r"has the class 'fox', which .*train has not"):
        data.images(tmp_path)


def test_labels_go_with_their_images(tmp_path):
    for number in range(30):
        paint(tmp_path / f"c{number % 3}" / f"{number}.png", colour=(number % 3 * 100, number, 0))
    read = data.images(tmp_path)
    for split in (read.train, read.test):
        assert (split.x[:, 0, 0, 0] == split.y * 100).all()
    numbers = [*read.train.x[:, 1, 0, 0].tolist(), *read.test.x[:, 1, 0, 0].tolist()]
    assert sorted(numbers) == list(range(30))


def test_grey_only_when_every_image_is_grey(tmp_path):
    fill(tmp_path, colour=70, mode="L", count=4)
    paint(tmp_path / "cat" / "bits.png", colour=1, mode="1")
    read = data.images(tmp_path)
    assert read.spec.shape == (1, 8, 8)
    assert set(read.train.x.unique().tolist()) | set(read.test.x.unique().tolist()) == {70, 255}
    paint(tmp_path / "dog" / "colour.png", colour=(9, 8, 7))
    assert data.images(tmp_path).spec.shape == (3, 8, 8)


def test_sixteen_bit_grey_is_scaled_and_transparency_is_white(tmp_path):
    fill(tmp_path, count=2, mode="L", colour=0)
    deep = np.full((8, 8), 128 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "cat" / "deep.png")
    read = data.images(tmp_path)
    assert {0, 128} == set(read.train.x.unique().tolist()) | set(read.test.x.unique().tolist())
    colour = fill(tmp_path / "colour", count=2, mode="RGBA", colour=(255, 0, 0, 0))
    assert data.images(colour).train.x.unique().tolist() == [255]  # not the red that nobody sees


def test_size_crops_the_middle_square_and_resizes(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255  # the middle square
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
    read = data.images(tmp_path, size=10)
    assert read.spec.shape == (3, 10, 10)
    assert read.train.x.unique().tolist() == [255]


def test_cameras_note_the_orientation(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255  # left half white; orientation 6: shown turned a quarter clockwise, so white ends on top
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(image).save(tmp_path / name / f"{number}.jpg", quality=95, exif=exif)
    x = data.images(tmp_path).train.x
    assert x.shape[1:] == (3, 16, 8)
    assert x[:, :, :6].min() > 240
    assert x[:, :, 10:].max() < 15


def test_sizes_that_differ_need_a_size(tmp_path):
    fill(tmp_path, count=3)
    paint(tmp_path / "dog" / "wide.png", size=(9, 8))
    with pytest.raises(UserError, match=r"wide.png is 9×8 pixels but 0\d\d.png is 8×8: give one size for all images"):
        data.images(tmp_path)
    assert data.images(tmp_path, size=8).spec.shape == (3, 8, 8)
    with pytest.raises(UserError, match="at least 1 pixel, not 0"):
        data.images(tmp_path, size=0)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header", "postscript"])
def test_a_broken_image_is_named(tmp_path, damage):
    fill(tmp_path, count=6, size=(64, 64))
    broken = tmp_path / "dog" / "003.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(broken)
    whole = broken.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b"", "header": whole[:20]}
    contents["postscript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    broken.write_bytes(contents[damage])
    reason = "cannot identify.*" if damage == "postscript" else ".*"  # never handed to Ghostscript
    with pytest.raises(
        UserError, match=rf"The image .*dog/003\.png cannot be read \({reason}\): repair or remove it\."
    ):
        data.images(tmp_path)


def test_an_image_too_large_is_named(tmp_path, monkeypatch):
    fill(tmp_path, count=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match=r"The image .*png cannot be read"):
        data.images(tmp_path)


def test_one_class_no_images_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"has no images in class folders: put them into .*class name"):
        data.images(tmp_path)
    paint(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"has no images in class folders \(1 lie loose in it\)"):
        data.images(tmp_path)
    fill(tmp_path, classes=("cat",))
    with pytest.raises(UserError, match="has only the class 'cat': put the images of every class"):
        data.images(tmp_path)
    with pytest.raises(UserError, match=r"a\.png is a file: name a folder"):
        data.images(tmp_path / "a.png")
    lonely = tmp_path / "lonely"
    fill(lonely, count=1)
    with pytest.raises(UserError, match="has no test images: put at least two images"):
        data.images(lonely)
    gap = tmp_path / "gap"
    fill(gap / "train", classes=("cat",), count=2)
    fill(gap / "test", classes=("cat", "dog"), count=2)
    with pytest.raises(UserError, match="has the class 'dog', which"):
        data.images(gap)


def test_a_registered_name_wins_and_a_path_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", classes=("cat", "dog"))
    assert len(data.images("digits").spec.classes) == 10
    assert data.images("./digits").spec.classes == ("cat", "dog")
