"""The user's own folders: layouts, the three splits, grey and colour, orientation, and every fault."""

from __future__ import annotations

import itertools
import os

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


def parts(read):
    return read.train, read.validation, read.test


def test_class_folders_with_our_split(tmp_path):
    fill(tmp_path, count=50)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / "empty").mkdir()
    read = data.images(tmp_path)
    assert read.spec.classes == ("cat", "dog")
    assert read.spec.shape == (3, 8, 8)
    assert sum(map(len, parts(read))) == 100
    assert 8 <= len(read.test) <= 32  # binomial(100, 0.2), three standard deviations
    assert 2 <= len(read.validation) <= 16  # binomial(100, 0.08)
    assert all(set(part.y.tolist()) == {0, 1} for part in parts(read))
    assert read.train.x[0, :, 0, 0].tolist() == [200, 10, 10]
    assert "20% of the file names for testing, 8% for validation; 1 other files left alone" in read.source
    assert data.images(str(tmp_path)).name == str(tmp_path)


@pytest.mark.parametrize("own", [False, True])
def test_no_image_moves_between_splits_when_images_are_added(tmp_path, monkeypatch, own):
    root = tmp_path / "train" if own else tmp_path
    monkeypatch.setattr(
        folders, "_decoded", lambda paths, size, folder: np.array([f"{p.parent.name}/{p.name}" for p in paths])
    )

    def names(first, last):  # the splits look at names only
        for name in ("cat", "dog"):
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(first, last):
                (root / name / f"{number:03d}.png").touch()
        read = folders.read(tmp_path)
        found = [set(part[0].tolist()) for part in (read.train, read.validation, read.test)]
        assert sum(map(len, found)) == len(set.union(*found))
        return found

    if own:
        for name in ("cat", "dog"):
            (tmp_path / "test" / name).mkdir(parents=True)
            (tmp_path / "test" / name / "once.png").touch()
    before, after = names(0, 100), names(100, 400)
    assert [len(part) for part in before] != [len(part) for part in after]
    assert before == [{name for name in part if "once" in name or int(name[4:7]) < 100} for part in after]
    for part, share in zip(after[:2] if own else after, (0.9, 0.1) if own else (0.72, 0.08, 0.2)):
        assert abs(len(part) / 800 - share) < 4 * (share * (1 - share) / 800) ** 0.5


def test_splits_are_a_function_of_names_and_seed(tmp_path):
    paths = [tmp_path / f"{number:03d}.png" for number in range(200)]
    for chances in ((0.0, 0.2), (0.2, 0.28)):
        assert folders._divided("cat", paths, 0, chances) == folders._divided("cat", paths[::-1], 0, chances)
        assert folders._divided("cat", paths, 0, chances) != folders._divided("cat", paths, 1, chances)
        assert folders._divided("cat", paths, 0, chances) != folders._divided("dog", paths, 0, chances)


def test_every_class_of_three_gets_one_of_each(tmp_path):
    fill(tmp_path, classes=[f"class{number}" for number in range(12)], count=3)
    assert [part.y.tolist() for part in parts(data.images(tmp_path))] == [list(range(12))] * 3


@pytest.mark.parametrize("count", [3, 4, 7, 40])
@pytest.mark.parametrize("own", [False, True])
def test_splits_are_disjoint_together_the_whole_and_the_same_at_every_size(tmp_path, count, own):
    """Each image has a colour of its own, by which it is known again."""
    root = tmp_path / "train" if own else tmp_path
    for number in range(2 * count):
        paint(root / f"c{number % 2}" / f"{number}.png", colour=(number, 0, 0))
    if own:
        fill(tmp_path / "test", classes=("c0", "c1"), count=1, colour=(255, 0, 0))
    here, small = (parts(data.images(tmp_path, size=size)) for size in (None, 4))
    numbers = [part.x[:, 0, 0, 0].tolist() for part in here]
    assert sorted(itertools.chain(*(numbers[:2] if own else numbers))) == list(range(2 * count))
    assert numbers == [part.x[:, 0, 0, 0].tolist() for part in small]
    assert all(set(part.y.tolist()) == {0, 1} for part in here)
    assert all((part.x[:, 0, 0, 0] % 2 == part.y).all() for part in (here[:2] if own else here))


@pytest.mark.parametrize("other", ["test", "val", "valid", "validation"])
def test_two_given_splits_are_kept_and_training_images_validate(tmp_path, other):
    fill(tmp_path / "train", count=4, colour=(1, 1, 1))
    fill(tmp_path / other, count=2, colour=(2, 2, 2))
    read = data.images(tmp_path)
    assert read.train.x.unique().tolist() == read.validation.x.unique().tolist() == [1]
    assert read.test.x.unique().tolist() == [2]
    assert read.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert read.validation.y.tolist() == [0, 1]
    assert f"folders train, and {other}; a tenth of train validates" in read.source
    fill(tmp_path / other, classes=("fox",), count=1)
    with pytest.raises(UserError, match=r"has the class 'fox', which .*train has not"):
        data.images(tmp_path)


@pytest.mark.parametrize("held", ["val", "valid", "validation"])
def test_three_given_splits_are_kept(tmp_path, held):
    for colour, name, count in ((1, "train", 1), (2, held, 2), (3, "test", 3)):
        fill(tmp_path / name, count=count, colour=(colour, 0, 0))
    read = data.images(tmp_path)
    assert [part.x[:, 0].unique().tolist() for part in parts(read)] == [[1], [2], [3]]
    assert [len(part) for part in parts(read)] == [2, 4, 6]
    assert f"folders train, {held}, and test" in read.source
    fill(tmp_path / held, classes=("fox",), count=1)
    with pytest.raises(UserError, match=rf"{held} has the class 'fox', which .*train has not"):
        data.images(tmp_path)


def test_moments_are_of_the_training_images_alone(tmp_path):
    for colour, name in ((51, "train"), (255, "val"), (255, "test")):
        fill(tmp_path / name, count=2, colour=colour, mode="L")
    assert data.images(tmp_path).spec.mean == (0.2,)


def test_labels_go_with_their_images(tmp_path):
    for number in range(30):
        paint(tmp_path / f"c{number % 3}" / f"{number}.png", colour=(number % 3 * 100, number, 0))
    read = data.images(tmp_path)
    for split in parts(read):
        assert (split.x[:, 0, 0, 0] == split.y * 100).all()
    assert sorted(number for split in parts(read) for number in split.x[:, 1, 0, 0].tolist()) == list(range(30))


def test_grey_only_when_every_image_is_grey(tmp_path):
    fill(tmp_path, colour=70, mode="L", count=4)
    paint(tmp_path / "cat" / "bits.png", colour=1, mode="1")
    read = data.images(tmp_path)
    assert read.spec.shape == (1, 8, 8)
    assert {value for split in parts(read) for value in split.x.unique().tolist()} == {70, 255}
    paint(tmp_path / "dog" / "colour.png", colour=(9, 8, 7))
    assert data.images(tmp_path).spec.shape == (3, 8, 8)


def test_sixteen_bit_grey_is_scaled_and_transparency_is_white(tmp_path):
    fill(tmp_path, count=3, mode="L", colour=0)
    deep = np.full((8, 8), 128 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "cat" / "deep.png")
    read = data.images(tmp_path)
    assert {value for split in parts(read) for value in split.x.unique().tolist()} == {0, 128}
    colour = fill(tmp_path / "colour", count=3, mode="RGBA", colour=(255, 0, 0, 0))
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
        for number in range(3):
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
    gap = tmp_path / "gap"
    fill(gap / "train", classes=("cat",), count=2)
    fill(gap / "test", classes=("cat", "dog"), count=2)
    with pytest.raises(UserError, match="has the class 'dog', which"):
        data.images(gap)


def test_a_class_name_that_cannot_be_written_is_refused(tmp_path):
    fill(tmp_path, classes=("été", os.fsdecode(b"\xff\xfe")))
    with pytest.raises(UserError, match=r"has the class folder '\\udcff\\udcfe', which is not text in UTF-8"):
        data.images(tmp_path)


@pytest.mark.parametrize(("count", "said"), [(1, "1 image"), (2, "2 images")])
def test_a_class_too_small_to_be_split_is_named(tmp_path, count, said):
    fill(tmp_path, classes=("cat", "dog"))
    fill(tmp_path, classes=("emu", "fox"), count=count)
    with pytest.raises(UserError) as caught:
        data.images(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has {said} of the class 'emu': every class needs at least 3, "
        "one each for training, validation and testing."
    )


def test_a_class_with_one_training_image_cannot_validate(tmp_path):
    fill(tmp_path / "train", classes=("cat", "dog"))
    fill(tmp_path / "train", classes=("emu",), count=1)
    fill(tmp_path / "test", count=1)
    with pytest.raises(
        UserError, match=r"train has 1 image of the class 'emu': .* at least 2, one each for training and v"
    ):
        data.images(tmp_path)
    fill(tmp_path / "val", count=1)
    assert len(data.images(tmp_path).train) == 21


def test_a_registered_name_wins_and_a_path_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", classes=("cat", "dog"))
    assert len(data.images("digits").spec.classes) == 10
    assert data.images("./digits").spec.classes == ("cat", "dog")
