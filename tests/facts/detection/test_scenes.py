"""Canvases, and boxes read from files in VOC, COCO and YOLO form."""

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.detection.parts.scenes import flipped, scattered, scenes


def test_a_box_is_the_tightest_around_its_object():
    x = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 1:7, 2:6] = 255
    part = scattered(x, torch.arange(5), 40, 64, 1, 0)
    assert (part.labels >= 0).all()
    for n in range(40):
        x1, y1, x2, y2 = part.boxes[n, 0].int().tolist()
        bright = part.x[n, 0] >= 48
        assert bright[y1:y2, x1:x2].any(0).all()
        assert bright[y1:y2, x1:x2].any(1).all()
        bright[y1:y2, x1:x2] = False
        assert not bright.any()
    assert part.boxes[:, 0, :2].std(0).min() > 5  # places differ


def test_canvases_are_the_same_every_time_and_hold_one_to_three_objects():
    one, two = scenes("digits", 48, 30), scenes("digits", 48, 30)
    for part in ("train", "validation", "test"):
        a, b = getattr(one, part), getattr(two, part)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.boxes, b.boxes)
        counts = (a.labels >= 0).sum(1)
        assert counts.min() >= 1
        assert counts.max() <= 3
    assert (len(one.train), len(one.validation), len(one.test)) == (30, 8, 8)
    assert not torch.equal(one.train.x[:8], one.test.x)
    assert set((scenes("digits", 48, 30).train.labels >= 0).sum(1).tolist()) == {1, 2, 3}


def test_mirroring_moves_boxes_with_their_objects():
    part = scenes("digits", 48, 16).train
    turned = flipped(part, torch.Generator().manual_seed(0))
    changed = (turned.x != part.x).flatten(1).any(1)
    assert changed.any()
    assert not changed.all()
    assert torch.equal(turned.x[changed], part.x[changed].flip(-1))
    real = part.labels >= 0
    for n in torch.arange(16).tolist():
        for box, own in zip(turned.boxes[n][real[n]], part.boxes[n][real[n]]):
            if changed[n]:
                assert box.tolist() == [48 - own[2], own[1], 48 - own[0], own[3]]
            else:
                assert torch.equal(box, own)


def picture(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[4:10, 8:20] = 255
    Image.fromarray(pixels).save(path)


def xml(*objects):
    rows = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, hard, x1, y1, x2, y2 in objects
    )
    return f"<annotation>{rows}</annotation>"


def voc(folder, splits=True):
    for n, part in enumerate(("train", "train", "val", "test")):
        picture(folder / f"JPEGImages/p{n}.png")
        objects = [("cat", n % 2, 9, 5, 20, 10)] + ([("dog", 0, 5, 5, 5, 9)] if n == 0 else [])
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / f"Annotations/p{n}.xml").write_text(xml(*objects))
        if splits:
            (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
            with (folder / f"ImageSets/Main/{part}.txt").open("a") as file:
                file.write(f"p{n}\n")


def the_white_block(found):
    """Every picture's box is the white block of `picture`, warped to 40 × 40."""
    for part in (found.train, found.validation, found.test):
        for x, boxes, labels in zip(part.x, part.boxes, part.labels):
            assert boxes[labels >= 0].tolist() == [[8, 8, 20, 20]]
            assert (x[:, 9:19, 9:19] > 200).all()
            assert (x[:, :6] < 60).all()


def test_voc_counts_from_one_and_leaves_out_boxes_without_area(tmp_path):
    voc(tmp_path / "own")
    found = scenes(str(tmp_path / "own"), 40)
    assert (len(found.train), len(found.validation), len(found.test)) == (2, 1, 1)
    assert found.spec.classes == ("cat", "dog")
    assert found.dropped == 1
    assert "1 boxes without an area" in found.about()["source"]
    assert found.train.difficult[:, 0].tolist() == [False, True]
    the_white_block(found)
    with tarfile.open(tmp_path / "own.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "own", "VOC")
    packed = scenes(str(tmp_path / "own.tar.gz"), 40)
    assert torch.equal(packed.train.x, found.train.x)
    assert torch.equal(packed.train.boxes, found.train.boxes)


def test_coco(tmp_path):
    for part in ("train", "val", "test"):
        images = [{"id": 7, "file_name": f"{part}.png", "width": 40, "height": 20}]
        picture(tmp_path / f"{part}/{part}.png")
        told = {"images": images, "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]}
        told["annotations"] = [{"image_id": 7, "category_id": 3, "bbox": [8, 4, 12, 6], "iscrowd": 0}]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{part}.json").write_text(json.dumps(told))
        del told["categories"]
        (tmp_path / f"annotations/captions_{part}.json").write_text(json.dumps(told))  # as the official folder has them
    (tmp_path / "settings.json").write_text("[1, 2]")
    found = scenes(str(tmp_path), 40)
    assert found.spec.classes == ("dog", "cat")
    assert found.test.labels.tolist() == [[1]]
    the_white_block(found)


def coco(folder, name, picture_name, kind="dog"):
    told = {"images": [{"id": 1, "file_name": picture_name}], "categories": [{"id": 3, "name": kind}]}
    told["annotations"] = [{"image_id": 1, "category_id": 3, "bbox": [8, 4, 12, 6]}]
    (folder / name).write_text(json.dumps(told))


def test_coco_files_that_name_a_picture_twice(tmp_path):
    """Key points name the pictures of the instances again; a picture in two parts, or a number of two classes, is refused."""
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    for part, name in (("train", "a.png"), ("val", "b.png"), ("test", "c.png")):
        coco(tmp_path, f"instances_{part}.json", name)
        coco(tmp_path, f"person_keypoints_{part}.json", name)
    found = scenes(str(tmp_path), 40)
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [1, 1, 1]
    coco(tmp_path, "instances_val.json", "a.png")
    with pytest.raises(UserError, match="names already: a picture has one part"):
        scenes(str(tmp_path), 40)
    (tmp_path / "instances_val.json").write_text('{"images": [], "annotation": [], "categories": []}')
    with pytest.raises(UserError, match=r"instances_val.json is no COCO annotation \(KeyError: 'annotations'"):
        scenes(str(tmp_path), 40)
    coco(tmp_path, "instances_val.json", "b.png", "zebra")
    with pytest.raises(UserError, match="calls category 3 'zebra', and another file 'dog'"):
        scenes(str(tmp_path), 40)


def test_a_folder_with_other_json_files_only_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="no .json file with images, annotations and categories"):
        scenes(str(tmp_path), 40)


def test_yolo_text_and_splits_of_our_own(tmp_path):
    for n in range(20):
        picture(tmp_path / f"images/p{n}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / f"labels/p{n}.txt").write_text(f"1 {14 / 40} {7 / 20} {12 / 40} {6 / 20}\n")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    found = scenes(str(tmp_path), 40)
    assert (len(found.train), len(found.validation), len(found.test)) == (14, 2, 4)
    assert set(found.train.labels.flatten().tolist()) == {1}
    for part in (found.train, found.validation, found.test):
        torch.testing.assert_close(part.boxes[:, 0], torch.tensor([8.0, 8, 20, 20]).expand(len(part), 4))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("text", "not a class number and four numbers"),
        ("class", "class 5, and classes.txt names 1"),
        ("picture", "cannot be read"),
        ("none", "no object in any"),
        ("nothing", "holds no boxes"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(what, said, tmp_path):
    if what != "nothing":
        for n in range(4):
            picture(tmp_path / f"images/p{n}.png")
            line = {"text": "0 1 2\n", "class": "5 .5 .5 .1 .1\n", "none": ""}.get(what, "0 .5 .5 .1 .1\n")
            (tmp_path / "labels").mkdir(exist_ok=True)
            (tmp_path / f"labels/p{n}.txt").write_text(line)
        if what != "none":
            (tmp_path / "classes.txt").write_text("cat\n")
        if what == "picture":
            (tmp_path / "images/p1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=said):
        scenes(str(tmp_path), 40)


def own_boxes(folder, count=10):
    """A folder in YOLO form, the white block of `picture` in each."""
    for n in range(count):
        picture(folder / f"images/p{n}.png")
        (folder / "labels").mkdir(exist_ok=True)
        (folder / f"labels/p{n}.txt").write_text(f"0 {14 / 40} {7 / 20} {12 / 40} {6 / 20}\n")
    (folder / "classes.txt").write_text("cat\n")


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_picture_of_any_kind_shows_its_block(kind, tmp_path):
    own_boxes(tmp_path)
    for path in (tmp_path / "images").iterdir():
        grey = np.asarray(Image.open(path).convert("L"))
        if kind == "I;16":
            Image.fromarray(grey.astype(np.uint16) * 257 // 2 + 16384).save(path)  # half of it is not white
        elif kind == "RGBA":  # black, and clear where the block is, which shows white
            Image.merge("RGBA", [*[Image.new("L", (40, 20))] * 3, Image.fromarray(255 - grey)]).save(path)
        else:
            Image.fromarray(grey).convert(kind).save(path)
    found = scenes(str(tmp_path), 40)
    assert found.spec.shape[0] == (1 if kind in ("1", "L", "LA", "I;16") else 3)
    inside, outside = found.test.x[:, :, 10:18, 10:18].float(), found.test.x[:, :, :6].float()
    assert inside.min() > 180
    assert outside.max() < 70


def test_pictures_are_grey_only_where_all_of_them_are(tmp_path):
    own_boxes(tmp_path)
    for n in range(9):
        path = tmp_path / f"images/p{n}.png"
        Image.open(path).convert("L").save(path)
    assert scenes(str(tmp_path), 40).spec.shape == (3, 40, 40)


def test_coco_pictures_of_one_name_are_told_apart_by_their_folders(tmp_path):
    images, boxes = [], []
    for n in range(12):
        folder, side = ("left", 0) if n % 2 else ("right", 20)
        path = tmp_path / f"{folder}/{n // 2}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[4:10, side + 2 : side + 14] = 255
        Image.fromarray(pixels).save(path)
        images.append({"id": n, "file_name": f"{folder}/{n // 2}.png"})
        boxes.append({"image_id": n, "category_id": 1, "bbox": [side + 2, 4, 12, 6]})
    told = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "all.json").write_text(json.dumps(told))
    found = scenes(str(tmp_path), 40)
    for part in (found.train, found.validation, found.test):
        for x, (x1, y1, x2, y2) in zip(part.x, part.boxes[:, 0].int().tolist()):
            assert x[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
    images[0]["file_name"] = "0.png"
    (tmp_path / "all.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"names the picture 0\.png, and there are 2 of that name"):
        scenes(str(tmp_path), 40)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("labels/p1.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("classes.txt", b"\xff\xfe", "cannot be read as text"),
        ("classes.txt", b"cat\ncat\n", "two classes of the name 'cat'"),
        ("labels/p1.txt", b"0 20 10 8 8\n", "lies outside the picture"),
        ("images/p1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(file, content, said, tmp_path):
    own_boxes(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        scenes(str(tmp_path), 40)


def test_a_split_without_an_object_is_refused(tmp_path):
    own_boxes(tmp_path)
    for path in (tmp_path / "labels").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="no object in any"):
        scenes(str(tmp_path), 40)
    voc(tmp_path / "own")
    (tmp_path / "own/Annotations/p3.xml").write_text(xml())
    with pytest.raises(UserError, match="no box with an area in its test split"):
        scenes(str(tmp_path / "own"), 40)


def test_a_split_names_only_what_is_there(tmp_path):
    voc(tmp_path)
    with (tmp_path / "ImageSets/Main/test.txt").open("a") as file:
        file.write("p9\n")
    with pytest.raises(UserError, match=r"names p9, and there is no Annotations/p9\.xml"):
        scenes(str(tmp_path), 40)


@pytest.mark.parametrize(("key", "said"), [("image_id", "the image_id 99"), ("category_id", "the category_id 99")])
def test_coco_boxes_of_nothing_are_refused(key, said, tmp_path):
    picture(tmp_path / "p.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [8, 4, 12, 6]} | {key: 99}
    told = {"images": [{"id": 1, "file_name": "p.png"}], "categories": [{"id": 1, "name": "cat"}], "annotations": [box]}
    (tmp_path / "all.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=said):
        scenes(str(tmp_path), 40)


def test_other_names_are_refused():
    with pytest.raises(UserError, match="there is no 'digts'"):
        scenes("digts", 64)
    with pytest.raises(UserError, match="no room"):
        scenes("digits", 8)


@pytest.mark.skipif(not os.environ.get("ETUDE_DATA"), reason="ETUDE_DATA is unset")
@pytest.mark.long
def test_bccd_has_its_boxes():
    found = scenes("bccd", 64)
    assert (len(found.train), len(found.validation), len(found.test)) == (205, 87, 72)
    counts = sum(
        part.labels[part.labels >= 0].bincount(minlength=3) for part in (found.train, found.validation, found.test)
    )
    assert dict(zip(found.spec.classes, counts.tolist())) == {"Platelets": 361, "RBC": 4153, "WBC": 372}
    assert found.dropped == 2
