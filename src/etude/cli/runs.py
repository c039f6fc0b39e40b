"""The commands about runs: start one, go on with one, look at one, draw from one."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude import catalog
from etude.cli.settings import parse, parse_settings
from etude.cli.shared import Parser, console, open_page, plain, print_json, table
from etude.core import ledger
from etude.core import trust as permission
from etude.core.errors import RunError, UserError
from etude.core.folder import read_bytes, read_result
from etude.core.longer import LENGTHS

if TYPE_CHECKING:
    from etude.core.loaded import Loaded

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
    wanted = settings.launch
    out = Path(wanted.out) if wanted.out else None
    if wanted.seeds is not None:
        if any(word == "--seed" or word.startswith("--seed=") for word in words):
            raise UserError("--seed and --seeds are both given; --seeds says them all")
        return _several(entry, module, settings, out)
    finished = launch.start(entry, module, settings.config, settings.common, wanted.preset, out)
    _closing(finished, entry, wanted.json)
    return 0


def _several(entry: catalog.Entry, module: Any, settings: Any, out: Path | None) -> int:
    """One run a seed, then mean and spread; a seed that fails is said and the others go on."""
    from etude.core import launch, ranks

    finished, failed = {}, {}
    for seed in seeds_of(settings.launch.seeds):
        common = dataclasses.replace(settings.common, seed=seed)
        folder = out / f"seed-{seed}" if out is not None else None
        try:
            finished[seed] = launch.start(entry, module, settings.config, common, settings.launch.preset, folder)
        except RunError as error:
            failed[seed] = str(error)
            print(f"seed {seed}: {error}", file=sys.stderr)
    if not ranks.first():
        return int(bool(failed))
    names = list(dict.fromkeys(name for done in finished.values() for name in done.metrics))
    values = {name: [done.metrics[name] for done in finished.values() if name in done.metrics] for name in names}
    mean = {name: statistics.fmean(each) for name, each in values.items()}
    spread = {name: statistics.stdev(each) if len(each) > 1 else 0.0 for name, each in values.items()}
    if settings.launch.json:
        rows = [{"seed": seed, "run": str(done.folder), "metrics": done.metrics} for seed, done in finished.items()]
        print_json({"runs": rows, "failed": failed, "mean": mean, "spread": spread})
        return int(bool(failed))
    grid = table("", "mean", "spread", *(f"seed {seed}" for seed in finished))
    for name, each in values.items():
        grid.add_row(name.replace("_", " "), shown(mean[name]), f"{spread[name]:.2g}", *map(shown, each))
    console().print(grid)
    folders = [str(done.folder) for done in finished.values()]
    for folder in folders:
        print(f"run:  {folder}", end="\n")
    if len(folders) > 1:
        print(f"next: etude compare {shlex.join(folders)}")
    return int(bool(failed))


def seeds_of(text: str) -> list[int]:
    """The seeds that ``0-4`` or ``0,3,7`` mean."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit() and (last.isascii() and last.isdigit() if dash else True)):
            raise UserError(f"--seeds is '{text}'; it must be whole numbers and ranges of them, such as 0-4 or 0,3,7")
        low, high = int(first), int(last or first)
        if high < low or high - low >= 1000 or high >= 2**63:
            raise UserError(
                f"--seeds is '{text}'; a range goes up, from seeds below 2^63, and has at most 1,000 of them"
            )
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise UserError(f"--seeds is '{text}', which names a seed twice")
    return found


def shown(value: float) -> str:
    """A number of a result: a whole one as a whole number, a small one with an exponent."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) >= 1e-3 else f"{value:.3e}"


def resume(words: list[str]) -> int:
    parser = Parser("resume")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    for name in LENGTHS:
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"train longer: up to N {name}" if name == "steps" else ""
        )
    parser.add_argument("--source", metavar="FILE", help="a repaired own file, to be kept in place of the one that ran")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(words)
    from etude.core import launch

    length = {name: getattr(options, name) for name in LENGTHS if getattr(options, name) is not None}
    folder, _, entry = launch.opened(options.run, trust=options.trust or options.source is not None)
    if (folder / "done").is_file() and not length:
        print(f"{folder} has already finished; nothing to continue", file=sys.stderr)
    finished = launch.resume(folder, trust=options.trust, source=options.source, **length)
    _closing(finished, entry)
    return 0


def _closing(finished: Any, entry: catalog.Entry, as_json: bool = False) -> None:
    """The last lines of a run: its metrics, its folder and the next command to try (rank 0 only)."""
    from etude.core import ranks

    if not ranks.first():
        return
    if as_json:
        print_json({"run": str(finished.folder), "method": entry.name, "metrics": finished.metrics})
        return
    for name, value in finished.metrics.items():
        print(f"{name.replace('_', ' ')}: {shown(value)}")
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
    state = ledger.state_of(folder)
    result = read_result(folder) if (folder / "result.json").exists() else {}
    if options.tensorboard:
        print(f"tensorboard --logdir {record.to_tensorboard(folder)}", file=sys.stderr)
    if options.json:
        print_json({"run": str(folder), "state": state, "result": result, "report": str(path), **described})
        return 0
    print(f"{described['method']}  {state}\n{described['command']}")
    last = result or ({k: v for row in record.read_metrics(folder) for k, v in row.items()})
    for name, value in last.items():
        print(f"  {name.replace('_', ' '):<20} {shown(value)}")
    if state == "failed":
        print("  " + read_bytes(folder / "failed").decode("utf-8", "replace").partition("\n")[0])
    if state != "done":
        print(f"continue with: etude resume {shlex.quote(str(folder))}")
    print(path)
    if not options.no_open:
        open_page(path)
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


def _detect(loaded: Loaded, options: argparse.Namespace) -> int:
    """Boxes on the terminal, and drawn on copies of the pictures in ``predicted/`` of the run folder."""
    from etude.blocks.pictures.boxes import SHOWN, drawn
    from etude.data import folders

    found = loaded.detect(options.files)
    if options.json:
        print_json(found)
        return 0
    grid = table("file", "class", "probability", "box (x1, y1, x2, y2)")
    folder = loaded.folder / "predicted"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(found):
        rows = [row for row in picture["boxes"] if row["probability"] >= SHOWN]
        path = Path(str(picture["file"]))
        page = drawn(
            folders.plain(folders.opened(path), False),
            [(row["class"], row["probability"], row["box"], row["label"]) for row in reversed(rows)],
        )
        page.save(folder / f"{number:03d}-{path.stem}.png")
        for row in rows:
            box = ", ".join(f"{value:.0f}" for value in row["box"])
            grid.add_row(plain(str(path)), f"[bold]{plain(row['class'])}[/]", f"{row['probability']:.3f}", box)
        if not rows:
            grid.add_row(plain(str(path)), "nothing", "", "")
    console().print(grid)
    print(f"\nboxes with a probability from {SHOWN}; pictures: {folder}/")
    return 0


def predict(words: list[str]) -> int:
    parser = Parser("predict")
    parser.add_argument("run", help="a run folder, a method's name (its latest run) or 'latest'")
    parser.add_argument("files", nargs="+", metavar="file", help="pictures, or folders of pictures")
    parser.add_argument("--json", action="store_true", help="a list of {file, class, probability, probabilities, …}")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(words)
    from etude.core import launch

    loaded = launch.load(options.run, trust=options.trust)
    if loaded.detects:
        return _detect(loaded, options)
    found = loaded.predict(options.files)
    for row in found:
        if row.get("note"):
            print(f"{row['file']}: {row['note']}", file=sys.stderr)
    if options.json:
        print_json(found)
        return 0
    if "class" not in found[0]:  # a method's own answer: files that it wrote, shares of classes
        for row in found:
            print(row["file"])
            for name, value in row.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{plain(key)} {share:.3f}" for key, share in value.items())
                if isinstance(value, float):
                    value = shown(value)
                if name not in ("file", "note"):
                    print(f"  {name}: {value}")
        return 0
    grid = table("file", "class", "probability", "next")
    for row in found:
        second = sorted(row["probabilities"].items(), key=lambda item: -item[1])[1]
        after = f"{plain(second[0])} {second[1]:.3f}"
        grid.add_row(plain(str(row["file"])), f"[bold]{plain(row['class'])}[/]", f"{row['probability']:.3f}", after)
    console().print(grid)
    return 0
