"""Methods that are the user's own: a file (`etude run ./mine.py`) or a folder whose loop is in train.py.

An own method is called ``mine/<stem>`` whatever its @method line says: a copy has no evidence but its own. Its source is
read once and run from what was read, never from a compiled file beside it; every run keeps it (``source.py``, or the
folder ``source/``) with its SHA-256 in config.json, and `etude.load`, `resume` and `sample` use what was kept.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etude import catalog
from etude.core import folder as folders
from etude.core import trust as permission
from etude.core.errors import UserError, nearest

MOST = 2**22
"""Bytes that a source file may have."""
LOOP = "train.py"
"""The file of a method's folder that holds its loop."""


@dataclasses.dataclass(frozen=True)
class Own(catalog.Entry):
    """An own method: what `catalog.Entry` is, with the bytes that are run. `path` is its file, or the folder's train.py."""

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """Name → bytes of the one file, or of every Python file of the folder."""
    whole: bool = False
    """Whether it is a folder."""

    @property
    def card(self) -> dict[str, Any] | None:
        """None: no card of etude's is about this file."""
        return None

    @property
    def badge(self) -> str:
        return "unproved"

    @property
    def experiments(self) -> list[dict[str, Any]]:
        """None: bars that were copied with a file were set for another one."""
        return []

    @property
    def digest(self) -> str:
        return permission.digest(self.files)

    @property
    def root(self) -> Path:
        """What the user names: the file, or the folder."""
        return self.path.parent if self.whole else self.path


def is_own(name: str) -> bool:
    """Whether this names a file or a folder rather than a method of the catalogue."""
    return name.endswith(".py") or (("/" in name or name.startswith((".", "~"))) and (Path(name) / LOOP).is_file())


def find(name: str) -> Own:
    """The own method in this file, or in this folder. Raises UserError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _read(path / LOOP, sorted(path.glob("*.py")), _name(path.resolve().name))
    if not path.is_file():
        raise UserError(f"there is no file {name}; 'etude copy METHOD {name}' would make one to start from")
    if path.name == LOOP and "from ." in path.read_text(encoding="utf-8", errors="replace"):
        return _read(path, sorted(path.parent.glob("*.py")), _name(path.resolve().parent.name))
    return _read(path, [], _name(path.stem))


class Opened(NamedTuple):
    """A run folder that was found and looked over, its config.json, and the method it is a run of."""

    folder: Path
    described: dict[str, Any]
    entry: catalog.Entry


def opened(run: str | os.PathLike[str], trust: bool = False) -> Opened:
    """Find a run folder and its method, running nothing. `trust` follows links and takes a changed source."""
    folder = folders.find_run(os.fspath(getattr(run, "folder", run)))  # what `etude.run` and `etude.load` return, too
    if not trust:
        folders.guard(folder)
    described = folders.read_config(folder)
    own = bool(described["source"]) or is_own(described["method"])
    if not own and described["method"] not in catalog.entries():
        raise UserError(
            f"{folder}/config.json says that this is a run of '{described['method'][:80]}', which is no method here"
        )
    entry = _kept(folder, described, trust) if own else catalog.find(described["method"])
    return Opened(folder, described, entry)


def _kept(folder: Path, described: dict[str, Any], trust: bool) -> Own:
    """The own method that a run folder keeps. Raises UserError where its digest is not the recorded one."""
    name = described["method"]
    if is_own(name):  # written by hand, or by an etude before sources were kept
        return find(name)
    whole = (folder / "source").is_dir()
    path = folder / "source" / LOOP if whole else folder / "source.py"
    own = _read(path, sorted((folder / "source").glob("*.py")) if whole else [], name)
    if own.digest != described["source"].get("sha256") and not trust:
        raise UserError(
            f"{own.root} is not the source this run was made with (its SHA-256 is not the one in config.json); "
            f"put it back, or go on with another: etude resume {folder} --source FILE"
        )
    return own


def keep(own: Own, folder: Path) -> dict[str, Any]:
    """Write the source into a run folder, in place of what it keeps, and return what config.json says of it."""
    for old in (folder / "source.py", folder / "source"):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
    if own.whole:
        (folder / "source").mkdir()
    for name, data in own.files.items():
        (folder / "source" / name if own.whole else folder / "source.py").write_bytes(data)
    return {"path": str(own.root.resolve()), "sha256": own.digest}


def copy_folder(origin: Path, target: Path) -> None:
    """Copy the Python files of a method's folder; what they import from each other they import from beside themselves."""
    package = ".".join(("etude", *origin.relative_to(catalog.PACKAGE).parts))
    target.mkdir()
    for path in sorted(origin.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        text = re.sub(rf"^(\s*)from {re.escape(package)}\.(\w+) import", r"\1from .\2 import", text, flags=re.MULTILINE)
        text = re.sub(rf"^(\s*)from {re.escape(package)} import", r"\1from . import", text, flags=re.MULTILINE)
        (target / path.name).write_text(text, encoding="utf-8")


def load(own: Own) -> types.ModuleType:
    """Run the source (once in a process for the same bytes) and return the module with the loop. Raises UserError."""
    where = f"the method file {own.root}" if not own.whole else f"the method folder {own.root}"
    permission.permit(own.files, where)
    package = f"etude_mine_{own.digest[:16]}"
    name = f"{package}.{own.path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(own.path):
        return known
    for old in [old for old in sys.modules if old == package or old.startswith(f"{package}.")]:
        del sys.modules[old]
    finder = _Finder(package, own)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        for old in [old for old in sys.modules if old == package or old.startswith(f"{package}.")]:
            del sys.modules[old]
        raise UserError(f"{own.root} cannot be imported: {_said(error, own, package)}") from error
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package of one own method and the modules in it."""

    def __init__(self, package: str, own: Own) -> None:
        self.package, self.own = package, own

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == self.package:
            loader = _Loader(self.own.path.parent / "__init__.py", self.own.files.get("__init__.py", b""))
            return importlib.machinery.ModuleSpec(fullname, loader, is_package=True)
        parent, _, stem = fullname.rpartition(".")
        if parent == self.package and f"{stem}.py" in self.own.files:
            file = self.own.path.parent / f"{stem}.py"
            loader = _Loader(file, self.own.files[f"{stem}.py"])
            return importlib.util.spec_from_file_location(fullname, file, loader=loader)
        return None


class _Loader(importlib.abc.InspectLoader):
    """Runs the bytes that were read: the digest is of these, and a compiled file beside the source is never looked at."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data

    def get_source(self, fullname: str) -> str:
        return self.data.decode("utf-8")

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.data, str(self.path), "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        return self.path.name == "__init__.py"


def _name(stem: str) -> str:
    """``mine/<stem>``, with nothing in it that means another folder."""
    plain = re.sub(r"[^\w .+-]", "-", stem).strip(". ")
    return f"mine/{plain or 'method'}"


def _read(path: Path, beside: Sequence[Path], name: str) -> Own:
    whole = bool(beside)
    try:
        files = {file.name: folders.read_bytes(file, MOST) for file in beside or [path]}
        for file, data in files.items():
            ast.parse(data.decode("utf-8"), file)
        entry = catalog._read(path.resolve())
    except SyntaxError as error:
        raise UserError(f"{path} cannot be imported: {_syntax(error)}") from error
    except (OSError, ValueError, RecursionError, MemoryError, AssertionError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no method file that can be read ({error})") from error
    if entry is None:
        raise UserError(f"{path} holds no function decorated with @method(…); 'etude copy METHOD FILE' shows the form")
    return Own(name, entry.path, entry.title, entry.paper, entry.section, entry.needs, files=files, whole=whole)


def _said(error: Exception, own: Own, package: str) -> str:
    """What went wrong in an own file, with the line in it."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).parent == own.path.parent:
        return _syntax(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(f"{package}."):
        missing = (error.name or "").rpartition(".")[2]
        if not own.whole:
            return f"it imports '.{missing}'; a method with files beside it is copied as a folder: etude copy METHOD FOLDER"
        return f"it imports '.{missing}', and there is no {missing}.py beside it{nearest(f'{missing}.py', own.files)}"
    line, trace = 0, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).parent == own.path.parent:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


def _syntax(error: SyntaxError) -> str:
    """A syntax error with its line and the text that stands there."""
    text = (error.text or "").strip()
    name = Path(error.filename).name if error.filename and error.filename != "<unknown>" else ""
    where = ", ".join(filter(None, (name, f"line {error.lineno}" if error.lineno else "")))
    return f"SyntaxError in {where}: {error.msg}" + (f" in '{text[:80]}'" if text else "")
