"""Download the official files and check what is there.

A download goes to `<file>.<process>.part` in the same folder, is hashed while it is written, and takes its final name
only when every byte is right. So a file under its final name was whole when it came.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from etude.core.errors import UserError
from etude.data.registry import Dataset, File

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes so far, bytes in all) while a download runs."""

_OURS = ("localhost", "127.0.0.1", "::1")


def remedy(dataset: Dataset) -> str:
    """What to do when a file of the dataset is missing or damaged, as the end of a sentence."""
    if dataset.files:
        return f"run `etude data get {dataset.name}`, or point ETUDE_DATA at a folder that holds {dataset.name}/"
    where = dataset.folder
    return f"put a whole copy into {where}/ below ETUDE_DATA, or run `etude data get {where}` and use --data {where}"


def digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get(dataset: Dataset, folder: Path, base: str | None, progress: Progress | None) -> list[dict[str, str]]:
    """Fetch every file of the dataset that is missing or not official into `folder`; one row a file.

    `base` replaces the official home by a mirror laid out as `<base>/<dataset>/<file>`. Raises `UserError` when a file
    cannot be had or has the wrong checksum; what was there before is then still there.
    """
    if dataset.bundled:
        return [_row(dataset, "", "bundled", "comes with an installed package, nothing to fetch")]
    if not dataset.files:
        raise UserError(f"{dataset.name} cannot be downloaded: {remedy(dataset)}.")
    rows = []
    for file in dataset.files:
        target = folder / file.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            here = target.exists() and target.stat().st_size == file.bytes and digest(target) == file.sha256
            replaced = target.exists()
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error.strerror or error}): choose another ETUDE_DATA."
            ) from error
        if here:
            rows.append(_row(dataset, file.path, "official", "already there"))
            continue
        _download(file, f"{base.rstrip('/')}/{dataset.name}/{file.path}" if base else file.url, target, progress)
        rows.append(_row(dataset, file.path, "official", "replaced what was there" if replaced else "downloaded"))
    return rows


class _Part:
    """The file being written: counts, hashes, reports, and stops a server that sends more than announced."""

    def __init__(self, file: BinaryIO, expected: File, url: str, progress: Progress | None) -> None:
        self.file, self.expected, self.url, self.progress = file, expected, url, progress
        self.hash, self.count = hashlib.sha256(), 0

    def write(self, block: bytes) -> None:
        self.count += len(block)
        if self.count > self.expected.bytes:
            raise UserError(
                f"{self.url} sends more than the {self.expected.bytes:,} bytes of the official {self.expected.path}: "
                "nothing was kept, try again later or put the file there by hand."
            )
        self.hash.update(block)
        self.file.write(block)
        if self.progress is not None:
            self.progress(self.expected.path, self.count, self.expected.bytes)

    def flush(self) -> None:
        """Flushed once at the end; once a block would only cost time."""


def _download(file: File, url: str, target: Path, progress: Progress | None) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _OURS):
        raise UserError(f"{url} is not an https address: datasets are fetched over HTTPS only.")
    import requests
    from pooch import HTTPDownloader

    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    for stale in target.parent.glob(f"{target.name}.*.part"):  # left by a killed process
        if stale.stat().st_mtime < time.time() - 3600:
            stale.unlink(missing_ok=True)
    responses: list[requests.Response] = []  # pooch closes none of them when it fails
    by_hand = f"try again later, or put the file at {target} by hand"
    try:
        with part.open("wb") as opened:
            written = _Part(opened, file, url, progress)
            HTTPDownloader(
                chunk_size=1 << 16,
                timeout=60,
                headers={"Accept-Encoding": "identity"},  # else a server may pack the transfer once more
                hooks={"response": lambda response, **_: responses.append(response)},
            )(url, written, None)
            opened.flush()
            os.fsync(opened.fileno())
        if written.count < file.bytes:
            raise UserError(
                f"{url} broke off after {written.count:,} of {file.bytes:,} bytes, nothing was kept: {by_hand}."
            )
        if written.hash.hexdigest() != file.sha256:
            raise UserError(
                f"{url} sent a file with the wrong checksum (SHA-256 {written.hash.hexdigest()[:12]}…, expected "
                f"{file.sha256[:12]}…), nothing was kept: {by_hand}."
            )
        part.replace(target)
    except requests.RequestException as error:
        raise UserError(f"{url} could not be downloaded ({_reason(error)}), nothing was kept: {by_hand}.") from error
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror or error}): make room, or choose another ETUDE_DATA."
        ) from error
    finally:
        for response in responses:
            response.close()
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    name = type(error).__name__
    return {"ConnectionError": "no connection", "ChunkedEncodingError": "the connection broke off"}.get(
        name, "timed out" if "Timeout" in name else name
    )


def check(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    """One row a file: dataset, file, state, detail.

    States: `official` (checksum agrees), `differs` (readable and used, but other bytes), `partial` (readable, not all),
    `damaged` (detail says what is wrong and what to do), `missing`, `bundled`.
    """
    checks = {
        "omniglot": _check_omniglot,
        "cifar10": _check_cifar,
        "cifar10_partial": _check_partial,
        "cifar10_jpeg": _check_jpeg,
        "multi30k": _check_pinned,
        "tiny_shakespeare": _check_pinned,
    }
    if dataset.bundled:
        return [_check_bundled(dataset)]
    return checks.get(dataset.name, _check_idx)(dataset, folder)


def _row(dataset: Dataset, file: str, state: str, detail: str) -> dict[str, str]:
    return {"dataset": dataset.name, "file": file, "state": state, "detail": detail}


def _check_bundled(dataset: Dataset) -> dict[str, str]:
    from etude.data import bundled, texts

    try:
        if dataset.kind == "text":
            found = len(texts.house())
        else:
            found = sum(len(labels) for labels in bundled.digits()[1::2])
    except (ImportError, OSError) as error:
        return _row(dataset, "", "damaged", f"cannot be read ({error}): install etude and scikit-learn again")
    expected = dataset.train + dataset.test
    if found != expected:
        return _row(dataset, "", "damaged", f"holds {found:,} instead of {expected:,} items: install the package again")
    return _row(dataset, "", "bundled", "comes with an installed package")


def _pinned(dataset: Dataset, folder: Path, file: File) -> dict[str, str] | None:
    """The row of a file that is missing, unreadable or official; None when it is there with other bytes."""
    path = folder / file.path
    try:
        if not path.exists():
            return _row(dataset, file.path, "missing", f"not in {folder}: {remedy(dataset)}")
        if path.stat().st_size == file.bytes and digest(path) == file.sha256:
            return _row(dataset, file.path, "official", f"SHA-256 {file.sha256[:12]}… agrees")
    except OSError as error:
        return _row(dataset, file.path, "damaged", f"{path} cannot be read ({error.strerror or error})")
    return None


def _check_pinned(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    rows = []
    for file in dataset.files:
        other = _row(dataset, file.path, "damaged", f"{folder / file.path} has the wrong checksum: {remedy(dataset)}")
        rows.append(_pinned(dataset, folder, file) or other)
    return rows


def _check_idx(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    from etude.data import idx

    rows = []
    for file in dataset.files:
        plain = folder / file.path.removesuffix(".gz")
        row = _pinned(dataset, folder, file)
        if row is not None and (row["state"] != "missing" or not plain.exists()):
            rows.append(row)
            continue
        try:
            if row is None:
                idx.read(folder / file.path, file.sha256, remedy(dataset))
                row = _row(dataset, file.path, "official", "checksum agrees")  # only if it was replaced under our eyes
            else:
                shape = " × ".join(map(str, idx.read(plain, None, remedy(dataset)).shape))
                row = _row(
                    dataset, plain.name, "differs", f"unpacked copy, {shape}, readable; no checksum is pinned for it"
                )
        except UserError as error:
            row = _row(dataset, file.path if row is None else plain.name, "damaged", str(error))
        rows.append(row)
    return rows


def _check_omniglot(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    from etude.data import omniglot

    rows = []
    for file, count in zip(dataset.files, (dataset.train, dataset.test)):
        row = _pinned(dataset, folder, file)
        if row is None:
            try:
                found = omniglot.read(folder / file.path, count, file.sha256, 28, remedy(dataset))
                row = _row(
                    dataset,
                    file.path,
                    "differs",
                    "differs from the official archive: packed anew, but readable with "
                    f"all {count} characters × {omniglot.DRAWERS} drawings of {len(set(found.alphabets))} alphabets",
                )
            except UserError as error:
                row = _row(dataset, file.path, "damaged", str(error))
        rows.append(row)
    return rows


def _check_cifar(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    from etude.data import cifar

    (file,) = dataset.files
    row = _pinned(dataset, folder, file)
    if row is None:
        try:
            cifar.archive(folder / file.path, file.sha256, remedy(dataset))
            row = _row(dataset, file.path, "official", "checksum agrees")
        except UserError as error:
            row = _row(dataset, file.path, "damaged", str(error))
    if row["state"] != "missing":
        return [row]
    return [row, *_check_batches(dataset, folder, missing=bool(cifar.unpacked(folder)))]


def _check_partial(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    from etude.data import cifar

    if not cifar.unpacked(folder):
        return [
            _row(dataset, cifar.FOLDER, "missing", f"no unpacked batch in {folder / cifar.FOLDER}: {remedy(dataset)}")
        ]
    return _check_batches(dataset, folder, missing=False)


def _check_batches(dataset: Dataset, folder: Path, missing: bool) -> list[dict[str, str]]:
    import numpy as np

    from etude.data import cifar

    x, y = np.empty((cifar.PER_BATCH, 3, 32, 32), np.uint8), np.empty(cifar.PER_BATCH, np.uint8)
    rows, found = [], cifar.unpacked(folder)
    for name in cifar.BATCHES:
        if name not in found:
            if missing:
                rows.append(_row(dataset, f"{cifar.FOLDER}/{name}", "missing", f"not in {folder / cifar.FOLDER}"))
            continue
        path = found[name]
        try:
            count = cifar.batch(path, x, y, remedy(dataset))
            state = "differs" if count == cifar.PER_BATCH else "partial"
            detail = f"differs from the official archive: unpacked, {count:,} of {cifar.PER_BATCH:,} records, readable"
        except UserError as error:
            state, detail = "damaged", str(error)
        rows.append(_row(dataset, str(path.relative_to(folder)), state, detail))
    return rows


def _check_jpeg(dataset: Dataset, folder: Path) -> list[dict[str, str]]:
    from etude.data import cifar

    path = folder / cifar.JPEG
    if not path.exists():
        return [_row(dataset, cifar.JPEG, "missing", f"not in {folder}: {remedy(dataset)}")]
    try:
        cifar.jpeg(path, remedy(dataset))
    except UserError as error:
        return [_row(dataset, cifar.JPEG, "damaged", str(error))]
    detail = "differs from the official archive: all 60,000 images, readable, but lossy (JPEG)"
    return [_row(dataset, cifar.JPEG, "differs", detail)]
