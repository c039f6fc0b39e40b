"""Read a folder of class-named image folders: the user's own data.

Two layouts: FOLDER/<class>/*.png with splits of our own, or FOLDER/train/<class>/* and FOLDER/test/<class>/*, with
FOLDER/val/<class>/* for validation where there is one (without `test`, `val` or `valid` is the test split). Splits of our
own depend on the file names alone: an image whose hashed name falls in the lowest fifth is a test image, one in the next
8 % (a tenth of the rest) validates, so adding images never moves the others. Beside a `test` folder, a tenth of `train`
validates in the same way. Every class has an image in each split that is cut here: where the hash gives it none, the
nearest one is taken, and only such an image moves when the class grows.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from etude.core.errors import UserError
from etude.data.sets import VALIDATION

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm"))
"""File name endings that are read as images; other files are counted and left alone."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What a file may hold whatever it is called; Pillow would start Ghostscript for a PostScript file."""
_VALIDATION_NAMES = ("val", "valid", "validation")
_TEST_NAMES = ("test", *_VALIDATION_NAMES)
GREY = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True, eq=False)
class Folder:
    """A read folder: uint8 images (N, C, H, W) and int64 labels (N,) of the three splits, class names, a description."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: tuple[str, ...]
    source: str


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of a folder, by split, with their labels; `classes` and `source` as in `Folder`."""

    train: list[tuple[Path, int]]
    validation: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    classes: tuple[str, ...]
    source: str

    @property
    def paths(self) -> list[Path]:
        """Of all splits, in this order."""
        return [path for part in (self.train, self.validation, self.test) for path, _ in part]


def read(folder: Path, size: int | None = None, seed: int = 0, share: float = 0.2) -> Folder:
    """Read every image below `folder`; `size` crops the middle square of each and resizes it to size × size.

    Images are grey (C = 1) when every file is, else RGB (C = 3); transparency is laid on white, and the orientation
    that a camera noted is applied. Raises `UserError` as `listing` does, for a broken image (named), and for sizes that
    differ without `size`.
    """
    found = listing(folder, seed, share)
    arrays = _decoded(found.paths, size, folder)
    rows = (found.train, found.validation, found.test)
    ends = np.cumsum([len(part) for part in rows])
    images = (arrays[end - len(part) : end] for end, part in zip(ends, rows))
    labels = (np.array([label for _, label in part], np.int64) for part in rows)
    train, validation, test = zip(images, labels)
    return Folder(train, validation, test, found.classes, found.source)


def listing(folder: Path, seed: int = 0, share: float = 0.2) -> Listing:
    """List every image below `folder`, without opening any; `seed` and `share` choose the split of our own.

    Raises `UserError` when the folder does not exist, has fewer than two classes, or a class with too few images to split.
    """
    if not folder.is_dir():
        raise UserError(
            f"The data folder {folder} {'is a file' if folder.exists() else 'does not exist'}: name a folder "
            "that holds one folder of images per class."
        )
    other = next((name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    ignored = 0
    parts: dict[str, dict[str, list[Path]]] = {"train": {}, "validation": {}, "test": {}}
    if other and (folder / "train").is_dir() and _folders(folder / "train"):
        held = next((name for name in _VALIDATION_NAMES if other == "test" and (folder / name).is_dir()), None)
        for part, name in (("train", "train"), ("validation", held), ("test", other)):
            if name is not None:
                parts[part], skipped = _listed(folder / name)
                ignored += skipped
                if strange := sorted(set(parts[part]) - set(parts["train"])):
                    raise UserError(
                        f"{folder / name} has the class '{strange[0]}', which {folder / 'train'} has not: "
                        "give both the same class folders."
                    )
        if held is None:
            _enough(folder / "train", parts["train"], ("training", "validation"))
            for name, paths in parts["train"].items():
                parts["train"][name], parts["validation"][name] = _divided(name, paths, seed, (0.0, VALIDATION))
        split = f"folders train, {held + ', ' if held else ''}and {other}" + (
            "" if held else "; a tenth of train validates"
        )
    else:
        both, ignored = _listed(folder)
        _enough(folder, both, ("training", "validation", "testing"))
        for name, paths in both.items():
            rest, parts["test"][name] = _divided(name, paths, seed, (0.0, share), leave=2)
            parts["train"][name], parts["validation"][name] = _divided(
                name, rest, seed, (share, share + (1 - share) * VALIDATION)
            )
        split = f"{share:.0%} of the file names for testing, {(1 - share) * VALIDATION:.0%} for validation"
    classes = tuple(sorted(parts["train"]))
    for name in classes:
        # bytes that are not UTF-8 come as lone surrogates, which no file can hold
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{folder} has the class folder {name!a}, which is not text in UTF-8: rename it.")
    if len(classes) < 2:
        raise UserError(
            f"{folder} has only the class '{classes[0]}': put the images of every class into a folder of "
            "its own, at least two."
        )
    rows = {
        part: [(path, classes.index(name)) for name in classes for path in paths.get(name, ())]
        for part, paths in parts.items()
    }
    source = f"{folder} ({split}{f'; {ignored} other files left alone' if ignored else ''})"
    return Listing(rows["train"], rows["validation"], rows["test"], classes, source)


def picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """One image file as a network that takes `shape`, (C, H, W), was shown its training images: uint8 (C, H, W).

    Upright, grey or RGB as the shape says; a square is cut from the middle and resized. Raises `UserError` naming the file.
    """
    channels, height, width = shape
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"The image {path} {what}: name a picture ({', '.join(sorted(ENDINGS)[:5])}, …).")
    image = plain(opened(path), channels == 1)
    if image.size != (width, height):
        if height != width:
            raise UserError(
                f"The image {path} is {image.width}×{image.height} pixels, and the network takes {width}×{height}: "
                "give one of that size."
            )
        image = _square(image, height)
    return np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _listed(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """Image paths of every class folder, sorted by name, and the number of files that are no images."""
    found: dict[str, list[Path]] = {}
    ignored = 0
    for part in _folders(folder):
        files = sorted(path for path in part.iterdir() if path.is_file() and not path.name.startswith("."))
        found[part.name] = [path for path in files if path.suffix.lower() in ENDINGS]
        ignored += len(files) - len(found[part.name])
    if not found or not any(found.values()):
        loose = sum(path.suffix.lower() in ENDINGS for path in folder.iterdir())
        raise UserError(
            f"{folder} has no images in class folders{f' ({loose} lie loose in it)' if loose else ''}: put "
            f"them into {folder / '<class name>'} by class."
        )
    return {name: paths for name, paths in found.items() if paths}, ignored


def _enough(folder: Path, found: dict[str, list[Path]], uses: tuple[str, ...]) -> None:
    """Raise UserError for a class that has fewer images than there are splits to be cut from it."""
    for name, paths in sorted(found.items()):
        if len(paths) < len(uses):
            raise UserError(
                f"{folder} has {len(paths)} image{'s' * (len(paths) > 1)} of the class '{name}': every class needs at "
                f"least {len(uses)}, one each for {', '.join(uses[:-1])} and {uses[-1]}."
            )


def _divided(
    name: str, paths: list[Path], seed: int, chances: tuple[float, float], leave: int = 1
) -> tuple[list[Path], list[Path]]:
    """Take out the files whose chance, a hash of (seed, class, file name), lies in [low, high): the rest, and those.

    At least one is taken and `leave` are left, of more than `leave` files.
    """
    low, high = chances

    def chance(path: Path) -> float:
        digest = hashlib.sha256(f"{seed}/{name}/{path.name}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    ranked = sorted(paths, key=lambda path: (chance(path) < low, chance(path), path.name))
    count = min(max(sum(low <= chance(path) < high for path in ranked), 1), len(ranked) - leave)
    return sorted(ranked[count:]), sorted(ranked[:count])


def opened(path: Path) -> Image.Image:
    """The decoded image, upright; every failure names the file."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # harmless metadata complaints
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        if path.suffix in (".npy", ".npz"):
            raise UserError(
                f"{path} is an array, no picture; in Python: etude.load(RUN).predict(numpy.load(…))"
            ) from error
        raise UserError(f"The image {path} cannot be read ({error}): repair or remove it.") from error


def _shape(path: Path) -> tuple[bool, tuple[int, int]]:
    """(is grey, (height, width) as shown) from the header alone."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
                width, height = image.size[::-1] if turned else image.size
                return image.mode.startswith("I;16") or image.mode in GREY, (height, width)
    except Exception as error:
        raise UserError(f"The image {path} cannot be read ({error}): repair or remove it.") from error


def _decoded(paths: list[Path], size: int | None, folder: Path) -> np.ndarray:
    """Decode all into one uint8 array (N, C, H, W): headers first, so that the array is allocated once."""
    out = np.empty((len(paths), *common_shape(paths, size, folder)), np.uint8)
    for row, path in enumerate(paths):
        out[row] = decoded(path, size, grey=out.shape[1] == 1)
    return out


def common_shape(paths: list[Path], size: int | None, folder: Path) -> tuple[int, int, int]:
    """(C, H, W) of the decoded images, from their headers alone. Raises `UserError` for sizes that differ without `size`."""
    shapes = [_shape(path) for path in paths]
    height, width = (size, size) if size else shapes[0][1]
    if not size:
        for path, (_, sides) in zip(paths, shapes):
            if sides != (height, width):
                raise UserError(
                    f"{path} is {sides[1]}×{sides[0]} pixels but {paths[0].name} is {width}×{height}: give one "
                    f"size for all images of {folder}."
                )
    return 1 if all(is_grey for is_grey, _ in shapes) else 3, height, width


def decoded(path: Path, size: int | None, grey: bool) -> np.ndarray:
    """One image file, upright, grey or RGB, with `size` its middle square resized: uint8 (C, H, W)."""
    image = plain(opened(path), grey)
    if size:
        image = _square(image, size)
    return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def plain(image: Image.Image, grey: bool) -> Image.Image:
    """8-bit grey or RGB; 16-bit grey is divided by 257 (Pillow alone would clip it), transparency is laid on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257.0).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("L" if grey else "RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Cut the middle square and resize it, bilinear with averaging when shrinking."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # not resize(box=…): that blends in what lies outside
    return square.resize((size, size), Image.Resampling.BILINEAR)
