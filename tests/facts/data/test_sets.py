"""Bundled data, texts, and what every set carries: moments, sizes, three fixed stratified splits."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from etude import data
from etude.core.errors import UserError
from etude.data.sets import assemble, held_back, moments, resized, stratified


def test_digits_are_the_scans_split_once_and_for_all():
    digits = data.images("digits")
    assert digits.train.x.shape == (1293, 1, 8, 8)
    assert digits.validation.x.shape == (144, 1, 8, 8)
    assert digits.test.x.shape == (360, 1, 8, 8)
    assert digits.train.x.dtype == torch.uint8
    assert digits.spec.classes == tuple("0123456789")
    images, target = load_digits(return_X_y=True)
    rest, test = stratified(target, 360)
    kept, held = held_back(target[rest])
    train, validation = rest[kept], rest[held]
    assert sorted([*train, *validation, *test]) == list(range(1797))  # disjoint, and together the whole
    for indices, split in ((train, digits.train), (validation, digits.validation), (test, digits.test)):
        np.testing.assert_array_equal(split.y, target[indices])
        np.testing.assert_array_equal(split.x.reshape(len(split), -1), np.rint(images[indices] * 255 / 16))
    for split, wanted in ((digits.test, 0.2), (digits.validation, 0.08), (digits.train, 0.72)):
        share = split.y.bincount() / torch.from_numpy(np.bincount(target))
        assert (share - wanted).abs().max() < 0.01
    # pinned: another split would silently change every recorded score
    assert test[:8].tolist() == [0, 2, 9, 11, 20, 21, 38, 43]
    assert validation[:8].tolist() == [5, 7, 30, 33, 51, 64, 70, 73]
    again = data.images("digits")
    assert torch.equal(again.train.x, digits.train.x)
    assert torch.equal(again.validation.x, digits.validation.x)


def test_digits_enlarged():
    small, large = data.images("digits", size=8), data.images("digits", size=28)
    assert large.spec.shape == (1, 28, 28)
    for part in ("train", "validation", "test"):
        few, many = getattr(small, part), getattr(large, part)
        assert few.x.shape == (len(many), 1, 8, 8)
        assert many.x.shape == (len(few), 1, 28, 28)
        means = [split.x.float().mean((1, 2, 3)) for split in (few, many)]
        assert (means[0] - means[1]).abs().max() < 2  # image by image
        assert torch.equal(few.y, many.y)


def test_stratified_gives_the_exact_number_in_proportion():
    labels = np.random.default_rng(0).choice(5, 997, p=[0.5, 0.3, 0.1, 0.09, 0.01])
    for count in (1, 10, 333):
        train, test = stratified(labels, count)
        assert len(test) == count
        assert len(train) == 997 - count
        wanted = np.bincount(labels) * count / 997
        assert np.abs(np.bincount(labels[test], minlength=5) - wanted).max() < 1
    assert not np.array_equal(stratified(labels, 100)[1], stratified(labels, 100, seed=1)[1])


def test_a_stratified_tenth_of_the_training_images_validates():
    labels = np.random.default_rng(0).choice(4, 5003, p=[0.7, 0.2, 0.09, 0.01])
    train, validation = held_back(labels)
    assert sorted([*train, *validation]) == list(range(5003))
    assert len(validation) == 500
    assert np.abs(np.bincount(labels[validation]) - np.bincount(labels) * 500 / 5003).max() < 1
    assert not np.array_equal(validation, stratified(labels, 500)[1])  # not the very rows that digits test on
    assert [len(part) for part in held_back(np.zeros(2))] == [1, 1]


def test_photographs():
    pictures = data.photographs()
    assert set(pictures) == {"china", "flower"}
    assert {(picture.shape, str(picture.dtype)) for picture in pictures.values()} == {((427, 640, 3), "uint8")}
    flower = pictures["flower"].reshape(-1, 3).astype(float)
    assert flower.std(0).min() > 20
    red = (flower[:, 0] > 150) & (flower[:, 1] < 110)
    assert red.mean() > 0.01  # a red flower: the channels are in the order red, green, blue


@pytest.mark.parametrize("shape", [(500, 3, 9, 7), (3, 1, 300, 400), (1, 2, 1, 1), (70_000, 1, 1, 1)])
def test_moments_equal_float64(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    x[:, 0] //= 3
    mean, std = moments(x)
    exact = x.astype(np.float64) / 255
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), atol=1e-6)
    deviation = exact.std((0, 2, 3))
    np.testing.assert_allclose(std, np.where(deviation > 0, deviation, 1), atol=2e-6)


def test_a_constant_channel_has_deviation_one():
    assert moments(np.full((10, 1, 4, 4), 51, np.uint8)) == ((0.2,), (1.0,))


def test_splits_are_cut_and_moments_are_of_the_training_split_only():
    """Training images are black but for those that validate, which are white, and so are all test images."""
    y = (np.arange(40) % 2).astype(np.uint8)
    kept, held = held_back(y)
    x = np.zeros((40, 1, 2, 2), np.uint8)
    x[held] = 255
    test = np.full((4, 1, 2, 2), 255, np.uint8)
    made = assemble("x", (x, y), (test, y[:4]), ("a", "b"), None, "")
    assert (made.spec.mean, made.spec.std) == ((0.0,), (1.0,))
    assert (len(made.train), len(made.validation), len(made.test)) == (36, 4, 4)
    assert made.validation.x.unique().tolist() == [255]
    assert made.train.y.tolist() == y[kept].tolist()
    assert made.validation.y.tolist() == y[held].tolist()
    given = assemble("x", (x, y), (test, y[:4]), ("a", "b"), 1, "", validation=(test[:3], y[:3]))
    assert (len(given.train), len(given.validation), len(given.test)) == (40, 3, 4)
    assert given.spec.mean == (0.1,)
    assert given.validation.x.shape == (3, 1, 1, 1)
    with pytest.raises(UserError, match="here has one training image: at least two are needed"):
        assemble("x", (x[:1], y[:1]), (test, y[:4]), ("a", "b"), None, "here")


@pytest.mark.parametrize("size", [5, 14, 28, 56, 61])
def test_resizing_equals_pillow(size):
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), np.uint8)
    got = resized(x, size)
    for image, result in zip(x[:, 0], got[:, 0]):
        wanted = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(wanted - result).max() <= 1
    if size == 28:
        assert got is x
    with pytest.raises(UserError, match="at least 1 pixel"):
        resized(x, 0)


def test_house_text():
    house = data.text("house_text")
    assert house.name == "house_text"
    assert house.text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n")
    assert len(house.text) == 29951
    assert 50 < len(set(house.text)) < 65


def test_real_shakespeare(real):
    real("tiny_shakespeare/input.txt")
    text = data.text("tiny_shakespeare").text
    assert len(text) == 1115394
    assert len(set(text)) == 65
    assert text.startswith(data.text("house_text").text)


def test_own_text_files(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffGrüße\r\nan alle\rdrei\n".encode())
    assert data.text(path).text == "Grüße\nan alle\ndrei\n"
    assert data.text(str(path)).name == "own.txt"
    packed = tmp_path / "own.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert data.text(packed).text == data.text(path).text


def test_texts_that_cannot_be_read(tmp_path, empty_home):
    path = tmp_path / "own.txt"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(UserError, match=r"own\.txt is not UTF-8 text \(byte 3\): save it as UTF-8"):
        data.text(path)
    path.write_bytes(b" \n ")
    with pytest.raises(UserError, match="holds no text"):
        data.text(path)
    with pytest.raises(UserError, match="is a folder, not a text file"):
        data.text(tmp_path)
    with pytest.raises(UserError, match=r"There is no dataset 'tiny_shakespear'; did you mean 'tiny_shakespeare'\?"):
        data.text("tiny_shakespear")
    (empty_home / "tiny_shakespeare").mkdir()
    (empty_home / "tiny_shakespeare" / "input.txt").write_text("something else")
    with pytest.raises(UserError, match=r"input\.txt has the wrong checksum"):
        data.text("tiny_shakespeare")
    assert data.check("tiny_shakespeare")[0]["state"] == "damaged"
