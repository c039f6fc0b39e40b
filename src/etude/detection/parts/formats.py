"""Boxes in other people's files: PASCAL VOC (a folder or a tar archive of one), COCO JSON, YOLO text

VOC: `Annotations/*.xml`, `JPEGImages/`, and, where there are splits, `ImageSets/Main/{train,val,test}.txt`. Its pixels count from
1 and its edges are inside, so the continuous box is (xmin − 1, ymin − 1, xmax, ymax).
COCO: one JSON file with `images`, `annotations` (bbox x, y, width, height; crowds are difficult) and `categories`, in the folder
or its `annotations/`; files named …train…, …val…, …test… are splits. The pictures lie in the folder or below it.
YOLO: `images/` and `labels/` with a text file a picture, a line an object: class, centre x, centre y, width, height as shares of
the picture; names of the classes in `classes.txt` (a line each). `images/{train,val,test}` are splits.

Where a split is missing it is cut by a hash of the file's name, a fifth for test and a tenth for validation. Boxes are cut
at the picture's edge; one without an area is left out and counted, everything else that is wrong is a sentence.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.data.folders import ENDINGS, FORMATS, GREY, plain

PARTS = {"train": "train", "val": "validation", "validation": "validation", "valid": "validation", "test": "test"}


@dataclass
class Annotated:
    """One split: pictures uint8 (N, C, S, S) and each picture's boxes (K, 4), labels (K,) and difficult flags (K,)."""

    x: np.ndarray
    boxes: list[np.ndarray]
    labels: list[list[int]]
    difficult: list[list[bool]]


@dataclass
class _Picture:
    name: str
    open: Callable[[], bytes]
    objects: list[tuple[str, tuple[float, float, float, float], bool]] = field(default_factory=list)
    """(class, box in pixels of the file, is difficult)"""
    part: str = ""
    shares: bool = False
    """The boxes are shares of the picture's sides."""


def read(path: Path, size: int) -> tuple[dict[str, Annotated], tuple[str, ...], str, int]:
    """Splits, class names, source and the number of boxes without an area that were left out. Raises UserError."""
    archive = path / "BCCD.tar.gz"
    if archive.is_file() or path.name.endswith((".tar", ".tar.gz", ".tgz")):
        pictures, classes, source = *_voc(_Tar(archive if archive.is_file() else path)), str(path)
    elif path.is_dir() and (path / "Annotations").is_dir():
        pictures, classes, source = *_voc(_Folder(path)), str(path)
    elif path.is_dir() and (path / "labels").is_dir() and (path / "images").is_dir():
        pictures, classes, source = *_yolo(path), str(path)
    elif path.suffix == ".json" or (path.is_dir() and _json_files(path)):
        pictures, classes, source = *_coco(path), str(path)
    else:
        what = "is not there" if not path.exists() else "holds no boxes that can be read"
        raise UserError(
            f"{path} {what}: give a folder with Annotations/ and JPEGImages/ (VOC), a COCO .json, or images/ and labels/ (YOLO)"
        )
    if len(pictures) < 3:
        raise UserError(f"{path} has {len(pictures)} pictures with boxes: at least three are needed, one a split")
    if not any(picture.objects for picture in pictures):
        raise UserError(f"{path} has pictures, and no object in any of them: there is nothing to learn")
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise UserError(f"{path} has two classes of the name '{twice[0]}': give each a name of its own")
    _divide(pictures)
    opened = {id(picture): _opened(picture, size) for picture in pictures}
    grey, dropped, splits = all(image.mode == "L" for image, _ in opened.values()), 0, {}
    for part in ("train", "validation", "test"):
        mine = [picture for picture in pictures if picture.part == part]
        if not mine:
            raise UserError(f"{path} has no picture in its {part} split: name at least one there")
        pixels, rows = [], Annotated(np.empty(0), [], [], [])
        for picture in mine:
            shown, (width, height) = opened.pop(id(picture))
            pixels.append(np.asarray(shown.convert("L" if grey else "RGB")).reshape(size, size, -1).transpose(2, 0, 1))
            kept, kinds, hard = _scaled(picture, width, height, size, classes)
            dropped += len(picture.objects) - len(kinds)
            rows.boxes.append(kept)
            rows.labels.append(kinds)
            rows.difficult.append(hard)
        if part != "validation" and not any(rows.labels):
            raise UserError(f"{path} has no box with an area in its {part} split: there is nothing to find")
        rows.x = np.ascontiguousarray(np.stack(pixels))
        splits[part] = rows
    return splits, classes, source, dropped


def _opened(picture: _Picture, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, L or RGB, warped to a square, and its own (width, height)."""
    try:
        with Image.open(io.BytesIO(picture.open()), formats=FORMATS) as image:
            sides, grey = image.size, image.mode.startswith("I;16") or image.mode in GREY
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a lower resolution where that is enough
            return plain(image, grey).resize((size, size), Image.Resampling.BILINEAR), sides
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"the image {picture.name} cannot be read ({error}): repair or remove it") from error


def _scaled(
    picture: _Picture, width: int, height: int, size: int, classes: tuple[str, ...]
) -> tuple[np.ndarray, list[int], list[bool]]:
    kept, kinds, hard = [], [], []
    for kind, corners, difficult in picture.objects:
        if not all(map(math.isfinite, corners)):
            raise UserError(f"{picture.name} has a box that is not finite: correct its annotation")
        x1, y1, x2, y2 = corners
        if not picture.shares:
            x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
        x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) * size for value in (x1, y1, x2, y2))
        if x2 > x1 and y2 > y1:
            kept.append((x1, y1, x2, y2))
            kinds.append(classes.index(kind))
            hard.append(difficult)
    return np.array(kept, np.float32).reshape(-1, 4), kinds, hard


def _divide(pictures: list[_Picture]) -> None:
    """Give every picture a split; what is missing is cut from the training pictures by a hash of their names."""

    def chance(picture: _Picture) -> int:
        return int.from_bytes(
            hashlib.sha256(Path(picture.name).name.encode("utf-8", "surrogateescape")).digest()[:8], "big"
        )

    given = {picture.part for picture in pictures} - {""}
    for picture in pictures:
        picture.part = picture.part or "train"
    for part, share in (("test", 0.2), ("validation", 0.1)):
        if part not in given:
            rest = sorted((p for p in pictures if p.part == "train"), key=chance)
            for picture in rest[: max(1, round(share * len(rest)))]:
                picture.part = part


# ---------------------------------------------------------------------------------------------------------------- VOC


class _Folder:
    """The files of a folder by their path below it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listed(self, under: str) -> list[str]:
        return sorted(f"{under}/{file.name}" for file in (self.path / under).iterdir() if file.is_file())

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror or error})") from error

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()


class _Tar(_Folder):
    """The files of a tar archive, held in memory, by their path below its one folder; nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.files: dict[str, bytes] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    opened = archive.extractfile(member) if member.isreg() else None
                    if opened is not None:
                        self.files[member.name.removeprefix("./").partition("/")[2]] = opened.read()
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{path} is a damaged archive ({error}): get it again") from error

    def listed(self, under: str) -> list[str]:
        return sorted(name for name in self.files if name.startswith(f"{under}/"))

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise UserError(f"{self.path} has no {name}")
        return self.files[name]

    def has(self, name: str) -> bool:
        return name in self.files


def _voc(files: _Folder) -> tuple[list[_Picture], tuple[str, ...]]:
    part_of: dict[str, str] = {}
    for part in ("train", "val", "test"):
        name = f"ImageSets/Main/{part}.txt"
        if files.has(name):
            for line in files.read(name).decode("utf-8", "replace").splitlines():
                if words := line.split():
                    part_of[words[0]] = PARTS[part]
    found: list[_Picture] = []
    unseen = set(part_of)
    for name in files.listed("Annotations"):
        stem = Path(name).stem
        if not name.endswith(".xml") or (part_of and stem not in part_of):
            continue
        unseen.discard(stem)
        where = f"{files.path}: {name}"
        try:
            tree = ET.fromstring(files.read(name))
        except ET.ParseError as error:
            raise UserError(f"{where} is no XML ({error}): repair or remove it") from error
        image = next(
            (
                f"JPEGImages/{stem}{end}"
                for end in (".jpg", ".jpeg", ".png", ".JPG")
                if files.has(f"JPEGImages/{stem}{end}")
            ),
            None,
        )
        if image is None:
            raise UserError(f"{where} has no picture JPEGImages/{stem}.jpg or .png beside it")
        picture = _Picture(image, lambda image=image: files.read(image), part=part_of.get(stem, ""))
        for thing in tree.iter("object"):
            kind, corners = (
                thing.findtext("name"),
                [thing.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")],
            )
            try:
                x1, y1, x2, y2 = (float(str(edge)) for edge in corners)
            except ValueError as error:
                raise UserError(f"{where} has an object whose box is not four numbers: correct it") from error
            if not kind:
                raise UserError(f"{where} has an object without a name: correct it")
            empty = x2 <= x1 or y2 <= y1
            box = (0.0, 0.0, 0.0, 0.0) if empty else (x1 - 1, y1 - 1, x2, y2)
            picture.objects.append((kind.strip(), box, (thing.findtext("difficult") or "0").strip() == "1"))
        found.append(picture)
    if unseen:
        raise UserError(
            f"{files.path}: ImageSets/Main names {min(unseen)}, and there is no Annotations/{min(unseen)}.xml"
        )
    return found, _names(found)


def _names(pictures: Iterable[_Picture]) -> tuple[str, ...]:
    return tuple(sorted({kind for picture in pictures for kind, _, _ in picture.objects}))


# --------------------------------------------------------------------------------------------------------------- COCO


def _json_files(path: Path) -> list[Path]:
    """Those named instances… where there are any: COCO's other files name the same pictures for other tasks."""
    found = sorted([*path.glob("*.json"), *path.glob("annotations/*.json")])
    return [file for file in found if file.name.startswith("instances")] or found


def _coco(path: Path) -> tuple[list[_Picture], tuple[str, ...]]:
    root = path if path.is_dir() else path.parent
    if root.name == "annotations":
        root = root.parent
    lying: dict[str, list[Path]] = {}
    for place in root.rglob("*"):
        if place.suffix.lower() in ENDINGS:
            lying.setdefault(place.name, []).append(place)
    found: list[_Picture] = []
    names: dict[int, str] = {}
    seen: dict[Path, Path] = {}
    for file in _json_files(path) if path.is_dir() else [path]:
        part = next((PARTS[word] for word in ("train", "val", "test") if word in file.stem.lower()), "")
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            told_all = isinstance(told, dict) and told.keys() >= {"images", "annotations", "categories"}
            if path.is_dir() and not told_all and not file.name.startswith("instances"):
                continue  # another file, such as COCO's captions
            for kind in told["categories"]:
                if names.setdefault(int(kind["id"]), str(kind["name"])) != str(kind["name"]):
                    was = names[int(kind["id"])]
                    raise UserError(f"{file} calls category {kind['id']} {kind['name']!r}, and another file {was!r}")
            pictures = {}
            for image in told["images"]:
                lies = _lying(lying, str(image["file_name"]), file, root)
                if lies in seen:
                    raise UserError(f"{file} names {lies}, which {seen[lies]} names already: a picture has one part")
                seen[lies] = file
                pictures[image["id"]] = _Picture(str(lies), lies.read_bytes, part=part)
            for thing in told["annotations"]:
                x, y, width, height = map(float, thing["bbox"])
                whole = (x, y, x + width, y + height)
                image, kind = thing["image_id"], int(thing["category_id"])
                if image not in pictures or kind not in names:
                    lacks = f"image_id {image}" if image not in pictures else f"category_id {kind}"
                    raise UserError(f"{file} has a box of the {lacks}, which it does not name: correct it")
                pictures[image].objects.append((names[kind], whole, bool(thing.get("iscrowd"))))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file} is no COCO annotation ({type(error).__name__}: {error}): correct it") from error
        found += pictures.values()
    if not names and path.is_dir():
        raise UserError(f"{path} has no .json file with images, annotations and categories, as COCO's have")
    return found, tuple(names[key] for key in sorted(names))


def _lying(lying: dict[str, list[Path]], name: str, file: Path, root: Path) -> Path:
    """The picture below `root` of that name; of several those whose folders agree with it the furthest, which must be one."""
    asked = Path(name).parts
    ranked: dict[int, list[Path]] = {}
    for path in lying.get(asked[-1] if asked else "", ()):
        pairs = zip(reversed(asked), reversed(path.parts))
        ranked.setdefault(next((n for n, (a, b) in enumerate(pairs) if a != b), len(asked)), []).append(path)
    best = ranked[max(ranked)] if ranked else []
    if len(best) != 1:
        where = "which is nowhere" if not best else f"and there are {len(best)} of that name"
        raise UserError(f"{file} names the picture {name}, {where} below {root}")
    return best[0]


# --------------------------------------------------------------------------------------------------------------- YOLO


def _yolo(path: Path) -> tuple[list[_Picture], tuple[str, ...]]:
    told = path / "classes.txt"
    names = _lines(told)
    names = [name.strip() for name in names if name.strip()]
    found: list[_Picture] = []
    for image in sorted(file for file in (path / "images").rglob("*") if file.suffix.lower() in ENDINGS):
        below = image.relative_to(path / "images")
        label = (path / "labels" / below).with_suffix(".txt")
        part = PARTS.get(below.parts[0].lower(), "") if len(below.parts) > 1 else ""
        picture = _Picture(str(image), image.read_bytes, part=part, shares=True)
        for number, line in enumerate(_lines(label), 1):
            if not line.strip():
                continue
            try:
                kind, x, y, width, height = line.split()
                place = int(kind)
                x, y, width, height = map(float, (x, y, width, height))
            except ValueError as error:
                raise UserError(f"{label}, line {number}: not a class number and four numbers: correct it") from error
            if place < 0 or (names and place >= len(names)):
                raise UserError(
                    f"{label}, line {number}: class {place}, and {told.name} names {len(names)}: correct it"
                )
            if not (abs(x) <= 1 and abs(y) <= 1) and math.isfinite(x + y):
                raise UserError(
                    f"{label}, line {number}: the centre {x:g}, {y:g} lies outside the picture: all four numbers are shares of "
                    "its sides, from 0 to 1"
                )
            name = names[place] if names else str(place)
            picture.objects.append((name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), False))
        found.append(picture)
    return found, tuple(names) or tuple(sorted(_names(found), key=int))


def _lines(path: Path) -> list[str]:
    """The lines of a text file, none where it is not there. Raises UserError for what is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8 ({error})") from error
