"""Completion of names and flags in the shell."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from etude import catalog
from etude.cli.shared import VERBS, Parser
from etude.core.errors import UserError
from etude.core.folder import list_runs, runs_folder
from etude.core.own import opened

# the flags that every method has; written down here because etude.core.run, which declares them, imports torch
COMMON = (
    "seed",
    "device",
    "precision",
    "threads",
    "save-every",
    "compile",
    "shard",
    "quiet",
    "preset",
    "out",
    "seeds",
    "json",
)


def completion(words: list[str]) -> int:
    parser = Parser("completion")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(words).shell
    words_so_far = '"${COMP_WORDS[@]:1:COMP_CWORD}"'
    bash = f"_etude() {{ local IFS=$'\\n'; COMPREPLY=( $(etude __complete {words_so_far}) ); }}\n"
    bash += "complete -o default -F _etude etude"
    print(
        {
            "bash": bash,
            "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + bash,
            "fish": "complete -c etude -a '(etude __complete (commandline -opc)[2..] (commandline -ct))'",
        }[shell]
    )
    return 0


# verbs about runs, and the flags of each (those of `sample` are its method's)
RUNS = {
    "resume": ("steps", "iterations", "episodes", "rounds", "source", "trust"),
    "show": ("no-open", "tensorboard", "json"),
    "compare": ("out", "no-open"),
    "predict": ("json", "trust"),
    "sample": ("trust",),
    "export": ("out", "json", "trust"),
}
OTHERS = {
    "list": ("json", "names", "notes"),
    "info": ("json",),
    "runs": ("json",),
    "verify": ("replay", "settings", "seeds", "experiment", "keep", "json"),
    "bench": ("json", "recorded"),
    "data": ("from", "json"),
    "doctor": ("json",),
}
FIXED = {"precision": ("fp32", "bf16"), "device": ("auto", "cpu", "cuda", "mps")}


def candidates(words: list[str]) -> list[str]:
    """What can stand where the last word stands: verbs, methods, runs, presets, flags, and the choices of a flag."""
    done, last = words[:-1], words[-1] if words else ""
    verb = done[0] if done else ""
    if not done:
        options = list(VERBS)
    elif verb in RUNS and (len(done) == 1 or (verb == "compare" and not last.startswith("-"))):
        options = _runs()
    elif verb in RUNS:
        options = _flags(RUNS[verb]) + (_flags(_sample_flags(done[1])) if verb == "sample" else [])
    elif verb == "run" and len(done) > 1:
        options = _of_run(done, last)
    elif verb in ("run", "info", "copy", "list", "verify", "runs") and len(done) == 1 and not last.startswith("-"):
        rooms = {entry.room for entry in catalog.entries().values()} if verb in ("list", "verify") else set()
        options = [*catalog.entries(), *sorted(rooms)]
    elif verb == "data" and len(done) == 1:
        options = ["list", "get", "check"]
    elif verb == "data" and not last.startswith("-"):
        options = _datasets()
    elif verb == "completion":
        options = ["bash", "zsh", "fish"]
    else:
        options = _flags(OTHERS.get(verb, ()))
    return [option for option in options if option.startswith(last)]


def _of_run(done: list[str], last: str) -> list[str]:
    """After `etude run METHOD`: flags, and after a flag what it can be."""
    try:
        entry = catalog.find(done[1])
    except UserError:
        return []
    name = done[-1].removeprefix("--") if done[-1].startswith("--") else ""
    fields = {field["name"].replace("_", "-"): field for field in entry.fields}
    if name == "preset":
        return list(entry.presets)
    if name == "data":
        return _datasets()
    if name == "source":
        return ["fresh", *_runs()]
    if name in FIXED:
        return list(FIXED[name])
    if name in fields and (choices := _choices(entry, fields[name]["type"])):
        return choices
    if name in fields and fields[name]["type"] != "bool" and not last.startswith("-"):
        return []
    switches = [
        "no-" + flag for flag, field in fields.items() if field["type"] == "bool" and field["default"] == "True"
    ]
    return _flags((*fields, *switches, *COMMON))


def _choices(entry: catalog.Entry, kind: str) -> list[str]:
    """The values of a Literal in a field's type, also where it is a name that the file imports; [] for other types."""
    try:
        expression = ast.parse(kind, mode="eval").body
    except SyntaxError:
        return []
    found: list[str] = []
    for node in ast.walk(expression):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            found += [str(part.value) for part in ast.walk(node.slice) if isinstance(part, ast.Constant)]
        elif isinstance(node, (ast.Name, ast.Attribute)) and (text := ast.unparse(node)) not in ("Literal", "None"):
            found += _alias(entry, text)
    return list(dict.fromkeys(found))


def _alias(entry: catalog.Entry, text: str) -> list[str]:
    """The values of ``Name = Literal[…]`` in this file or in the file of the package that it is imported from."""
    head, _, tail = text.partition(".")
    trees = [entry.tree]
    for node in entry.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("etude"):
            for alias in node.names:
                if head == (alias.asname or alias.name):
                    name = f"{node.module}.{alias.name}" if tail else node.module
                    place = catalog.PACKAGE.joinpath(*name.split(".")[1:])
                    files = (place.with_suffix(".py"), place / "__init__.py")
                    trees += [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    wanted = tail or head
    for tree in trees:
        for node in tree.body:
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == wanted
            if named and isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) == "Literal":
                return [str(part.value) for part in ast.walk(node.value.slice) if isinstance(part, ast.Constant)]
    return []


def _sample_flags(run: str) -> list[str]:
    """The flags of `etude sample` for this run: the fields of its method's Sample."""
    try:
        entry = opened(run).entry
    except UserError:
        return []
    return [field["name"].replace("_", "-") for field in catalog.class_fields(entry.tree, "Sample")]


def _runs() -> list[str]:
    return ["latest", *(str(folder) for folder in list_runs(runs_folder()))]


def _datasets() -> list[str]:
    from etude import data as room

    return room.names()


def _flags(names: Iterable[str]) -> list[str]:
    return ["--" + name for name in names]
