"""What a run leaves behind: metrics.jsonl, artifacts, environment.json, result.json, and done or failed.

Plain files that any tool reads. TensorBoard is a reader of metrics.jsonl (`to_tensorboard`), never a second writer.
Times live in environment.json, so metrics.jsonl of a resumed run equals the uninterrupted one byte for byte.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.checkpoint import write_text
from etude.core.errors import UserError
from etude.core.folder import read_json

try:
    import resource
except ImportError:  # Windows does not have it
    resource = None

VERSIONS = ("etude", "torch", "numpy", "numba", "safetensors", "scikit-learn", "gymnasium", "tokenizers")


class Record:
    """Writer of one run folder. On ranks above 0 it writes nothing."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.artifacts = folder / "artifacts"
        self._metrics = folder / "metrics.jsonl"
        self.rows = 0  # lines of metrics.jsonl that belong to the state of the run
        self.loop_seconds = 0.0  # between the first and the last step of this session
        self.cpu_seconds = 0.0  # of them, what all threads of this process were busy for
        self.threads = 1  # that torch computes with
        self._began = time.perf_counter()
        self._session: dict[str, Any] = {}
        self._environment: dict[str, Any] = {}

    def open(self, step: int, device: str) -> None:
        """Begin a session: which machine, which versions, from which step. Rows after that step are dropped."""
        if self.writes:
            (self.folder / "failed").unlink(missing_ok=True)
            self._cut()
        self._environment = self._known("environment.json", dict)
        sessions = self._environment.get("sessions")
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            self._environment = {
                "started": _now(),
                "hardware": hardware(),
                "versions": versions(),
                "commit": commit(),
                "sessions": [],
            }
        self._session = {"started": _now(), "from_step": step, "device": device}
        self._environment["sessions"].append(self._session)
        self._began = time.perf_counter()
        self.beat(step)

    def beat(self, step: int) -> None:
        """Note how far this session has come (called with every checkpoint)."""
        self._session |= {
            "ended": _now(),
            "to_step": step,
            "threads": self.threads,
            "seconds": round(time.perf_counter() - self._began, 3),
            "loop_seconds": round(self.loop_seconds, 3),
            "loop_cpu_seconds": round(self.cpu_seconds, 3),
            "peak_memory_mb": peak_memory_mb(),
        }
        self._write_json("environment.json", self._environment)

    def metrics(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Append rows to metrics.jsonl."""
        self.rows += len(rows)
        if self.writes and rows:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.writelines(_line(step, row) for step, row in rows)

    def _cut(self) -> None:
        """Drop what the state does not know of yet: the resumed run writes it again, equal to the last digit."""
        if self._metrics.is_file():
            lines = self._metrics.read_bytes().splitlines(keepends=True)
            if len(lines) > self.rows:
                write_text(self._metrics, b"".join(lines[: self.rows]).decode())

    def artifact(self, name: str, thing: Any, caption: str = "", step: int | None = None) -> Path:
        """Write one picture, animation, table or text and enter it in artifacts/index.json."""
        self.artifacts.mkdir(exist_ok=True)
        stem = name if step is None else f"{name}-{step:07d}"
        path, kind = _write_artifact(self.artifacts, stem, thing)
        index = self.artifacts / "index.json"
        known = [
            item for item in self._known("artifacts/index.json", list) if isinstance(item, dict) and "file" in item
        ]
        entry = {"file": path.name, "name": name, "step": step, "caption": caption, "kind": kind}
        known = [item for item in known if item["file"] != path.name] + [entry]
        write_text(index, json.dumps(known, indent=1) + "\n")
        return path

    def result(self, metrics: dict[str, float]) -> None:
        """Write what the method returned to result.json."""
        self._write_json("result.json", metrics)

    def done(self) -> None:
        """Mark the run as finished."""
        if self.writes:
            write_text(self.folder / "done", _now() + "\n")

    def failed(self, reason: str) -> None:
        """Mark the run as failed, with the reason in its first line."""
        if self.writes:
            write_text(self.folder / "failed", reason.rstrip() + "\n")

    def _known(self, name: str, kind: type) -> Any:
        """What a file of this folder holds; an empty value where it is missing, damaged or of another kind."""
        try:
            found = read_json(self.folder / name)
        except (OSError, ValueError):  # a UserError is a ValueError
            return kind()
        return found if isinstance(found, kind) else kind()

    def _write_json(self, name: str, value: Any) -> None:
        if self.writes:
            write_text(self.folder / name, json.dumps(value, indent=1) + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a line that is damaged or cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):  # a damaged line is no row
            row = json.loads(line) if line.endswith("\n") else None
            if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
                rows.append({name: value for name, value in row.items() if isinstance(value, (int, float))})
    return rows


def to_tensorboard(folder: Path) -> Path:
    """Copy metrics.jsonl into TensorBoard event files under ``tensorboard/`` of the run folder."""
    from etude.catalog import extra_installed
    from etude.core.extras import how

    if not extra_installed("track"):
        raise UserError(f"TensorBoard is not installed; run: {how('track')}")
    from torch.utils.tensorboard import SummaryWriter

    target = folder / "tensorboard"
    with SummaryWriter(str(target)) as writer:
        for row in read_metrics(folder):
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))
    return target


def versions() -> dict[str, str]:
    """Python and the installed versions of what a result can depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(terse=True)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The commit of the source checkout (with ``+`` when it has changes), or None for an installed wheel."""
    from etude.catalog import checkout_folder

    root = checkout_folder()
    if root is None:
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (on a GPU, of its allocator); 0 where the system does not say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _line(step: int, row: dict[str, float]) -> str:
    """One row as JSON; written out because it is done at every step (finite floats print as JSON wants them)."""
    return f'{{"step": {step}{"".join([f"{_quoted(name)}{value!r}" for name, value in row.items()])}}}\n'


@functools.cache
def _quoted(name: str) -> str:
    return f", {json.dumps(name)}: "


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_artifact(folder: Path, stem: str, thing: Any) -> tuple[Path, str]:
    if isinstance(thing, dict):
        path = folder / f"{stem}.json"
        write_text(path, json.dumps(thing, indent=1) + "\n")
        return path, "table"
    if isinstance(thing, str):
        path = folder / f"{stem}.txt"
        write_text(path, thing)
        return path, "text"
    if hasattr(thing, "savefig"):
        path = folder / f"{stem}.png"
        with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font|Matplotlib currently does not support")
            thing.savefig(path, dpi=144, bbox_inches="tight")
        return path, "image"
    if isinstance(thing, list):
        path = folder / f"{stem}.gif"
        frames = [_picture(frame) for frame in thing]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)
        return path, "animation"
    path = folder / f"{stem}.png"
    _picture(thing).save(path)
    return path, "image"


def _picture(thing: Any) -> Any:
    """A PIL image from a PIL image, or from a (H, W), (C, H, W) or (H, W, C) array: uint8, or float in [0, 1].

    Where both readings are possible, a tensor is (C, H, W) and a numpy array (H, W, C).
    """
    from PIL import Image

    if isinstance(thing, Image.Image):
        return thing
    is_tensor = hasattr(thing, "detach")
    array = thing.detach().cpu().numpy() if is_tensor else np.asarray(thing)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and (is_tensor or array.shape[2] not in (1, 3, 4)):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(array)
