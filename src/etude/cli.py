"""The command line: `etude VERB …`. Verbs that need no network import no torch and answer at once.

Exit codes: 0 done; 1 the run or a verification failed; 2 the input was wrong; 130/143 interrupted with the state saved.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from etude import __version__, catalog
from etude.core.errors import RunError, UserError, nearest

VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {}
BADGES = {"verified": "green", "runs": "yellow", "broken": "red", "unproved": "dim"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; every foreseeable mistake is one sentence on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(words)
    except UserError as error:
        return _say_error(error, 2)
    except RunError as error:
        return _say_error(error, 1)
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "code", 130)
    except BrokenPipeError:  # `etude list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say_error(f"{error.filename}: {error.strerror}" if error.filename else error, 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"etude {__version__}")
        return 0
    if words[0] == "__complete":
        print("\n".join(candidates(words[1:])))
        return 0
    if words[0] not in VERBS:
        raise UserError(f"there is no command '{words[0]}'{nearest(words[0], VERBS)} ('etude --help' lists them)")
    return VERBS[words[0]][1](words[1:])


def _say_error(error: Exception | str, code: int) -> int:
    print(f"etude: {error}".replace("\n", " "), file=sys.stderr)
    return code


def _overview() -> str:
    lines = ["etude: every canonical method of deep learning as one short file, readable, proved and fast", ""]
    lines += ["usage: etude COMMAND …     ('etude COMMAND --help' says more)", ""]
    lines += [f"  {verb:<11} {text}" for verb, (text, _) in VERBS.items()]
    lines += ["", "first steps:", "  etude list", "  etude run vision/lenet", "  etude show latest"]
    return "\n".join(lines)


def verb(name: str, text: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    def mark(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        VERBS[name] = (text, function)
        return function

    return mark


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence with the nearest match."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=f"etude {name}", description=VERBS[name][0], allow_abbrev=False)

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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


# ------------------------------------------------------------------------------------------------- what there is


@verb("list", "every method, one line each: name, evidence, what it does")
def list_(words: list[str]) -> int:
    parser = _Parser("list")
    parser.add_argument("room", nargs="?", help="only this room, or names that contain this text")
    parser.add_argument(
        "--json", action="store_true", help="a list of {name, title, room, section, paper, badge, needs}"
    )
    parser.add_argument("--names", action="store_true", help="names only")
    options = parser.parse_args(words)
    found = _matching(options.room)
    if options.json:
        _print_json([entry.summary() for entry in found])
    elif options.names:
        print("\n".join(entry.name for entry in found))
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("method", no_wrap=True)
        table.add_column("evidence", no_wrap=True)
        table.add_column("what it does")
        for entry in found:
            colour = BADGES[entry.badge]
            missing = f" [yellow](needs etude\\[{','.join(entry.missing)}])[/]" if entry.missing else ""
            table.add_row(
                f"[bold]{entry.name}[/]", f"[{colour}]{entry.badge}[/]", entry.title.replace("[", "\\[") + missing
            )
        console = _console()
        console.print(table)
        if sys.stdout.isatty():
            console.print(f"\n[dim]{len(found)} methods · etude info NAME · etude run NAME[/]")
    return 0


def _matching(pattern: str | None) -> list[catalog.Entry]:
    """Entries of a room, or whose name contains the text or matches it as a wildcard; nothing found is a mistake."""
    import fnmatch

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


@verb("info", "the contract of a method: equation, paper, differences, settings, presets, evidence, source file")
def info(words: list[str]) -> int:
    parser = _Parser("info")
    parser.add_argument("method")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    entry = catalog.find(options.method)
    if options.json:
        more = {"contract": entry.contract, "fields": entry.fields, "presets": entry.presets}
        evidence = {"experiments": entry.experiments, "card": entry.card, "source": str(entry.path)}
        _print_json(entry.summary() | more | evidence)
        return 0
    from rich.table import Table

    console = _console()
    colour = BADGES[entry.badge]
    console.print(f"[bold]{entry.name}[/]  [{colour}]{entry.badge}[/]\n{entry.title}", soft_wrap=True)
    for heading, text in entry.contract.items():
        if heading != "claim" and text:
            console.print(f"\n[bold]{heading}[/]")
            console.print(text, markup=False)
    rest = entry.contract["claim"].partition("\n")[2].strip()
    if rest:
        console.print("\n" + rest, markup=False)
    console.print("\n[bold]Settings[/]")
    table = Table(box=None, pad_edge=False, show_header=False)
    for field in entry.fields:
        table.add_row(
            f"--{field['name'].replace('_', '-')}", f"[cyan]{field['default']}[/]", field["help"].replace("[", "\\[")
        )
    console.print(table)
    console.print("\n[bold]Presets[/]")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, preset in entry.presets.items():
        table.add_row(name, preset["changes"].replace("[", "\\["), f"[dim]{preset['expect']}[/]")
    console.print(table)
    console.print("\n[bold]Evidence[/]")
    console.print(
        _evidence_table(entry) if entry.card else f"none recorded yet; write it with: etude verify {entry.name}"
    )
    console.print(f"\n[bold]Source[/]\n{entry.path}", soft_wrap=True)
    return 0


def _evidence_table(entry: catalog.Entry) -> Any:
    from rich.table import Table

    card = entry.card or {}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("experiment", "metric", "measured", "bar", "published", "seconds", ""):
        table.add_column(heading)
    for row in card.get("experiments", []):
        measured = f"{row['mean']:.4g} ± {row['spread']:.2g}" if row.get("mean") is not None else "failed"
        sign = "≥" if row["better"] == "higher" else "≤"
        seconds = f"{max(row['seconds']):.0f}" if row.get("seconds") else ""
        mark = "[green]✓[/]" if row["passed"] else "[red]✗[/]"
        table.add_row(
            row["name"], row["metric"], measured, f"{sign} {row['bar']}", row.get("published", ""), seconds, mark
        )
    return table


# --------------------------------------------------------------------------------------------------------- runs


@verb("run", "run a method on real data: etude run METHOD [--preset P] [--data D] [--FLAG VALUE …]")
def run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print("usage: etude run METHOD [--preset P] [--out DIR] [--FLAG VALUE …]\n")
            print("'etude run METHOD --help' shows its flags; 'etude list' the methods")
            return 0
        raise UserError("name the method to run, as in: etude run vision/lenet ('etude list' shows all)")
    entry = catalog.find(words[0])
    module = catalog.load_method(entry)
    from etude.core import launch

    settings = parse_settings(entry, module, words[1:])
    out = Path(settings.launch.out) if settings.launch.out else None
    finished = launch.start(entry, module, settings.config, settings.common, settings.launch.preset, out)
    _closing(finished, entry, module)
    return 0


@verb("resume", "continue an interrupted run exactly where it stopped: etude resume RUN")
def resume(words: list[str]) -> int:
    parser = _Parser("resume")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    options = parser.parse_args(words)
    from etude.core import launch

    folder = launch.find_run(options.run)
    entry = catalog.find(launch.read_config(folder)["method"])
    if (folder / "done").is_file():
        print(f"{folder} has already finished; nothing to continue", file=sys.stderr)
    finished = launch.resume(folder)
    _closing(finished, entry, catalog.load_method(entry))
    return 0


def _closing(finished: Any, entry: catalog.Entry, module: Any) -> None:
    """The last lines of a run: its metrics, its folder and the next command to try (rank 0 only)."""
    if int(os.environ.get("RANK", 0)):
        return
    for name, value in finished.metrics.items():
        print(
            f"{name.replace('_', ' ')}: {value:.4f}"
            if abs(value) >= 1e-3 or value == 0
            else f"{name.replace('_', ' ')}: {value:.3e}"
        )
    after = f"etude sample {finished.folder}" if hasattr(module, "sample") else f"etude show {finished.folder}"
    print(f"\nrun:  {finished.folder}\nnext: {after}")


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run starts from and where it goes."""

    preset: str = "default"
    """Named settings to start from ('etude info METHOD' lists them)."""
    out: str | None = None
    """New folder for the run (default: runs/<method>/<date>-<seed>)."""


def parse_settings(entry: catalog.Entry, module: Any, words: list[str]) -> Any:
    """Parse the flags of one method: its Config from the chosen preset, the common flags, and the launch flags."""
    import tyro

    from etude.core.config import check
    from etude.core.run import Common

    preset = next((b for a, b in itertools.pairwise(words) if a == "--preset"), None) or next(
        (word.partition("=")[2] for word in words if word.startswith("--preset=")), "default"
    )
    if preset not in module.PRESETS:
        known = ", ".join(module.PRESETS)
        raise UserError(f"{entry.name} has no preset '{preset}'{nearest(preset, module.PRESETS)} (it has {known})")
    parts = {"config": module.PRESETS[preset], "launch": Launch(preset=preset), "common": Common()}
    shape = dataclasses.make_dataclass("Settings", [(name, type(part)) for name, part in parts.items()], frozen=True)
    settings = _tyro(
        tyro.conf.OmitArgPrefixes[shape], shape(**parts), parts, words, f"etude run {entry.name}", entry.title
    )
    check(settings.config)
    check(settings.common)
    return settings


def _tyro(kind: Any, default: Any, parts: dict[str, Any], words: list[str], prog: str, description: str) -> Any:
    """tyro's parser with its boxes replaced by one sentence (a request for help passes through)."""
    import tyro

    if any(word in ("-h", "--help") for word in words):
        return tyro.cli(kind, default=default, args=words, prog=prog, description=description)
    trouble = io.StringIO()
    try:
        with contextlib.redirect_stderr(trouble), contextlib.redirect_stdout(trouble):
            return tyro.cli(kind, default=default, args=words, prog=prog, description=description)
    except SystemExit:
        raise UserError(_explain(parts, words, prog) or _first_sentence(trouble.getvalue())) from None


def _explain(parts: dict[str, Any], words: list[str], prog: str) -> str:
    """Which flag or value the parser refused, in one sentence."""
    from etude.core.config import describe, flag

    hints: dict[str, Any] = {}
    for part in parts.values():
        for name, hint in typing.get_type_hints(type(part), include_extras=True).items():
            hints[flag(name)] = hint
    allowed = {*hints, *(flag("no_" + name[2:]) for name, hint in hints.items() if hint is bool)}
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name.lstrip("-").replace(".", "").isdigit():
            if position == 0:
                return f"{prog}: '{word}' stands where a flag should; flags begin with -- ({prog} --help)"
            continue
        if name.replace("_", "-") not in allowed:
            return f"{prog} has no flag '{name}'{nearest(name, allowed)} ({prog} --help)"
        hint = hints.get(name.replace("_", "-"), bool)
        values = [value] if equals else []
        for after in words[position + 1 :]:
            if after.startswith("--"):
                break
            values.append(after)
        if hint is bool:
            if values:
                return f"{name} takes no value, but '{values[0]}' follows it ({prog} --help)"
        elif not values:
            return f"{name} needs a value: {describe(hint)}"
        elif not all(_reads_as(text, hint) for text in values) or ("tuple" not in str(hint) and len(values) > 1):
            return f"{name} is '{' '.join(values)}'; it must be {describe(hint)}"
    return ""


def _reads_as(text: str, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated or origin is tuple:
        return _reads_as(text, arguments[0])
    if origin is typing.Literal:
        return text in map(str, arguments)
    if arguments:
        return any(_reads_as(text, part) if part is not type(None) else text == "None" for part in arguments)
    try:
        return bool(hint is str or hint(text) is not None)
    except (TypeError, ValueError):
        return False


def _first_sentence(box: str) -> str:
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    return lines[0] if lines else "the flags could not be read; try --help"


@verb("show", "open the report of a run, and print its result")
def show(words: list[str]) -> int:
    parser = _Parser("show")
    parser.add_argument("run", nargs="?", default="latest", help="a run folder, a method's name or 'latest'")
    parser.add_argument("--no-open", action="store_true", help="do not start a browser")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard event files into the run folder"
    )
    parser.add_argument("--json", action="store_true", help="print config, result and state as JSON")
    options = parser.parse_args(words)
    from etude.core import launch, record

    folder = launch.find_run(options.run)
    described = launch.read_config(folder)
    entry = catalog.find(described["method"])
    path = launch.write_report(entry, folder)
    state = "done" if (folder / "done").is_file() else "failed" if (folder / "failed").is_file() else "unfinished"
    result_file = folder / "result.json"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
    if options.tensorboard:
        print(f"tensorboard --logdir {record.to_tensorboard(folder)}", file=sys.stderr)
    if options.json:
        _print_json({"run": str(folder), "state": state, "result": result, "report": str(path), **described})
        return 0
    print(f"{described['method']}  {state}\n{described['command']}")
    last = result or ({k: v for row in record.read_metrics(folder) for k, v in row.items()})
    for name, value in last.items():
        print(f"  {name.replace('_', ' '):<20} {value:.6g}")
    if state == "failed":
        print("  " + (folder / "failed").read_text(encoding="utf-8").splitlines()[0])
    if state != "done":
        print(f"continue with: etude resume {folder}")
    print(path)
    if (
        not options.no_open
        and sys.stdout.isatty()
        and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32"))
    ):
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0


@verb("sample", "draw from a trained run: etude sample RUN [--count N …]")
def sample(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: etude sample RUN [--FLAG VALUE …]\n")
        print("'etude sample RUN --help' shows the flags of that run's method; RUN may be 'latest'")
        return 0
    if not words or words[0].startswith("-"):
        raise UserError("name the run to draw from, as in: etude sample latest")
    from etude.core import launch

    folder = launch.find_run(words[0])
    entry = catalog.find(launch.read_config(folder)["method"])
    module = catalog.load_method(entry)
    if not hasattr(module, "sample"):
        raise UserError(f"{entry.name} learns no distribution to draw from; see its results with: etude show {folder}")
    from etude.core.config import check

    default = module.Sample()
    options = _tyro(module.Sample, default, {"options": default}, words[1:], f"etude sample {words[0]}", entry.title)
    check(options)
    target = folder / "samples"
    target.mkdir(exist_ok=True)
    text = module.sample(launch.load(folder), options, target)
    if text:
        print(text)
    written = sorted(target.iterdir())
    if written:
        print(f"\nfiles: {target}/ ({', '.join(path.name for path in written[-4:])})")
    else:
        target.rmdir()
    return 0


# ------------------------------------------------------------------------------------------------------ evidence


@verb("verify", "run the recorded experiments again, hold them against their bars and write the cards")
def verify(words: list[str]) -> int:
    parser = _Parser("verify")
    parser.add_argument("pattern", nargs="?", help="a method, a room or a wildcard; default: all with experiments")
    parser.add_argument("--seeds", type=int, help="how many of the recorded seeds (a card needs all)")
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
    cards = [
        evidence.verify(entry, seeds=options.seeds, only=options.experiment, keep=options.keep) for entry in chosen
    ]
    if options.json:
        _print_json(cards)
    else:
        console = _console()
        for card in cards:
            console.print(f"[bold]{card['name']}[/]  [{BADGES[card['badge']]}]{card['badge']}[/]")
    return 0 if all(card["badge"] == "verified" for card in cards) else 1


@verb("bench", "time us against the peer library, side by side")
def bench(words: list[str]) -> int:
    parser = _Parser("bench")
    parser.add_argument("pattern", nargs="?", help="a room (core, optim, games, …); default: all")
    parser.add_argument(
        "--json", action="store_true", help="a list of {name, peer, peer_version, ratio, low, high, bar, equal}"
    )
    parser.add_argument("--recorded", action="store_true", help="show the recorded rows without running anything")
    options = parser.parse_args(words)
    from etude.core import evidence

    rows = evidence.bench(options.pattern, run=not options.recorded)
    if options.json:
        _print_json(rows)
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("what", "ratio", "low – high", "bar", "peer", "equal"):
        table.add_column(heading)
    for row in rows:
        colour = "green" if row["ratio"] >= row["bar"] else "red"
        spread = f"{row['low']:.2f} – {row['high']:.2f}"
        peer = f"{row['peer']} {row['peer_version']}"
        table.add_row(row["name"], f"[{colour}]{row['ratio']:.2f}x[/]", spread, f"{row['bar']}x", peer, row["equal"])
    _console().print(table)
    return 0 if all(row["ratio"] >= row["bar"] for row in rows) else 1


# ------------------------------------------------------------------------------------------------- the rest


@verb("data", "datasets: etude data list | get NAME … | check [NAME …]")
def data(words: list[str]) -> int:
    parser = _Parser("data")
    parser.add_argument("action", choices=("list", "get", "check"))
    parser.add_argument("names", nargs="*", help="datasets (default for check: all that are present)")
    parser.add_argument("--from", dest="base", metavar="URL", help="for get: a mirror laid out as URL/<dataset>/<file>")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    from rich.table import Table

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
        _print_json(rows)
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in shown[0] if shown else ():
            table.add_column(heading)
        for row in shown:
            table.add_row(*(str(value).replace("[", "\\[") for value in row.values()))
        console = _console()
        console.print(table)
        console.print(f"\n[dim]datasets lie in {room.home()} (set ETUDE_DATA to change)[/]", soft_wrap=True)
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


@verb("copy", "take a method's file and make it yours: etude copy METHOD FILE.py")
def copy(words: list[str]) -> int:
    parser = _Parser("copy")
    parser.add_argument("method")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(words)
    entry = catalog.find(options.method)
    target = options.file / f"{entry.path.stem}.py" if options.file.is_dir() else options.file
    if target.exists():
        raise UserError(f"{target} exists already; name another file")
    if target.suffix != ".py":
        raise UserError(f"{target} must end in .py, so that 'etude run {target}.py' can take it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.path, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror})") from error
    shown = target if target.is_absolute() else f"./{target}"
    print(f"{target}\nnext: etude run {shown} --preset tiny")
    return 0


@verb("doctor", "versions, devices, extras, writable folders: what to fix")
def doctor(words: list[str]) -> int:
    parser = _Parser("doctor")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    from etude.doctor import examine

    rows = examine()
    if options.json:
        _print_json(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fix": "[red]fix[/]"}
        for row in rows:
            table.add_row(marks[row["state"]], row["what"], row["detail"].replace("[", "\\["))
        _console().print(table)
    return 1 if any(row["state"] == "fix" for row in rows) else 0


@verb("completion", 'shell completion for names and flags: eval "$(etude completion bash)"')
def completion(words: list[str]) -> int:
    parser = _Parser("completion")
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
    elif done[0] == "data":
        from etude import data as room

        options = room.names()
    elif done[0] == "run" and done[1] in catalog.entries():
        entry = catalog.find(done[1])
        if done[-1] == "--preset":
            options = list(entry.presets)
        elif done[-1] == "--data":
            from etude import data as room

            options = room.names()
        else:
            common = (
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
            )
            options = ["--" + field["name"].replace("_", "-") for field in entry.fields] + [
                "--" + name for name in common
            ]
    else:
        options = []
    return [option for option in options if option.startswith(last)]


if __name__ == "__main__":
    sys.exit(main())
