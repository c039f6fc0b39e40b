"""Completion of names and flags in the shell."""

from __future__ import annotations

import os
from pathlib import Path

from etude import catalog
from etude.cli.shared import VERBS, Parser

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


def candidates(words: list[str]) -> list[str]:
    """What can stand where the last word stands: verbs, method names, runs, presets, flags, datasets."""
    done, last = words[:-1], words[-1] if words else ""
    if not done:
        options = list(VERBS)
    elif done[0] in ("run", "info", "copy", "list", "verify") and len(done) == 1:
        options = [*catalog.entries()] + (
            sorted({e.room for e in catalog.entries().values()}) if done[0] in ("list", "verify") else []
        )
    elif done[0] in ("resume", "show", "sample") and len(done) == 1:
        root = Path(os.environ.get("ETUDE_RUNS", "runs"))
        options = ["latest", *(str(file.parent) for file in root.glob("*/*/*/config.json"))]
    elif done[0] == "data" and len(done) == 1:
        options = ["list", "get", "check"]
    elif done[0] == "data" or (done[0] == "run" and done[1] in catalog.entries() and done[-1] == "--data"):
        from etude import data as room

        options = room.names()
    elif done[0] == "run" and done[1] in catalog.entries():
        entry = catalog.find(done[1])
        if done[-1] == "--preset":
            options = list(entry.presets)
        else:
            own = [field["name"].replace("_", "-") for field in entry.fields]
            options = ["--" + name for name in (*own, *COMMON)]
    else:
        options = []
    return [option for option in options if option.startswith(last)]
