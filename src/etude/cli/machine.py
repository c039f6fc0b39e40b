"""The commands about this machine: the datasets on it, and whether all that etude needs is there."""

from __future__ import annotations

import sys
from typing import Any

from etude.cli.shared import Parser, console, plain, print_json, table
from etude.core.errors import UserError


def data(words: list[str]) -> int:
    parser = Parser("data")
    parser.add_argument("action", choices=("list", "get", "check"))
    parser.add_argument("names", nargs="*", help="datasets (default for check: all that are present)")
    parser.add_argument("--from", dest="base", metavar="URL", help="for get: a mirror laid out as URL/<dataset>/<file>")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    from etude import data as room

    if options.action == "get" and not options.names:
        raise UserError("name what to fetch, as in: etude data get mnist ('etude data list' shows all)")
    if options.action == "list":
        rows = room.catalogue()
        shown = [
            {name: row[name] for name in ("name", "state", "kind")}
            | {"MB": _megabytes(row["bytes"]), "title": row["title"]}
            for row in rows
        ]
    else:
        rows = shown = _fetch(options.names, options.base) if options.action == "get" else room.check(options.names)
    if options.json:
        print_json(rows)
    else:
        grid = table(*(shown[0] if shown else ()))
        for row in shown:
            grid.add_row(*(plain(str(value)) for value in row.values()))
        screen = console()
        screen.print(grid)
        screen.print(f"\n[dim]datasets lie in {room.home()} (set ETUDE_DATA to change)[/]", soft_wrap=True)
    return 1 if options.action != "list" and any(row["state"] in ("damaged", "missing") for row in rows) else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size else ""


def _fetch(names: list[str], base: str | None) -> list[dict[str, str]]:
    """Download with one bar a file (plain silence when the output is not a terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from etude import data as room

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done)

        return room.get(names, base=base, progress=progress)


def doctor(words: list[str]) -> int:
    parser = Parser("doctor")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    from etude.doctor import examine

    rows = examine()
    if options.json:
        print_json(rows)
    else:
        grid = table()
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fix": "[red]fix[/]"}
        for row in rows:
            grid.add_row(marks[row["state"]], row["what"], plain(row["detail"]))
        console().print(grid)
    return 1 if any(row["state"] == "fix" for row in rows) else 0
