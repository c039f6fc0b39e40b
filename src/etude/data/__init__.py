"""Datasets: bundled digits and photographs, MNIST and its kin, CIFAR-10, Omniglot, texts, translations, the user's own.

They lie in `ETUDE_DATA` (default `~/.cache/etude/data`), one folder a dataset, under their official file names.
`images`, `text`, `characters`, `parallel` and `photographs` read; `get` fetches over HTTPS with pinned SHA-256; `check` says what
is there and what is wrong with it; `catalogue` describes everything known. Importing this package imports neither torch
nor numpy. Every fault of the data is a `UserError`: one sentence naming the file and what to do.

The checksum of a packed file is taken while it is unpacked, so checking costs no second pass: for MNIST's 11.6 MB it is
10 ms of 350 ms (measured, one core with SHA instructions).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.core.errors import UserError, nearest
from etude.data.registry import BY_NAME, DATASETS, Dataset
from etude.data.sets import Characters, CharacterSet, Images, Parallel, Split, Text

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CharacterSet",
    "Characters",
    "Images",
    "Parallel",
    "Split",
    "Text",
    "catalogue",
    "characters",
    "check",
    "get",
    "home",
    "images",
    "names",
    "parallel",
    "photographs",
    "text",
]


def home() -> Path:
    """The folder of the datasets: `ETUDE_DATA`, or `~/.cache/etude/data` when that is unset or empty."""
    return Path(os.environ.get("ETUDE_DATA") or "~/.cache/etude/data").expanduser()


def names(kind: str | None = None) -> list[str]:
    """Names of all datasets, or of one kind: "images", "text", "characters" or "parallel"."""
    return [dataset.name for dataset in DATASETS if kind in (None, dataset.kind)]


def images(name: str | os.PathLike[str], size: int | None = None) -> Images:
    """Read a dataset of labelled images, or a folder of class-named image folders.

    Returns three splits, `train`, `validation` and `test`, each with `x` uint8 (N, C, H, W) and `y` int64 (N,), and `spec`
    with shape, class names, and the training split's mean and standard deviation per channel in [0, 1] units. A
    registered dataset gives a stratified tenth of its training images, always the same ones, to validation. With `size`,
    images are resized (bilinear, averaging when shrinking) to size × size. A registered name wins over a folder of that
    name; write `./name` for the folder. A folder whose images would fill half of the memory stays on the disk
    (`etude.data.streamed`). Raises `UserError` naming the file and what to do.
    """
    from etude.data.sets import assemble

    if size is not None and size < 1:
        raise UserError(f"The image size must be at least 1 pixel, not {size}.")
    dataset = _find(name, "images")
    if dataset is None:
        from etude.data import folders, streamed

        path = Path(name).expanduser()
        if streamed.too_large(path, size):
            return streamed.images(str(name), path, size)
        read = folders.read(path, size)
        return assemble(str(name), read.train, read.test, read.classes, None, read.source, read.validation)
    train, test, source = _arrays(dataset)
    return assemble(dataset.name, train, test, dataset.classes, size, source)


def text(name: str | os.PathLike[str]) -> Text:
    """Read a text by name (`house_text`, `tiny_shakespeare`) or any UTF-8 text file, plain or gzip.

    Raises `UserError` when the name is unknown and no such file exists, or the file is empty or not UTF-8.
    """
    from etude.data import texts

    dataset = _find(name, "text")
    if dataset is None:
        path = Path(name).expanduser()
        return Text(texts.read(path, "name a text file that can be read"), path.name, str(path))
    if dataset.bundled:
        return Text(texts.house(), dataset.name, "bundled with etude")
    (file,) = dataset.files
    path = _folder(dataset) / file.path
    return Text(texts.read(path, _remedy(dataset), file.sha256), dataset.name, str(path))


def characters(name: str = "omniglot", size: int | None = None) -> Characters:
    """Read Omniglot: 964 background and 659 evaluation classes, uint8 (classes, 20, 105, 105), ink 255 on 0.

    With `size` the drawings are reduced while they are read, so memory for the large originals (358 MB) is never used.
    The alphabets of the two sets do not overlap. Raises `UserError` naming the file and what to do.
    """
    import torch

    from etude.data import omniglot

    if size is not None and size < 1:
        raise UserError(f"The image size must be at least 1 pixel, not {size}.")
    dataset = _find(name, "characters")
    if dataset is None:
        raise UserError(f"{name} is a folder, but characters are read from a known dataset only: use omniglot.")
    folder = _folder(dataset)
    counts = (dataset.train, dataset.test)
    read = [
        omniglot.read(folder / file.path, count, file.sha256, size, _remedy(dataset))
        for file, count in zip(dataset.files, counts)
    ]
    if shared := set(read[0].alphabets) & set(read[1].alphabets):
        raise UserError(
            f"{folder} holds the alphabet {min(shared)} in both archives, so evaluation classes were seen in training: "
            f"{_remedy(dataset)}."
        )
    background, evaluation = (CharacterSet(torch.from_numpy(part.x), part.alphabets, part.names) for part in read)
    changed = [file.path for file, part in zip(dataset.files, read) if not part.official]
    source = f"{folder} ({', '.join(changed)}: readable, not the official bytes)" if changed else str(folder)
    return Characters(dataset.name, background, evaluation, source)


def parallel(name: str | os.PathLike[str], languages: tuple[str, str] = ("en", "de")) -> Parallel:
    """Read parallel text, Multi30k (en, de, fr) or a folder of files that end in the languages' names, line by line.

    Returns pairs (source, target) in three parts: `train`, `validation` and `test`. A pair with an empty side is left out.
    See `etude.data.bitext.read` for the names of a folder's files. Raises `UserError` naming the file and what to do.
    """
    from etude.data import bitext

    dataset = _find(name, "parallel")
    if dataset is None:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise UserError(f"{path} is a file, but parallel text is a folder of one file in each language.")
        return bitext.read(path, languages, path.resolve().name)
    known = sorted({file.path.split(".")[1] for file in dataset.files})
    for language in languages:
        if language not in known:
            raise UserError(f"{dataset.name} has no language '{language}': choose from {', '.join(known)}.")
    digests = {file.path: file.sha256 for file in dataset.files}
    return bitext.read(_folder(dataset), languages, dataset.name, _remedy(dataset), digests)


def photographs() -> dict[str, np.ndarray]:
    """The two photographs that scikit-learn bundles: {"china", "flower"}, uint8 RGB (427, 640, 3).

    Both CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion (Flickr).
    """
    from etude.data import bundled

    return bundled.photographs()


def get(
    names: Iterable[str] | str,
    base: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, str]]:
    """Fetch the official files of the named datasets into `home()`, which is created if need be.

    Files that are already official stay; others are replaced once the new one is whole and its SHA-256 agrees. `base`
    is a mirror laid out as `<base>/<dataset>/<file>` (https, or http on this machine). `progress` is called with (file
    name, bytes so far, bytes in all). Returns rows {dataset, file, state, detail}. Raises `UserError` when a name is
    unknown, an address does not answer, or a checksum differs; nothing half-written is left.
    """
    from etude.data import fetch

    rows = []
    for dataset in _known(names):
        rows += fetch.get(dataset, home() / (dataset.folder or dataset.name), base, progress)
    return rows


def check(names: Iterable[str] | str | None = None) -> list[dict[str, str]]:
    """Verify the files of the named datasets (default: all that are there): rows {dataset, file, state, detail}.

    States: "official", "differs" (readable, other bytes than the official file), "partial" (readable, not whole),
    "damaged", "missing", "bundled". Raises `UserError` when a name is unknown or `ETUDE_DATA` points nowhere.
    """
    from etude.data import fetch

    chosen = _known(names) if names else [dataset for dataset in DATASETS if _present(dataset)]
    return [row for dataset in chosen for row in fetch.check(dataset, _folder(dataset))]


def catalogue() -> list[dict[str, Any]]:
    """Describe every dataset, JSON-able, without opening a file.

    Keys: name, state ("bundled", "here", "other" when sizes differ from the official files, "partly", "missing"), kind,
    title, train, test, shape, classes, bytes, licence, citation, home, note, folder.
    """
    rows = []
    for dataset in DATASETS:
        folder = home() / (dataset.folder or dataset.name)
        rows.append(
            {
                "name": dataset.name,
                "state": _state(dataset, folder),
                "kind": dataset.kind,
                "title": dataset.title,
                "train": dataset.train,
                "test": dataset.test,
                "shape": list(dataset.shape),
                "classes": list(dataset.classes),
                "bytes": sum(file.bytes for file in dataset.files),
                "licence": dataset.licence,
                "citation": dataset.citation,
                "home": dataset.home,
                "note": dataset.note,
                "folder": "" if dataset.bundled else str(folder),
            }
        )
    return rows


def _state(dataset: Dataset, folder: Path) -> str:
    if dataset.bundled:
        return "bundled"
    if dataset.name == "cifar10_jpeg":
        return "here" if (folder / "cifar-10-images-jpeg-q75.tar.gz").exists() else "missing"
    loose = list(folder.glob("cifar-10-batches-bin/*_batch*.bin*"))
    if dataset.name == "cifar10_partial":
        return "here" if loose else "missing"
    found = [folder / file.path for file in dataset.files]
    there = [path.exists() or (path.suffix == ".gz" and path.with_suffix("").exists()) for path in found]
    if all(there):
        sizes = [path.exists() and path.stat().st_size == file.bytes for path, file in zip(found, dataset.files)]
        return "here" if all(sizes) else "other"
    if dataset.name == "cifar10" and len(loose) == 6:
        return "other"
    return "partly" if any(there) or loose else "missing"


def _present(dataset: Dataset) -> bool:
    state = _state(dataset, _folder(dataset))
    return state != "missing" and (dataset.name, state) != ("cifar10", "partly")  # that one is cifar10_partial


def _known(names: Iterable[str] | str) -> list[Dataset]:
    found = []
    for name in [names] if isinstance(names, str) else names:
        if name not in BY_NAME:
            raise UserError(f"There is no dataset '{name}'{_nearest(name)} Known: {', '.join(BY_NAME)}.")
        found.append(BY_NAME[name])
    return found


def _nearest(name: str) -> str:
    return nearest(name, BY_NAME) or "."


def _find(name: str | os.PathLike[str], kind: str) -> Dataset | None:
    """The dataset of that name and kind; None when `name` is a path that exists."""
    name = os.fspath(name)
    dataset = BY_NAME.get(name)
    if dataset is not None:
        if dataset.kind != kind:
            raise UserError(
                f"The dataset {name} holds {dataset.kind}, not {kind}: choose from {', '.join(names(kind))}."
            )
        return dataset
    path = Path(name).expanduser()
    try:
        if name and path.exists():
            return None
    except (OSError, ValueError):  # a name too long, a null byte, a folder that may not be looked into
        pass
    own = {
        "images": " or a folder of class-named image folders",
        "text": " or a text file",
        "parallel": " or a folder",
    }.get(kind, "")
    if os.sep in name or "/" in name or name.startswith((".", "~")):
        raise UserError(f"The path {name} does not exist: name a dataset ({', '.join(names(kind))}){own}.")
    raise UserError(f"There is no dataset '{name}'{_nearest(name)} Known: {', '.join(names(kind))}{own}.")


def _remedy(dataset: Dataset) -> str:
    from etude.data.fetch import remedy

    return remedy(dataset)


def _folder(dataset: Dataset) -> Path:
    """The dataset's folder; the variable that says where must be right when it is set."""
    root = home()
    if os.environ.get("ETUDE_DATA") and not dataset.bundled and not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"ETUDE_DATA is set to {root}, which {what}: correct it, unset it (then ~/.cache/etude/data is used), "
            f"or run `etude data get {dataset.folder or dataset.name}` to create it."
        )
    return root / (dataset.folder or dataset.name)


def _arrays(dataset: Dataset) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], str]:
    """(train, test, source) of a registered image dataset."""
    import numpy as np

    remedy = _remedy(dataset)
    if dataset.bundled:
        from etude.data import bundled

        x, y, test_x, test_y = bundled.digits()
        return (x, y), (test_x, test_y), "bundled with scikit-learn"
    folder = _folder(dataset)
    if dataset.name == "cifar10":
        from etude.data import cifar

        return cifar.official(folder, dataset.files[0].sha256, remedy)
    if dataset.name == "cifar10_jpeg":
        from etude.data import cifar

        path = folder / cifar.JPEG
        return *cifar.jpeg(path, remedy), f"{path} (lossy)"
    if dataset.name == "cifar10_partial":
        from etude.data import cifar
        from etude.data.sets import stratified

        x, y, source = cifar.partial(folder, remedy)
        train, test = stratified(y, len(y) // 5)
        return (x[train], y[train]), (x[test], y[test]), f"{source}; every fifth record tests"
    from etude.data import idx

    digests = {file.path: file.sha256 for file in dataset.files}
    paths = []
    for file in dataset.files:
        packed, plain = folder / file.path, folder / file.path.removesuffix(".gz")
        paths.append(plain if plain.exists() and not packed.exists() else packed)
    train = idx.labelled(paths[0], paths[1], len(dataset.classes), digests, remedy)
    test = idx.labelled(paths[2], paths[3], len(dataset.classes), digests, remedy)
    unpacked = [path.name for path in paths if path.suffix != ".gz"]
    source = f"{folder} ({', '.join(unpacked)}: unpacked, no checksum pinned)" if unpacked else str(folder)
    return (train[0][:, np.newaxis], train[1]), (test[0][:, np.newaxis], test[1]), source
