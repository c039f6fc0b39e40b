"""Folders larger than memory: images stay on the disk, and worker processes decode the batches that come next

What is kept in memory is the list of files and a few batches. Which images make a batch is a function of (seed, step), as it
is for images in memory, and both ways give the same bytes; workers only decode ahead. So a resumed run needs no state here.

A worker is a process of its own that is asked in lines of JSON (files, size, grey) and answers with a header and bytes. It
ends when its input closes, hence with the process that started it, however that ended. ``ETUDE_STREAM=1`` streams every
folder, ``0`` none; otherwise those are whose decoded images would fill half of this machine's memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from etude.core.errors import RunError, UserError
from etude.data import folders

if TYPE_CHECKING:
    from torch import Tensor

    from etude.data.sets import Images

SAMPLE = 2000
"""Training images, evenly spread, from which mean and deviation are taken."""
SWITCH = "ETUDE_STREAM"


def too_large(folder: Path, size: int | None) -> bool:
    """Whether the images of a folder are to stay on the disk."""
    asked = os.environ.get(SWITCH, "")
    if asked in ("0", "1"):
        return asked == "1"
    if asked:
        raise UserError(f"{SWITCH} is {asked}: set it to 1 (stream every folder) or 0 (none), or unset it.")
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return False
    most = memory // 2 // (3 * (size or 224) ** 2)  # images
    return folder.is_dir() and _at_least(folder, most)


def _at_least(folder: Path, count: int) -> bool:
    """Whether there are more than `count` files below a folder; it stops counting there."""
    seen = 0
    for _, _, files in os.walk(folder):
        seen += len(files)
        if seen > count:
            return True
    return False


def images(name: str, folder: Path, size: int | None) -> Images:
    """`etude.data.images` of a folder whose images stay on the disk; mean and deviation are those of SAMPLE of them."""
    import numpy as np
    import torch

    from etude.core.spec import Spec
    from etude.data.sets import Images, Split, moments

    found = folders.listing(folder)
    shape = folders.common_shape(found.paths, size, folder)
    workers, parts = Workers(), []
    for rows in (found.train, found.validation, found.test):
        x = Stored([path for path, _ in rows], shape, size, workers)
        parts.append(Split(cast("Tensor", x), torch.from_numpy(np.array([label for _, label in rows], np.int64))))
    train = parts[0]
    some = torch.linspace(0, len(train) - 1, min(SAMPLE, len(train))).round().long()
    mean, std = moments(train.x[some].numpy())
    told = "" if len(some) == len(train) else f"; mean and deviation of {len(some):,} of them"
    return Images(name, *parts, Spec(shape, found.classes, mean, std), f"{found.source}, read from the disk{told}")


class AllAtOnceError(UserError, AttributeError):
    """A method asks images on the disk for what needs all of them in memory."""


class Stored:
    """Images (N, C, H, W) in files: indexing by a number, a slice, a list or a tensor decodes those, uint8.

    It stands for the tensor of a split in whatever takes a part of it at a time.
    """

    def __init__(self, paths: Sequence[Path], shape: tuple[int, int, int], size: int | None, workers: Workers) -> None:
        import torch

        self.paths, self.size, self.workers = [os.fspath(path) for path in paths], size, workers
        self.shape, self.dtype, self.ndim = torch.Size((len(paths), *shape)), torch.uint8, 4

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Tensor:
        import torch

        if isinstance(index, int):
            return self[[index]][0]
        rows = range(len(self))[index] if isinstance(index, slice) else [int(row) for row in index]
        pieces = [rows[start : start + 64] for start in range(0, len(rows), 64)]
        found = [future.result() for future in [self.begin(piece) for piece in pieces]]
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype)

    def begin(self, rows: Sequence[int]) -> Future[Tensor]:
        """Let a worker decode these images: a promise of (n, C, H, W)."""
        paths = [self.paths[row] for row in rows]
        return self.workers.ask(paths, (len(paths), *self.shape[1:]), self.size)

    def split(self, count: int) -> Iterator[Tensor]:
        """Parts of `count` images, in order, each decoded when it is asked for."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def tensor_split(self, parts: int) -> Iterator[Tensor]:
        """As many parts, whose sizes differ by one at most."""
        ends = [(len(self) * part + parts - 1) // parts for part in range(parts + 1)]
        return (self[low:high] for low, high in itertools.pairwise(ends))

    def __getattr__(self, name: str) -> Any:
        raise AllAtOnceError(
            f"these images are read from the disk, and this method wants all of them at once (Tensor.{name}): take fewer, "
            f"smaller images, or set {SWITCH}=0"
        )


def reader(x: Any, chosen: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The images of a step, (B, C, H, W): `x[chosen(step)]`, of files decoded some steps ahead."""
    if not isinstance(x, Stored):
        return lambda step: x[chosen(step)]
    coming: dict[int, Future[Tensor]] = {}

    def at(step: int) -> Tensor:
        ahead = range(step, step + 2 * x.workers.count + 1)
        for other in [other for other in coming if other not in ahead]:
            coming.pop(other).cancel()
        for other in ahead:
            if other not in coming:
                coming[other] = x.begin(chosen(other).tolist())
        return coming.pop(step).result()

    return at


class Workers:
    """Processes that decode images; they start when they are first asked, and end with this object."""

    def __init__(self, count: int | None = None) -> None:
        from etude.core.devices import cores

        self.count = count or min(8, max(1, cores() - 1))
        self._free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        for _ in range(self.count):
            self._free.put(None)
        self._pool = ThreadPoolExecutor(self.count, "etude-images")
        weakref.finalize(self, _stop, self._pool, self._started)

    def ask(self, paths: list[str], shape: tuple[int, ...], size: int | None) -> Future[Tensor]:
        """A promise of these images, uint8 of this shape; its result raises `UserError` naming a broken file."""
        return self._pool.submit(_exchange, self._free, self._started, paths, shape, size)


def _stop(pool: ThreadPoolExecutor, started: list[subprocess.Popen[bytes]]) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in started:
        process.kill()
        with contextlib.suppress(OSError, ValueError):
            process.communicate()


def _exchange(
    free: queue.SimpleQueue[subprocess.Popen[bytes] | None], started: list[subprocess.Popen[bytes]], paths: list[str],
    shape: tuple[int, ...], size: int | None,
) -> Tensor:  # fmt: skip
    """In a thread: hand one request to a free worker and wait for its answer."""
    import torch

    process = free.get()
    try:
        if process is None:
            command = [sys.executable, "-m", "etude.data.streamed"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=_environment()
            )
            started.append(process)
        assert process.stdin
        assert process.stdout
        out = torch.empty(shape, dtype=torch.uint8)
        try:
            process.stdin.write(json.dumps({"paths": paths, "size": size, "grey": shape[1] == 1}).encode() + b"\n")
            process.stdin.flush()
            header = json.loads(process.stdout.readline() or b"{}")
        except (OSError, ValueError):
            header = {}
        if "error" in header:
            raise UserError(header["error"])
        view = memoryview(out.numpy()).cast("B")
        if header.get("bytes") != math.prod(shape) or process.stdout.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise RunError("a process that decodes images has ended; was the memory of this machine full?")
        return out
    finally:
        free.put(process)


def _environment() -> dict[str, str]:
    """A worker finds this package, and one decoder takes one thread."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def work() -> None:
    """What a worker does until its input ends: read a request, decode, answer."""
    import numpy as np

    given, answers = sys.stdin.buffer, sys.stdout.buffer
    for line in given:
        request = json.loads(line)
        try:
            pixels = [folders.decoded(Path(path), request["size"], request["grey"]) for path in request["paths"]]
            if strange := [i for i, image in enumerate(pixels) if image.shape != pixels[0].shape]:
                raise UserError(f"The image {request['paths'][strange[0]]} has changed since the folder was listed.")
            body = np.stack(pixels).tobytes()
            answers.write(json.dumps({"bytes": len(body)}).encode() + b"\n")
            answers.write(body)
        except UserError as error:
            answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    work()
