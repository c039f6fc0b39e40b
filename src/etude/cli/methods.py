"""The commands about methods: what there is, what each one promises, what was proved, and how to take one."""

from __future__ import annotations

import ast
import fnmatch
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from etude import catalog
from etude.cli.shared import BADGES, Parser, console, plain, print_json, table
from etude.core import own
from etude.core.errors import UserError, nearest


def list_(words: list[str]) -> int:
    parser = Parser("list")
    parser.add_argument("room", nargs="?", help="only this room, or names that contain this text")
    parser.add_argument(
        "--json", action="store_true", help="a list of {name, title, room, section, paper, badge, needs}"
    )
    parser.add_argument("--names", action="store_true", help="names only")
    parser.add_argument(
        "--notes",
        action="store_true",
        help="the 197 systems of the lecture notes, and which method shows each; with --json a list of {chapter, section, "
        "system, where, test, badge}",
    )
    options = parser.parse_args(words)
    if options.notes:
        return _notes(options.room, options.json)
    found = _matching(options.room)
    if options.json:
        print_json([entry.summary() for entry in found])
    elif options.names:
        print("\n".join(entry.name for entry in found))
    else:
        grid = table("method", "evidence", "what it does")
        for column in grid.columns[:2]:
            column.no_wrap = True
        for entry in found:
            colour = BADGES[entry.badge]
            missing = f" [yellow](needs {', '.join(entry.missing)})[/]" if entry.missing else ""
            grid.add_row(f"[bold]{entry.name}[/]", f"[{colour}]{entry.badge}[/]", plain(entry.title) + missing)
        screen = console()
        screen.print(grid)
        if sys.stdout.isatty():
            screen.print(f"\n[dim]{len(found)} methods · etude info NAME · etude run NAME[/]")
    return 0


def _notes(text: str | None, as_json: bool) -> int:
    """The systems of the notes, those of one chapter, section or name where `text` is given."""
    rows = [row for row in catalog.systems() if text is None or text.lower() in " ".join(row.values()).lower()]
    if not rows:
        raise UserError(f"no system of the notes matches '{text}'; leave it out to see all 197")
    if as_json:
        print_json(rows)
        return 0
    grid = table("section", "system", "where", "evidence")
    for column in (0, 2, 3):
        grid.columns[column].no_wrap = True
    chapter = ""
    for row in rows:
        if row["chapter"] != chapter:
            chapter = row["chapter"]
            grid.add_row("", f"[bold]{chapter}[/]", "", "")
        colour = BADGES.get(row["badge"], "yellow" if row["missing"] else "dim")
        lacks = f" [dim]({plain(row['missing'])})[/]" if row["missing"] else ""
        grid.add_row(row["section"], plain(row["system"]) + lacks, row["where"], f"[{colour}]{row['badge']}[/]")
    console().print(grid)
    done = sum(row["where"] != "" and not row["missing"] for row in rows)
    part = sum(row["missing"] != "" for row in rows)
    console().print(f"\n[dim]{done} of {len(rows)} systems are shown by a method, {part} in part[/]")
    return 0


def info(words: list[str]) -> int:
    parser = Parser("info")
    parser.add_argument("method")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    entry = catalog.find(options.method)
    if options.json:
        more: dict[str, Any] = {"contract": entry.contract, "fields": entry.fields, "presets": entry.presets}
        more["numbers"] = dict(entry.numbers)
        evidence = {"experiments": entry.experiments, "card": entry.card, "source": str(entry.path)}
        print_json(entry.summary() | more | evidence)
        return 0
    screen = console()
    colour = BADGES[entry.badge]
    screen.print(f"[bold]{entry.name}[/]  [{colour}]{entry.badge}[/]\n{entry.title}", soft_wrap=True)
    for heading, text in entry.contract.items():
        if heading != "claim" and text:
            screen.print(f"\n[bold]{heading}[/]")
            screen.print(text, markup=False)
    rest = entry.contract["claim"].partition("\n")[2].strip()
    if rest:
        screen.print("\n" + rest, markup=False)
    screen.print("\n[bold]Settings[/]")
    grid = table()
    for field in entry.fields:
        grid.add_row(
            f"--{field['name'].replace('_', '-')}",
            f"[cyan]{field['default']}[/]",
            plain(field["help"] + _choices(field["type"])),
        )
    screen.print(grid)
    screen.print("\n[bold]Presets[/]")
    grid = table()
    for name, preset in entry.presets.items():
        grid.add_row(name, plain(preset["changes"]), f"[dim]{preset['expect']}[/]")
    screen.print(grid)
    if entry.numbers:
        screen.print("\n[bold]Numbers[/]")
        grid = table()
        for name, said in entry.numbers:
            grid.add_row(f"[cyan]{name}[/]", plain(said))
        screen.print(grid)
    screen.print("\n[bold]Evidence[/]")
    screen.print(_evidence_table(entry) if entry.card else _no_evidence(entry))
    screen.print(f"\n[bold]Source[/]\n{entry.path}", soft_wrap=True)
    return 0


def verify(words: list[str]) -> int:
    parser = Parser("verify")
    parser.add_argument("pattern", nargs="?", help="a method, a room or a wildcard; default: all with experiments")
    parser.add_argument(
        "--replay", action="store_true", help="only run the traces of stale cards; renew those that agree"
    )
    parser.add_argument("--settings", action="store_true", help="only change every setting once (no card is written)")
    parser.add_argument("--seeds", type=int, help="how many of the recorded seeds (no card is written)")
    parser.add_argument("--experiment", help="only the experiment of this name (no card is written)")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--json", action="store_true", help="print the cards")
    options = parser.parse_args(words)
    from etude.core import evidence

    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; it must be a whole number at least 1")
    chosen = [entry for entry in _matching(options.pattern) if entry.experiments]
    if not chosen:
        raise UserError(f"no method matching '{options.pattern}' has recorded experiments")
    if options.settings:
        found = {entry.name: evidence.check_settings(entry) for entry in chosen}
        if options.json:
            print_json(found)
        return int(any(row["state"] in ("nothing", "refused") for rows in found.values() for row in rows.values()))
    cards: list[dict[str, Any]] = []
    for entry in chosen:
        if options.replay:
            card, said = evidence.replay(entry)
            evidence.say(f"{entry.name}: {said}")
            cards.append(card or {"name": entry.name, "badge": entry.badge})
        else:
            cards.append(evidence.verify(entry, options.seeds, options.experiment, options.keep))
    if options.json:
        print_json(cards)
    else:
        screen = console()
        for card in cards:
            screen.print(f"[bold]{card['name']}[/]  [{BADGES[card['badge']]}]{card['badge']}[/]")
    return 0 if all(card["badge"] == "verified" for card in cards) else 1


def bench(words: list[str]) -> int:
    parser = Parser("bench")
    parser.add_argument("pattern", nargs="?", help="a room (core, optim, games, …); default: all")
    parser.add_argument(
        "--json", action="store_true", help="a list of {name, peer, peer_version, ratio, low, high, bar, equal}"
    )
    parser.add_argument("--recorded", action="store_true", help="show the recorded rows without running anything")
    options = parser.parse_args(words)
    from etude.core import evidence

    rows = evidence.bench(options.pattern, run=not options.recorded)
    if options.json:
        print_json(rows)
        return 0
    grid = table("what", "ratio", "low – high", "bar", "peer", "equal")
    for row in rows:
        colour = "green" if row["ratio"] >= row["bar"] else "red"
        spread = f"{row['low']:.2f} – {row['high']:.2f}"
        peer = f"{row['peer']} {row['peer_version']}"
        grid.add_row(row["name"], f"[{colour}]{row['ratio']:.2f}x[/]", spread, f"{row['bar']}x", peer, row["equal"])
    console().print(grid)
    return 0 if all(row["ratio"] >= row["bar"] for row in rows) else 1


def copy(words: list[str]) -> int:
    parser = Parser("copy")
    parser.add_argument("method")
    parser.add_argument("file", type=Path, help="FILE.py; or FOLDER, where the method is a folder of several files")
    options = parser.parse_args(words)
    entry = catalog.find(options.method)
    several = entry.path.name == own.LOOP
    stem = entry.path.parent.name if several else entry.path.stem
    target = options.file
    if target.is_dir():
        target = target / (stem if several else f"{stem}.py")
    if target.exists():
        raise UserError(f"{target} exists already; name another {'folder' if several else 'file'}")
    if target.suffix != ".py" and not several:
        raise UserError(f"{target} must end in .py, so that 'etude run {target}.py' can take it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".py":
            shutil.copyfile(entry.path, target)
        else:
            own.copy_folder(entry.path.parent, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror})") from error
    shown = target if target.is_absolute() else f"./{target}"
    beside = ", ".join(path.name for path in sorted(entry.path.parent.glob("[!_]*.py")) if path != entry.path)
    if several and target.suffix == ".py" and beside:
        print(f"it goes on using {beside} of etude; to have those too: etude copy {entry.name} FOLDER", file=sys.stderr)
    print(f"{target}\nnext: etude run {shlex.quote(str(shown))} --preset tiny")
    return 0


def _matching(pattern: str | None) -> list[catalog.Entry]:
    """Entries of a room, or whose name contains the text or matches it as a wildcard; nothing found is a mistake."""
    known = list(catalog.entries().values())
    if pattern is None:
        return known
    text = pattern.rstrip("/")
    found = [e for e in known if e.room == text or e.name == text] or [
        e for e in known if text in e.name or fnmatch.fnmatch(e.name, text)
    ]
    if not found:
        raise UserError(
            f"no method matches '{pattern}'{nearest(text, [*(e.name for e in known), *(e.room for e in known)])}"
        )
    return found


def _choices(type_: str) -> str:
    """What a setting may be, where its type says so."""
    try:
        names = ast.literal_eval("[" + type_.removeprefix("Literal[")) if type_.startswith("Literal[") else []
    except (SyntaxError, ValueError):
        names = []
    return f" ({', '.join(map(str, names))})" if names else ""


def _no_evidence(entry: catalog.Entry) -> str:
    if isinstance(entry, own.Own):
        return "none: what stands here for the methods of etude is not said of a file of your own"
    return f"none recorded yet; write it with: etude verify {entry.name}"


def _evidence_table(entry: catalog.Entry) -> Any:
    card = entry.card or {}
    grid = table("experiment", "metric", "measured", "bar", "published", "seconds", "")
    for row in card.get("experiments", []):
        measured = f"{row['mean']:.4g} ± {row['spread']:.2g}" if row.get("mean") is not None else "failed"
        sign = {"higher": "≥", "lower": "≤"}.get(row["better"], "=")
        bar = f"{sign} {row['bar']:g}" + (f" ± {row['tolerance']:g}" if row["better"] == "near" else "")
        seconds = f"{max(row['seconds']):.0f}" if row.get("seconds") else ""
        mark = "[green]✓[/]" if row["passed"] else "[red]✗[/]"
        grid.add_row(row["name"], row["metric"], measured, bar, row.get("published", ""), seconds, mark)
        for control in row.get("controls", ()):
            values = [value for value in control["values"] if value is not None]
            measured = f"{sum(values) / len(values):.4g}" if values else "failed"
            mark = "[green]fails the bar[/]" if control["held"] else "[red]clears the bar[/]"
            grid.add_row(f"[dim]  control: {plain(control['name'])}[/]", "", f"[dim]{measured}[/]", "", "", "", mark)
    return grid
