"""The commands about runs: start one, go on with one, look at one, draw from one."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from etude import catalog
from etude.cli.settings import parse, parse_settings
from etude.cli.shared import Parser, console, plain, print_json, table
from etude.core import trust as permission
from etude.core.errors import UserError

TRUST = "run code that the run folder brings though this machine has not run it before: read it first"


def run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print("usage: etude run METHOD [--preset P] [--out DIR] [--FLAG VALUE …]\n")
            print("'etude run METHOD --help' shows its flags; 'etude list' the methods")
            return 0
        raise UserError("name the method to run, as in: etude run vision/lenet ('etude list' shows all)")
    from etude.core import launch

    entry, module = launch.method(words[0])
    settings = parse_settings(entry, module, words[1:])
    out = Path(settings.launch.out) if settings.launch.out else None
    finished = launch.start(entry, module, settings.config, settings.common, settings.launch.preset, out)
    _closing(finished, entry)
    return 0


def resume(words: list[str]) -> int:
    parser = Parser("resume")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    parser.add_argument("--source", metavar="FILE", help="a repaired own file, to be kept in place of the one that ran")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(words)
    from etude.core import launch

    folder, _, entry = launch.opened(options.run, trust=options.trust or options.source is not None)
    if (folder / "done").is_file():
        print(f"{folder} has already finished; nothing to continue", file=sys.stderr)
    finished = launch.resume(folder, trust=options.trust, source=options.source)
    _closing(finished, entry)
    return 0


def _closing(finished: Any, entry: catalog.Entry) -> None:
    """The last lines of a run: its metrics, its folder and the next command to try (rank 0 only)."""
    from etude.core import ranks

    if not ranks.first():
        return
    for name, value in finished.metrics.items():
        print(
            f"{name.replace('_', ' ')}: {value:.4f}"
            if abs(value) >= 1e-3 or value == 0
            else f"{name.replace('_', ' ')}: {value:.3e}"
        )
    verb = "sample" if entry.samples else "show"
    print(f"\nrun:  {finished.folder}\nnext: etude {verb} {shlex.quote(str(finished.folder))}")


def show(words: list[str]) -> int:
    parser = Parser("show")
    parser.add_argument("run", nargs="?", default="latest", help="a run folder, a method's name or 'latest'")
    parser.add_argument("--no-open", action="store_true", help="do not start a browser")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard event files into the run folder"
    )
    parser.add_argument("--json", action="store_true", help="print config, result and state as JSON")
    options = parser.parse_args(words)
    from etude.core import launch, record

    folder, described, entry = launch.opened(options.run)
    path = launch.write_report(entry, folder)
    state = "done" if (folder / "done").is_file() else "failed" if (folder / "failed").is_file() else "unfinished"
    result_file = folder / "result.json"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
    if options.tensorboard:
        print(f"tensorboard --logdir {record.to_tensorboard(folder)}", file=sys.stderr)
    if options.json:
        print_json({"run": str(folder), "state": state, "result": result, "report": str(path), **described})
        return 0
    print(f"{described['method']}  {state}\n{described['command']}")
    last = result or ({k: v for row in record.read_metrics(folder) for k, v in row.items()})
    for name, value in last.items():
        print(f"  {name.replace('_', ' '):<20} {value:.6g}")
    if state == "failed":
        print("  " + (folder / "failed").read_text(encoding="utf-8").splitlines()[0])
    if state != "done":
        print(f"continue with: etude resume {shlex.quote(str(folder))}")
    print(path)
    if (
        not options.no_open
        and sys.stdout.isatty()
        and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32"))
    ):
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0


def sample(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: etude sample RUN [--FLAG VALUE …]\n")
        print("'etude sample RUN --help' shows the flags of that run's method; RUN may be 'latest'")
        return 0
    if not words or words[0].startswith("-"):
        raise UserError("name the run to draw from, as in: etude sample latest")
    from etude.core import launch

    trust = "--trust" in words
    words = [word for word in words if word != "--trust"]
    folder, _, entry = launch.opened(words[0], trust=trust)
    if not entry.samples:
        see = f"etude show {shlex.quote(str(folder))}"
        raise UserError(f"{entry.name} learns no distribution to draw from; see its results with: {see}")
    with permission.granted(trust):
        module = catalog.load_method(entry)
    from etude.core.config import check

    default = module.Sample()
    options = parse(module.Sample, default, {"options": default}, words[1:], f"etude sample {words[0]}", entry.title)
    check(options)
    drawn = launch.load(folder, trust=trust).draw(options)
    if drawn.text:
        print(drawn.text)
    if drawn.files:
        print(f"\nfiles: {drawn.folder}/ ({', '.join(path.name for path in drawn.files[-4:])})")
    return 0


def predict(words: list[str]) -> int:
    parser = Parser("predict")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    parser.add_argument("files", nargs="+", metavar="file", help="pictures, or folders of pictures")
    parser.add_argument("--json", action="store_true", help="a list of {file, class, probability, probabilities, …}")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(words)
    from etude.core import launch

    found = launch.load(options.run, trust=options.trust).predict(options.files)
    for row in found:
        if row["note"]:
            print(f"{row['file']}: {row['note']}", file=sys.stderr)
    if options.json:
        print_json(found)
        return 0
    grid = table("file", "class", "probability", "next")
    for row in found:
        second = sorted(row["probabilities"].items(), key=lambda item: -item[1])[1]
        after = f"{plain(second[0])} {second[1]:.3f}"
        grid.add_row(plain(str(row["file"])), f"[bold]{plain(row['class'])}[/]", f"{row['probability']:.3f}", after)
    console().print(grid)
    return 0
