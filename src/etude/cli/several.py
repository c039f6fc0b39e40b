"""The commands about several runs, and about taking a trained network elsewhere: runs, compare, export."""

from __future__ import annotations

import shlex
from pathlib import Path

from etude import catalog
from etude.cli.runs import TRUST, shown
from etude.cli.shared import Parser, console, plain, print_json, table
from etude.core import ledger, own
from etude.core.errors import UserError
from etude.core.folder import find_run, guard, runs_folder

STATES = {"done": "green", "failed": "red", "running": "cyan", "unfinished": "yellow", "damaged": "red"}


def runs(words: list[str]) -> int:
    parser = Parser("runs")
    parser.add_argument("method", nargs="?", help="only runs of this method, or whose name contains this text")
    parser.add_argument(
        "--json", action="store_true", help="a list of {run, method, preset, seed, state, step, headline, …}"
    )
    options = parser.parse_args(words)
    root = runs_folder()
    wanted = catalog.find(options.method).name if own.is_own(options.method or "") else options.method or ""
    found = [row for row in ledger.rows(root) if wanted in row["method"]]
    if options.json:
        print_json(found)
        return 0
    if not found:
        what = f" of '{options.method}'" if options.method else ""
        raise UserError(f"there is no run{what} under {root}/; 'etude run METHOD' makes one")
    grid = table("run", "state", "step", "result", "started")
    grid.columns[0].no_wrap = True
    for row in found:
        result = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in row["headline"].items())
        state = f"[{STATES[row['state']]}]{row['state']}[/]"
        grid.add_row(plain(row["run"]), state, f"{row['step']:,}", plain(result), row["started"][:16].replace("T", " "))
    console().print(grid)
    return 0


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def compare(words: list[str]) -> int:
    parser = Parser("compare")
    parser.add_argument("runs", nargs="+", metavar="run", help="run folders, methods' names (their latest runs)")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page (default: compare.html here)")
    parser.add_argument("--no-open", action="store_true", help="do not start a browser")
    options = parser.parse_args(words)
    from etude.core.report.compare import MOST, compare

    folders = [find_run(run) for run in options.runs]
    if not 2 <= len(folders) <= MOST:
        raise UserError(f"compare takes 2 to {MOST} runs, and {len(folders)} were named ('etude runs' lists them)")
    for folder in folders:
        guard(folder)
    target = options.out / "compare.html" if options.out.is_dir() else options.out
    if target.is_file() and b"\xc2\xb7 etude</title>" not in _beginning(target):
        raise UserError(f"{target} is there and is no page of 'etude compare'; name another with --out")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; compare takes different ones ('etude runs' lists them)")
    try:
        path = compare(folders, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another page with --out") from error
    print(path)
    if not options.no_open:
        from etude.cli.shared import open_page

        open_page(path)
    return 0


def export(words: list[str]) -> int:
    parser = Parser("export")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    parser.add_argument("--out", type=Path, help="folder of the files (default: export/ in the run folder)")
    parser.add_argument("--json", action="store_true", help="print {folder, files, shape, classes, difference}")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(words)
    from etude.core import launch
    from etude.core.export import export

    done = export(launch.load(options.run, trust=options.trust), options.out)
    if options.json:
        print_json(done)
        return 0
    for file, difference in done["difference"].items():
        print(f"{file}: equal to the network within {difference:.1e}")
    print(f"\nfiles: {shlex.quote(done['folder'])}/ ({', '.join(done['files'])})")
    return 0
