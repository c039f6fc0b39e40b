"""Imports run one way: core ← blocks, data, optim ← methods ← cli; a method never imports another's loop, and what a room
keeps in its `parts` is for that room alone.

The sources are read, not imported. `etude.catalog` belongs to the core (it knows sources, not methods); the command
line, and any other file that lies directly in the package (doctor, __main__), stands at the top.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etude import catalog

CORE, SHARED, METHODS, TOP = range(4)
TIER = {"core": CORE, "catalog": CORE, "blocks": SHARED, "data": SHARED, "optim": SHARED, "cli": TOP}
LAZY = dict.fromkeys(("run", "resume", "load", "sample"), "etude.core.launch")  # names of etude itself

# file, what it imports, and why; only inside a function, so that importing the file stays clean
INSIDE_A_FUNCTION: dict[tuple[str, str], str] = {
    (
        "core/predict.py",
        "etude.data.folders",
    ): "a trained network decodes the user's pictures as training folders are decoded",
}

FILES = sorted(path.relative_to(catalog.PACKAGE).as_posix() for path in catalog.PACKAGE.rglob("*.py"))


def tier(module: str) -> int:
    """How high a module of the package stands."""
    parts = module.split(".")
    if len(parts) == 1:
        return CORE  # the package itself: a version, and lazy names that LAZY resolves
    if parts[1] in TIER:
        return TIER[parts[1]]
    return METHODS if (catalog.PACKAGE / parts[1]).is_dir() else TOP


def module_of(file: str) -> str:
    """vision/lenet.py → etude.vision.lenet."""
    parts = ("etude", *Path(file).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parts_of(module: str) -> str:
    """The room whose `parts` this module belongs to, or ""."""
    _, room, *inside = [*module.split("."), ""]
    return room if inside[:1] == ["parts"] else ""


def is_module(name: str) -> bool:
    """Whether this dotted name is a file or folder of the package."""
    path = catalog.PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(tree: ast.Module, file: str) -> Iterator[tuple[str, str, bool, int]]:
    """(module of the package, name taken from it or "", whether at module level, line) of every import of etude."""
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, FUNCTIONS) for node in ast.walk(function)}
    package = module_of(file).split(".")
    package = package if file.endswith("__init__.py") else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            found = [
                (f"{origin}.{alias.name}", "") if is_module(f"{origin}.{alias.name}") else (origin, alias.name)
                for alias in node.names
            ]
        else:
            continue
        for module, name in found:
            if module.split(".")[0] == "etude":
                module = LAZY.get(name, module) if module == "etude" else module
                yield module, name, id(node) not in inside, node.lineno


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def mistakes(tree: ast.Module, file: str) -> list[str]:
    """Every import of this file that runs the wrong way, and every loop or part of another's that it takes."""
    own = tier(module_of(file)) if file != "__init__.py" else TOP
    found = []
    aliases: dict[str, str] = {}
    for module, name, outside, line in imports(tree, file):
        if tier(module) > own and (outside or (file, module) not in INSIDE_A_FUNCTION):
            found.append(f"{file}:{line} imports {module}, which stands above it")
        if (room := parts_of(module)) and room != file.partition("/")[0]:
            found.append(f"{file}:{line} imports {module}, which only {room} may use: move it to blocks")
        if own == METHODS and name and name in loops(module) and module != module_of(file):
            found.append(f"{file}:{line} takes the loop '{name}' of {module}")
        if not name:
            aliases[module.rpartition(".")[2]] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname: f"{node.module}.{alias.name}" for alias in node.names if alias.asname}
        if own == METHODS and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id, "")
            if node.attr in loops(module) and module != module_of(file):
                found.append(f"{file}:{node.lineno} uses the loop '{node.attr}' of {module}")
    return found


@functools.cache
def loops(module: str) -> frozenset[str]:
    """Names of the functions that a module of the package decorates with @method."""
    path = catalog.PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    if not module.startswith("etude.") or not path.is_file() or tier(module) != METHODS:
        return frozenset()
    return decorated(ast.parse(path.read_text(encoding="utf-8")))


def decorated(tree: ast.Module) -> frozenset[str]:
    """Names of the functions of a parsed file that @method(…) marks."""

    def is_mark(node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "method"

    return frozenset(
        n.name for n in tree.body if isinstance(n, ast.FunctionDef) and any(map(is_mark, n.decorator_list))
    )


def parse(file: str) -> ast.Module:
    return ast.parse((catalog.PACKAGE / file).read_text(encoding="utf-8"))


def test_imports_run_one_way() -> None:
    assert len(FILES) > 30
    assert [mistake for file in FILES for mistake in mistakes(parse(file), file)] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/fit.py", "from etude.blocks.nn.norm import Standardise"),
        ("core/fit.py", "def f():\n    from etude import data"),
        ("core/evidence.py", "from etude import data"),
        ("core/run.py", "import etude.vision.lenet"),
        ("core/run.py", "from ..optim import sgd"),
        ("blocks/metrics.py", "from etude.vision.lenet import LeNet"),
        ("data/sets.py", "from etude import cli"),
        ("vision/lenet.py", "from etude.cli import main"),
        ("vision/lenet.py", "from etude.basics.mlp import train"),
        ("vision/lenet.py", "from etude.basics import mlp\nmlp.train(None, None)"),
        ("vision/lenet.py", "from etude.basics import mlp as other\nother.train(None, None)"),
        ("vision/lenet.py", "from etude.games.parts.tree import Tree"),
        ("vision/lenet.py", "from etude.games.parts import tree"),
        ("gans/parts/rings.py", "def f():\n    import etude.games.parts.rules"),
        ("blocks/metrics.py", "from etude.games.parts.tree import Tree"),
        ("cli/runs.py", "from etude.games.parts.showing import deal"),
    ],
)
def test_wrong_way_is_noticed(file: str, source: str) -> None:
    assert mistakes(ast.parse(source), file) != []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vision/lenet.py", "from etude.basics.mlp import MLP\nfrom etude import data, optim\nfrom etude import load"),
        ("games/cfr.py", "from etude.games.parts.tree import Tree\nfrom etude.games.parts import rules"),
        ("games/alphazero/train.py", "from etude.games.parts.tree import Tree\nfrom etude.blocks.nn import norm"),
        ("games/parts/showing.py", "from etude.games.parts.tree import Tree\nfrom ..parts import rules"),
        ("blocks/pictures/plots.py", "from etude.data import images"),
        ("core/launch.py", "from etude import catalog\nimport etude"),
        ("__init__.py", "from etude.core.launch import run"),
    ],
)
def test_right_way_is_let_through(file: str, source: str) -> None:
    assert mistakes(ast.parse(source), file) == []


def test_the_catalogue_needs_no_torch() -> None:
    """`etude list` reads every contract without importing torch or any method."""
    program = (
        "import sys; from etude import catalog, cli; cli.main(['list', '--json'])\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(catalog.PACKAGE.parent)}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
