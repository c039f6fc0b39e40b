"""Run folders: find one, read its small files, and take nothing in it on trust.

A run folder may be damaged, or made by someone else. Every small file of it is read here: it must be a plain file of
bounded size whose JSON has the expected shape, and a link that leaves the folder is refused. Imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from etude.core.errors import UserError, nearest

SMALL = 64 * 2**20
"""Bytes that a small file of a run folder (all but checkpoints, artifacts and metrics.jsonl) may have."""


def runs_folder() -> Path:
    """Where runs go without ``--out``: ETUDE_RUNS, else ``runs/`` here."""
    return Path(os.environ.get("ETUDE_RUNS", "runs"))


def find_run(text: str, but: Path | None = None) -> Path:
    """The run folder meant by a path, a method's name (its latest run) or ``latest``; never `but`, for the latest."""
    from etude import catalog

    try:
        path = Path(text)
        if (path / "config.json").exists():
            return path
        if path.is_file():
            raise UserError(f"{text} is a file; name the run folder (it holds config.json and checkpoints/)")
        root = runs_folder()
        under = root if text == "latest" else root / text
        short = {entry.rpartition("/")[2] for entry in catalog.entries()}
        if text != "latest" and not under.is_dir() and text in short:
            under = root / catalog.find(text).name
        named = text == "latest" or not (path.is_absolute() or set(path.parts) <= {".", ".."} or ".." in path.parts)
        found = [run for run in list_runs(under) if not (but and run.samefile(but))] if named else []
    except (OSError, ValueError) as error:  # a name too long, a null byte, a folder that may not be looked into
        if isinstance(error, UserError):
            raise
        raise UserError(f"there is no run '{text[:80]}' ({getattr(error, 'strerror', None) or error})") from error
    if not found:
        if path.is_dir():
            raise UserError(f"{text} is not a run folder (it has no config.json)")
        known = [str(run) for run in list_runs(root)]
        raise UserError(f"there is no run '{text}'; 'etude run METHOD' makes one under {root}/{nearest(text, known)}")
    return found[-1]


def list_runs(root: Path) -> list[Path]:
    """Every run folder at or up to four levels below `root`, oldest first (by the time config.json was written)."""
    found: list[tuple[int, Path]] = []

    def look(folder: Path, depth: int) -> None:
        try:
            with os.scandir(folder) as items:
                entries = list(items)
        except OSError:
            return
        for item in entries:
            if item.name == "config.json":
                found.append((item.stat(follow_symlinks=False).st_mtime_ns, folder))
                return  # nothing inside a run folder is another run
        if depth:
            for item in entries:
                if item.is_dir(follow_symlinks=False) and not item.name.startswith("."):
                    look(folder / item.name, depth - 1)

    look(root, 4)
    return [folder for _, folder in sorted(found)]


def guard(folder: Path) -> None:
    """Raise UserError if anything in a run folder is a link that leaves it, a device, a pipe or a socket."""
    home = folder.resolve()
    pending = [home]
    while pending:
        try:
            with os.scandir(pending.pop()) as items:
                entries = list(items)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
        for item in entries:
            path, mode = Path(item.path), item.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                try:
                    target = path.resolve()
                except (OSError, RuntimeError) as error:  # a link that leads to itself
                    raise UserError(f"{path} is a link that leads nowhere; remove it") from error
                if not target.is_relative_to(home):
                    raise UserError(
                        f"{path} is a link to {target}, outside the run folder, and is not followed; "
                        "remove it, or copy what it points to"
                    )
            elif stat.S_ISDIR(mode):
                pending.append(path)
            elif not stat.S_ISREG(mode):
                raise UserError(f"{path} is {kind_of(mode)}, which no run writes; remove it")


def kind_of(mode: int) -> str:
    """What a file is that is no plain file, in words."""
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in names if test(mode)), "a device")


def read_bytes(path: Path, most: int = SMALL) -> bytes:
    """The bytes of a plain file of at most `most` bytes. Raises OSError, or UserError for anything else.

    A pipe is opened without waiting for its other end, and is refused.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is {kind_of(status.st_mode)}, not a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than {most:,} bytes, which such a file never has")
    return data


def read_json(path: Path) -> Any:
    """The JSON value in a small file. Raises OSError when there is none, ValueError when it is damaged."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that the run cannot be built without."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is damaged or missing ({said}); without it the run cannot be built again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no settings); without it the run cannot be built again")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config.json of a run folder, its parts of the right types."""
    described = read_object(folder / "config.json")
    for name, kind in (("method", str), ("config", dict), ("common", dict)):
        if not isinstance(described.get(name), kind):
            raise UserError(
                f"{folder}/config.json is damaged (it has no {name}); without it the run cannot be built again"
            )
    for name, kind in (("command", str), ("preset", str), ("default_config", dict), ("source", dict)):
        if not isinstance(described.setdefault(name, kind()), kind):
            raise UserError(f"{folder}/config.json is damaged (its {name} is not what a run writes there)")
    return described


def read_result(folder: Path) -> dict[str, float]:
    """What the method of a finished run returned (result.json)."""
    found = read_object(folder / "result.json")
    wrong = [name for name, value in found.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise UserError(f"{folder}/result.json is damaged ('{wrong[0]}' is no number)")
    return found
