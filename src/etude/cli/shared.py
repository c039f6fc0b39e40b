"""What all commands share: the list of them, the parser of their words, and the way they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from etude.core.errors import UserError, nearest

# every command and what it does, in the order in which `etude --help` shows them
VERBS = {
    "list": "every method, one line each: name, evidence, what it does",
    "info": "the contract of a method: equation, paper, differences, settings, presets, evidence, source file",
    "run": "run a method on real data: etude run METHOD [--preset P] [--data D] [--FLAG VALUE …]",
    "resume": "continue a run exactly where it stopped, or train it longer: etude resume RUN [--steps N]",
    "show": "open the report of a run, and print its result",
    "runs": "the runs that are there, with their state and result: etude runs [METHOD]",
    "compare": "curves laid over each other and the settings that differ, on one page: etude compare RUN RUN …",
    "predict": "the trained network on your own pictures: etude predict RUN FILE … (names and probabilities)",
    "sample": "draw from a trained run: etude sample RUN [--count N …]",
    "export": "the trained network with its preprocessing as a torch.export program and ONNX: etude export RUN",
    "verify": "run the recorded experiments again, hold them against their bars and write the cards",
    "bench": "time us against the peer library, side by side",
    "data": "datasets: etude data list | get NAME … | check [NAME …]",
    "copy": "take a method's file and make it yours: etude copy METHOD FILE.py",
    "doctor": "versions, devices, extras, writable folders: what to fix",
    "completion": 'shell completion for names and flags: eval "$(etude completion bash)"',
}
BADGES = {"verified": "green", "runs": "yellow", "stale": "yellow", "broken": "red", "unproved": "dim"}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence with the nearest match."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=f"etude {name}", description=VERBS[name], allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [option for action in self._actions for option in action.option_strings]
            word = rest[0].partition("=")[0]
            raise UserError(f"{self.prog} does not understand '{word}'{nearest(word, flags)} ({self.prog} --help)")
        return known

    def error(self, message: str) -> NoReturn:
        wrong, _, choices = message.partition(" (choose from ")
        if choices:  # "argument action: invalid choice: 'chek' (choose from 'list', 'get', 'check')"
            word = wrong.rpartition(": ")[2].strip("'")
            known = [choice.strip(" ')") for choice in choices.split(",")]
            raise UserError(
                f"{self.prog}: '{word}' is none of {', '.join(known)}{nearest(word, known)} ({self.prog} --help)"
            )
        raise UserError(f"{self.prog}: {message} ({self.prog} --help)")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def table(*headings: str) -> Any:
    """An empty table without lines; without headings, the caller's columns alone."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="dim", show_header=bool(headings))
    for heading in headings:
        made.add_column(heading)
    return made


def plain(text: str) -> str:
    """Text as it is: a bracket in it is no markup."""
    return text.replace("[", "\\[")


def open_page(path: Path) -> None:
    """Show a page in the browser, where there is a terminal and a screen."""
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
