"""Digests of the code that makes a method's numbers, so that a card cannot go stale unseen.

Counted are the method's file and what it imports, directly or through others, from the rooms, `blocks`, `data` and
`optim`, and how randomness is drawn. Of each file only what runs counts: comments, docstrings, layout and the evidence
itself (EXPERIMENTS, SETTINGS, METRICS) do not. Nothing is imported and, while no byte has changed, nothing is parsed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
_ALWAYS = PACKAGE / "core" / "randomness.py"
_LEFT_OUT = {"core", "cli"}
_EVIDENCE = {"EXPERIMENTS", "SETTINGS", "METRICS"}
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(etude[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)|import[ \t]+(etude[\w.]+))", re.MULTILINE
)
_METHOD = re.compile(r"""["'](\w+)/(\w+)["']""")  # a method that a file loads by its name


class Digest(NamedTuple):
    """What a card keeps: `files` changes with every byte, `code` only with what runs."""

    code: str
    files: str


def digest(path: Path) -> Digest:
    """The digest of the method in this file. Parses every file that it is made of: some 100 ms."""
    files = sources(path)
    code = hashlib.sha256()
    for file in files:
        code.update(f"{_name(file)}\n{_code(file)}\n".encode())
    return Digest(code.hexdigest()[:16], files_digest(path))


def files_digest(path: Path) -> str:
    """Digest of the bytes of every file that the method is made of; parses nothing."""
    total = hashlib.sha256()
    for file in sources(path):
        total.update(f"{_name(file)} {_read(file).sha}\n".encode())
    return total.hexdigest()[:16]


def sources(path: Path) -> list[Path]:
    """The files that a method is made of, itself first, the others in the order of their names."""
    found, waiting = {path}, [path]
    while waiting:
        for file in _read(waiting.pop()).imports:
            if file not in found:
                found.add(file)
                waiting.append(file)
    return [path, *sorted((found | {_ALWAYS}) - {path})]


class _File(NamedTuple):
    text: str
    sha: str
    imports: tuple[Path, ...]


@functools.cache
def _read(path: Path) -> _File:
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    imports: dict[Path, None] = {}
    for module, names, plain in _IMPORT.findall(text):
        for file in _files(module or plain, [name.split()[0] for name in names.strip("()").split(",") if name.split()]):
            imports[file] = None
    for room, name in _METHOD.findall(text):
        for file in (PACKAGE / room / f"{name}.py", PACKAGE / room / name / "train.py"):
            if room not in _LEFT_OUT and file.is_file():
                imports[file] = None
    return _File(text, hashlib.sha256(data).hexdigest(), tuple(imports))


def _files(module: str, names: list[str]) -> list[Path]:
    """The files behind ``from module import names``, with the packages on the way to them, as far as they count."""
    parts = module.split(".")[1:]
    found = []
    for tail in ([], *([name] for name in names)):
        whole = [*parts, *tail]
        if not whole or whole[0] in _LEFT_OUT or not (PACKAGE / whole[0]).is_dir():
            continue
        place = PACKAGE.joinpath(*whole)
        found += [PACKAGE.joinpath(*whole[:depth], "__init__.py") for depth in range(1, len(whole) + 1)]
        found.append(place.with_suffix(".py"))
    return [file for file in found if file.is_file()]


@functools.cache
def _code(path: Path) -> str:
    """What runs in a file, as text that comments, docstrings and layout do not change."""
    tree = ast.parse(_read(path).text)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Assign) and _targets(node) & _EVIDENCE)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                item
                for item in body
                if not (isinstance(item, ast.Expr) and isinstance(getattr(item.value, "value", None), str))
            ]
    return ast.dump(tree)


def _targets(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
