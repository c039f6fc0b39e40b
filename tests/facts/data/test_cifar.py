"""CIFAR-10: the official archive (rebuilt here), unpacked and cut batches, the lossy copy, every kind of damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from etude import data
from etude.core.errors import UserError
from etude.data import cifar
from etude.data.sets import held_back


def records(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 256, (count, cifar.RECORD), np.uint8)
    rows[:, 0] %= 10
    return rows


def pack(path, parts, skip=(), rename=None):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for position, name in enumerate(cifar.BATCHES):
            if name in skip:
                continue
            info = tarfile.TarInfo((rename or {}).get(name, f"{cifar.FOLDER}/{name}"))
            info.size = parts[position].nbytes
            archive.addfile(info, io.BytesIO(parts[position].tobytes()))
        info = tarfile.TarInfo(f"{cifar.FOLDER}/readme.html")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def parts():
    """Six batches as the official ones, sparse so that they pack quickly."""
    made = []
    for seed in range(6):
        rows = np.zeros((cifar.PER_BATCH, cifar.RECORD), np.uint8)
        rows[:, :4] = records(cifar.PER_BATCH, seed)[:, :4]
        rows[:, -1] = seed
        made.append(rows)
    return made


def test_a_record_by_hand(tmp_path):
    """An independent anchor: label, then the red, green and blue planes by rows."""
    row = bytes([7]) + bytes([1] * 1024) + bytes([2] * 1024) + bytes([3] * 1023) + bytes([99])
    (tmp_path / "b.bin").write_bytes(row)
    x, y = np.zeros((5, 3, 32, 32), np.uint8), np.zeros(5, np.uint8)
    assert cifar.batch(tmp_path / "b.bin", x, y, "") == 1
    assert y[0] == 7
    assert [x[0, channel, 0, 0] for channel in range(3)] == [1, 2, 3]
    assert x[0, 2, 31, 31] == 99
    assert not x[1:].any()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("ending", ["bin", "bin.gz"])
def test_the_number_of_records_follows_from_the_size(tmp_path, count, ending):
    rows = records(count, count)
    path = tmp_path / f"b.{ending}"
    path.write_bytes(gzip.compress(rows.tobytes(), 1) if ending.endswith("gz") else rows.tobytes())
    x, y = np.empty((700, 3, 32, 32), np.uint8), np.empty(700, np.uint8)
    assert cifar.batch(path, x, y, "") == count
    np.testing.assert_array_equal(y[:count], rows[:, 0])
    np.testing.assert_array_equal(x[:count].reshape(count, -1), rows[:, 1:])


def test_damaged_batches_are_named(tmp_path):
    path, rows = tmp_path / "b.bin", records(3, 0)
    x, y = np.empty((5, 3, 32, 32), np.uint8), np.empty(5, np.uint8)
    path.write_bytes(rows.tobytes()[:-1])
    with pytest.raises(UserError, match=r"b\.bin is truncated, it breaks off inside record 2: fetch me\."):
        cifar.batch(path, x, y, "fetch me")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.bin is empty"):
        cifar.batch(path, x, y, "")
    path.write_bytes(records(6, 0).tobytes())
    with pytest.raises(UserError, match="3,073 bytes too many"):
        cifar.batch(path, x, y, "")
    rows[1, 0] = 10
    path.write_bytes(rows.tobytes())
    with pytest.raises(UserError, match=r"holds the label 10 .* only 0 to 9 exist"):
        cifar.batch(path, x, y, "")
    path.write_bytes(gzip.compress(rows.tobytes())[:-9])
    with pytest.raises(UserError, match="gzip stream breaks off"):
        cifar.batch(path, x, y, "")


def test_the_archive_is_read_in_the_official_order_once_and_checked(tmp_path, parts):
    path = tmp_path / cifar.ARCHIVE
    digest = pack(path, parts)
    tracemalloc.start()
    (x, y), (test_x, test_y) = cifar.archive(path, digest, "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 60000 * cifar.RECORD  # measured 1.02
    np.testing.assert_array_equal(y, np.concatenate([part[:, 0] for part in parts[:5]]))
    np.testing.assert_array_equal(test_y, parts[5][:, 0])
    np.testing.assert_array_equal(x[::1000, 2, 31, 31], np.repeat(np.arange(5), 10))
    np.testing.assert_array_equal(x[12345].reshape(-1), parts[1][2345, 1:])
    assert (test_x[:, 2, 31, 31] == 5).all()
    with pytest.raises(UserError, match="wrong checksum"):
        cifar.archive(path, "0" * 64, "")
    (tmp_path / "short.tar.gz").write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"short\.tar\.gz (is truncated|is a damaged)"):
        cifar.archive(tmp_path / "short.tar.gz", digest, "")


def test_archives_with_a_missing_short_or_escaping_batch(tmp_path, parts):
    path = tmp_path / cifar.ARCHIVE
    with pytest.raises(UserError, match=r"does not hold test_batch\.bin"):
        cifar.archive(path, pack(path, parts, skip=("test_batch.bin",)), "")
    with pytest.raises(UserError, match=r"data_batch_3.bin of 30,730 bytes, expected one of 30,730,000"):
        cifar.archive(path, pack(path, [*parts[:2], parts[2][:10], *parts[3:]]), "")
    with pytest.raises(UserError, match="points outside"):
        cifar.archive(path, pack(path, parts, rename={"data_batch_2.bin": "../data_batch_2.bin"}), "")


def test_unpacked_batches_through_the_public_door(empty_home, parts):
    folder = empty_home / "cifar10" / cifar.FOLDER
    folder.mkdir(parents=True)
    for name, part in zip(cifar.BATCHES, parts):
        (folder / name).write_bytes(part.tobytes())
    read = data.images("cifar10")
    assert (len(read.train), len(read.validation), len(read.test)) == (45000, 5000, 10000)
    assert "no checksum is published" in read.source
    y = np.concatenate([part[:, 0] for part in parts[:5]])
    for indices, split in zip(held_back(y), (read.train, read.validation)):
        np.testing.assert_array_equal(split.y.numpy(), y[indices])
        np.testing.assert_array_equal(split.x[:, 2, 31, 31].numpy(), indices // cifar.PER_BATCH)
    states = [row["state"] for row in data.check("cifar10")]
    assert states == ["missing", *["differs"] * 6]
    (folder / "data_batch_2.bin").write_bytes(parts[1][:100].tobytes())
    with pytest.raises(UserError, match=r"data_batch_2.bin holds 100 of 10,000 records: run .*cifar10_partial"):
        data.images("cifar10")
    (folder / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"where test_batch.bin is missing: run .*--data cifar10_partial"):
        data.images("cifar10")
    part = data.images("cifar10_partial")
    assert len(part.train) + len(part.validation) + len(part.test) == 40100
    assert "data_batch_2.bin (100 of 10,000 records)" in part.source
    rows = {row["file"]: row for row in data.check("cifar10_partial")}
    assert rows[f"{cifar.FOLDER}/data_batch_2.bin"]["state"] == "partial"
    assert rows[f"{cifar.FOLDER}/data_batch_3.bin"]["state"] == "differs"


def test_lossy_archive_faults(tmp_path):
    def build(members):
        with tarfile.open(tmp_path / cifar.JPEG, "w:gz") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return tmp_path / cifar.JPEG

    def jpeg(side):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), "red").save(buffer, "JPEG")
        return buffer.getvalue()

    good = ("train/cat/0007.jpg", jpeg(32))
    with pytest.raises(UserError, match=r"lacks 49,999 of 50,000 train images: fetch\."):
        cifar.jpeg(build([good]), "fetch")
    with pytest.raises(UserError, match=r"'train/cat/0008.jpg', which cannot be decoded"):
        cifar.jpeg(build([good, ("train/cat/0008.jpg", jpeg(32)[:200])]), "fetch")
    with pytest.raises(UserError, match=r"'train/cat/0008.jpg' of 33×33 pixels, not 32×32"):
        cifar.jpeg(build([("train/cat/0008.jpg", jpeg(33))]), "fetch")
    for name in ("train/dragon/0001.jpg", "train/cat/5000.jpg", "test/cat/1000.jpg", "readme.txt"):
        with pytest.raises(UserError, match=f"'{name}', which is no image of CIFAR-10"):
            cifar.jpeg(build([good, (name, jpeg(32))]), "fetch")


def test_real_first_batch(real):
    """The first 4,000 records: labels known from the official set (frog, truck, truck, deer, automobile, …)."""
    real("cifar10/cifar-10-batches-bin/data_batch_1.bin.gz")
    part = data.images("cifar10_partial")
    x, labels, _ = cifar.partial(data.home() / "cifar10", "")
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert x.shape == (4000, 3, 32, 32)
    assert set(labels.tolist()) == set(range(10))
    assert (len(part.train), len(part.validation), len(part.test)) == (2880, 320, 800)
    splits = (part.train, part.validation, part.test)
    y = np.concatenate([split.y for split in splits])
    np.testing.assert_array_equal(np.bincount(y), np.bincount(labels))
    assert np.bincount(part.test.y).min() >= 70  # stratified
    assert len({image.tobytes() for split in splits for image in split.x.numpy()}) == 4000  # none occurs twice
