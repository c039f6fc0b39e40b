"""Write the generated part of the documentation: ``python docs/generate.py [DOCS]`` (default: this folder).

Every page comes from what the catalogue reads in the sources and from the machine-written files in ``results/``;
nobody types a score. Nothing is imported but the catalogue and how reports set equations, so no torch is needed. What it
writes is not kept in git:

- ``methods/index.md`` and ``methods/<room>/<name>.md``: all methods, and one page for each
- ``methods/benchmarks.md``: every recorded race
- ``methods/notes.md``: the systems of the lecture notes, row by row
- ``methods/SUMMARY.md``: the navigation of that folder
- ``generated/course.txt`` and ``generated/errata.txt``: tables that course.md and errata.md include

It also counts what there is, between two marks in README.md, which is kept.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from etude import catalog  # noqa: E402
from etude.catalog import Entry  # noqa: E402
from etude.core.report.mathematics import typeset  # noqa: E402

# week, what it is about, the sections of the notes it covers
COURSE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("1", "Risk, bias and variance, regularisation", ("2",)),
    ("2", "Gradient descent and its variants", ("3",)),
    ("3", "Networks, backpropagation, normalisation, initialisation, ensembles", ("4",)),
    ("4", "Convolutional networks", ("5.1",)),
    ("5", "Localisation, detection, segmentation", ("5.2",)),
    ("6", "Looking inside a network; pictures by ascent", ("5.3", "5.4", "5.5")),
    ("7", "Recurrent networks and sequence to sequence", ("6.1", "6.2", "6.3", "6.4")),
    ("8", "Attention and the Transformer", ("6.5", "6.6", "6.7")),
    ("9", "Word vectors and pre-trained language models", ("6.8", "6.9")),
    ("10", "Imitation and policy gradients", ("7.1", "7.2", "7.3")),
    ("11", "Actor-critic and value-based reinforcement learning", ("7.4", "7.5", "7.6")),
    ("12", "Autoregressive models, autoencoders, latent variables", ("8.1", "8.2", "8.3", "8.4")),
    ("13", "Flows and adversarial networks", ("8.5", "8.6")),
    ("14", "Generalisation, attacks and defences", ("9",)),
    ("15", "Meta-learning", ("10",)),
    ("16", "Editing images with generators; games", ("11",)),
)
# errata in which nothing is computed otherwise, so no test can show them
WORDS = {28: "a count of images", 32: "a published figure", 59: "a count of changes", 95: "a spelling"}
MARKED = re.compile(r"(<!-- written by docs/generate.py -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
SIGNS = {"higher": "≥", "lower": "≤", "near": ""}


def pages() -> dict[str, str]:
    """Every generated file: path under the docs folder → text."""
    entries = list(catalog.entries().values())
    rows = benchmark_rows()
    found = {f"methods/{entry.name}.md": method_page(entry, rows) for entry in entries}
    found["methods/index.md"] = index_page(entries)
    found["methods/benchmarks.md"] = benchmarks_page(rows)
    found["methods/cartpole.md"] = cartpole_page()
    found["methods/detectors.md"] = detectors_page()
    found["methods/notes.md"] = notes_page()
    found["methods/SUMMARY.md"] = summary(entries)
    found["generated/course.txt"] = course_table(entries)
    found["generated/errata.txt"] = errata_table(entries)
    return found


def write(folder: Path) -> list[Path]:
    """Write all pages under `folder`, remove generated pages that no longer belong, and return what was written."""
    for stale in ("methods", "generated"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    written = []
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


# ------------------------------------------------------------------------------------------------------------ pages


def method_page(entry: Entry, rows: list[dict[str, Any]]) -> str:
    """The page of one method: its contract, settings, presets, evidence, races and source."""
    contract = entry.contract
    source = _relative(entry.path)
    parts = [f"# {entry.name}", f"**{prose(entry.title)}**"]
    facts = [f"Evidence: **{entry.badge}**", f"Notes: {entry.section}", f"File: `{source}`"]
    if entry.needs:
        facts.append(f"Needs: `pip install -e '.[{','.join(entry.needs)}]'` in the checkout")
    parts.append(" · ".join(facts))
    rest = contract["claim"].partition("\n")[2].strip()
    if rest:
        parts.append(prose(textwrap.dedent(rest)))
    for heading in catalog.SECTIONS:
        text = contract.get(heading, "")
        if text:
            parts += [f"## {heading}", _section(heading, text)]
    parts += ["## Settings", table(("flag", "default", "meaning"), [_flag_row(field) for field in entry.fields])]
    presets = [
        (f"`{name}`", code(preset["changes"]), prose(preset["expect"])) for name, preset in entry.presets.items()
    ]
    parts += ["## Presets", table(("preset", "changes", "time → score"), presets)]
    if entry.numbers:
        parts += ["## Numbers", table(("returned", "meaning"), [(code(n), prose(said)) for n, said in entry.numbers])]
    parts += ["## Evidence", evidence(entry)]
    races = [row for row in rows if concerns(row, entry)]
    if races:
        parts += ["## Against the peers", race_table(races)]
    parts += ["## Source", f"`etude copy {entry.name} mine.py` makes this file yours.", _source(entry, source)]
    return "\n\n".join(parts) + "\n"


def evidence(entry: Entry) -> str:
    """The card of a method as a table, or the command that writes one."""
    card = entry.card
    if card is None:
        planned = [(prose(e["name"]), code(e["metric"]), bar_of(e), prose(e["published"])) for e in entry.experiments]
        told = f"No card has been written yet. `etude verify {entry.name}` runs the experiments and writes one."
        return told + ("\n\n" + table(("experiment", "metric", "bar", "published"), planned) if planned else "")
    rows = []
    for row in card["experiments"]:
        measured = "failed" if row["mean"] is None else f"{row['mean']:.4g} ± {row['spread']:.2g}"
        bar = bar_of(row)
        seconds = f"{max(row['seconds']):.0f}" if row["seconds"] else ""
        memory = f"{max(row['peak_memory_mb']):.0f}" if row["peak_memory_mb"] else ""
        passed = "yes" if row["passed"] else "**no**"
        cells = (
            prose(row["name"]),
            code(row["metric"]),
            measured,
            str(len(row["seeds"])),
            bar,
            passed,
            prose(row["published"]),
            seconds,
            memory,
        )
        rows.append(cells)
        for control in row.get("controls", ()):
            values = [value for value in control["values"] if value is not None]
            measured = f"{sum(values) / len(values):.4g}" if values else "failed"
            fate = "fails it" if control["held"] else "**clears it**"
            rows.append(
                (f"control: {prose(control['name'])}", code(control["metric"]), measured, *("",) * 2, fate, *("",) * 3)
            )
    heads = ("experiment", "metric", "mean ± sd", "seeds", "bar", "cleared", "published", "seconds", "MB")
    hardware, oracle = card["hardware"], card["oracle"]
    machine = f"{prose(str(hardware.get('cpu', '?')))}, {hardware.get('cores', '?')} cores"
    machine += f", {prose(hardware['gpu'])}" if "gpu" in hardware else ""
    told = (
        f"Badge **{entry.badge}**, written {card['written']} at commit `{card['commit']}` "
        f"on {machine}, torch {prose(card['versions'].get('torch', '?'))}. "
        f"Oracle: {oracle['tests']} tests of `{oracle['file']}` {'passed' if oracle['passed'] else '**failed**'}."
    )
    told += settings_told(card) + sabotage_told(entry)
    notes = "".join(
        f"\n- {prose(row['name'])}: {prose(row['notes'])}" for row in card["experiments"] if row.get("notes")
    )
    commands = "\n".join(row["command"] for row in card["experiments"])
    return told + "\n\n" + table(heads, rows) + ("\n" + notes + "\n" if notes else "") + f"\n\n```text\n{commands}\n```"


def bar_of(row: dict[str, Any]) -> str:
    """≥ 0.97, ≤ 0.1, or 3 ± 0.5."""
    return f"{SIGNS[row['better']]} {row['bar']:g}".strip() + (
        f" ± {row['tolerance']:g}" if row["better"] == "near" else ""
    )


def settings_told(card: dict[str, Any]) -> str:
    """How many settings were changed once, and how many of the changes were seen."""
    rows = card.get("settings") or {}
    if not rows:
        return ""
    states = [row["state"] for row in rows.values()]
    idle = "; ".join(
        f"{code(n)} {prose(row['why'])}" for n, row in rows.items() if row["state"] == "idle" and "--" not in n
    )
    return f" Every setting changed once: {states.count('matters')} of {len(rows)} change the run" + (
        f" ({idle})." if idle else "."
    )


def sabotage_told(entry: Entry) -> str:
    """The faults put into this method's room that its tests caught."""
    path = catalog.results_folder() / "sabotage" / f"{entry.room}.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    survivors = [s.partition(": ")[2] for s in found["survivors"] if s.startswith(f"{entry.name}: ")]
    told = "; ".join(f"{found[kind]['killed']} of {found[kind]['total']} in {kind}" for kind in ("functions", "loops"))
    return f" Faults put into `{entry.room}` and caught: {told}." + (
        f" Not caught here: {prose('; '.join(survivors))}." if survivors else ""
    )


def counts() -> str:
    """What the README says of how much there is: systems of the notes, methods, and faults that the tests catch."""
    rows, kinds = catalog.systems(), {"functions": [0, 0], "loops": [0, 0]}
    part = sum(row["missing"] != "" for row in rows)
    shown = sum(row["where"] != "" for row in rows)
    for path in sorted((ROOT / "results/sabotage").glob("*.json")):
        for kind, sums in kinds.items():
            found = json.loads(path.read_text(encoding="utf-8"))[kind]
            sums[0], sums[1] = sums[0] + found["killed"], sums[1] + found["total"]
    (caught, faults), (seen, more) = kinds["functions"], kinds["loops"]
    lines = textwrap.wrap(
        f"The library follows a set of lecture notes that describe {len(rows)} systems. Today {shown} of them are in, {part} of "
        f"these in part, in {len(catalog.entries())} methods; `etude list --notes` says where each of them lives. Of {faults} "
        f"faults put into functions the tests catch {caught}, of {more} put into loops, flags and reported numbers {seen}.",
        118,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def update_readme() -> None:
    """Put `counts` between the two marks in README.md."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(MARKED.sub(lambda found: found[1] + counts() + found[3], text), encoding="utf-8")


def notes_page() -> str:
    """The 197 systems of the notes: where each lives, the test that proves it, its evidence, or that it is not there yet."""
    rows = catalog.systems()
    done = sum(row["where"] != "" and not row["missing"] for row in rows)
    part = sum(row["missing"] != "" for row in rows)
    parts = [
        "# The notes, row by row",
        f"The library follows a set of lecture notes on deep learning. Of the {len(rows)} systems that they describe, {done} "
        f"are shown by a method, {part} in part, and {len(rows) - done - part} are not there yet. `etude list --notes` prints "
        "this table.",
    ]
    for chapter in dict.fromkeys(row["chapter"] for row in rows):
        cells = []
        for row in (row for row in rows if row["chapter"] == chapter):
            method = row["where"] in catalog.entries()
            where = f"[{row['where']}]({row['where']}.md)" if method else code(row["where"])
            lacks = f" ({prose(row['missing'])})" if row["missing"] else ""
            cells.append((row["section"], prose(row["system"]) + lacks, where, code(row["test"]), row["badge"]))
        parts += [f"## {chapter}", table(("section", "system", "where", "test", "evidence"), cells)]
    return "\n\n".join(parts) + "\n"


def index_page(entries: list[Entry]) -> str:
    """All methods by room, with the badge of each."""
    parts = [
        "# Methods",
        f"{len(entries)} methods in {len({e.room for e in entries})} rooms; badges come from the cards in `results/`.",
    ]
    for room in sorted({entry.room for entry in entries}):
        rows = [(f"[{e.name}]({e.name}.md)", prose(e.title), e.section, e.badge) for e in entries if e.room == room]
        parts += [f"## {room}", table(("method", "what it does", "notes", "evidence"), rows)]
    return "\n\n".join(parts) + "\n"


def benchmarks_page(rows: list[dict[str, Any]]) -> str:
    """Every recorded race, by the room whose script measured it."""
    parts = [
        "# Benchmarks",
        "Ours against the peer library, runs alternating A B A B in one process tree; above 1 ours is faster.",
    ]
    if not rows:
        parts.append("None recorded yet; `etude bench` runs them from a source checkout.")
    for room in sorted({row["room"] for row in rows}):
        parts += [f"## {room}", race_table([row for row in rows if row["room"] == room])]
    return "\n\n".join(parts) + "\n"


def cartpole_page() -> str:
    """All methods that act, on one CartPole at equal environment steps (`benchmarks/cartpole.py`)."""
    found = json.loads((ROOT / "results/rl/cartpole.json").read_text(encoding="utf-8"))
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: -sum(run["greedy_return"] for run in item[1])):
        scores = sorted(run["greedy_return"] for run in runs)
        solved = [next((int(steps) for steps, score in run["curve"] if score >= 475), None) for run in runs]
        known = [steps for steps in solved if steps is not None]
        when = f"{sorted(known)[len(known) // 2]:,} ({len(known)} of {len(runs)} seeds)" if known else "–"
        given = "" if runs[0]["curve"] else f"{runs[0]['given'] or 10_000:,.0f} recorded or labelled steps"
        seconds = sorted(run["seconds"] for run in runs)[len(runs) // 2]
        cells = (f"{scores[len(scores) // 2]:.0f}", f"{scores[0]:.0f}", given or when, f"{seconds:.0f}")
        rows.append((f"[{name}]({name}.md)", *cells))
    return (
        "\n\n".join(
            [
                "# One CartPole for all that act",
                "Every method with its default settings, 100,000 environment steps, five seeds. The faint lines are seeds, "
                "the thick one is their mean, and above the dashed one (475) the task counts as solved. Those that learn from "
                "recordings or from an expert have no curve. `python benchmarks/cartpole.py` makes it again.",
                "![Learning curves of every method on CartPole, five seeds each](../pictures/cartpole.png)",
                table(
                    (
                        "method",
                        "greedy return, median",
                        "worst seed",
                        "environment steps until 475, median",
                        "seconds a run",
                    ),
                    rows,
                ),
            ]
        )
        + "\n"
    )


def detectors_page() -> str:
    """All detectors on the same pictures (`benchmarks/detectors.py`)."""
    found = json.loads((ROOT / "results/detection/detectors.json").read_text(encoding="utf-8"))
    regions = {
        "sliding_window": "every window",
        "overfeat": "every window, moved",
        "rcnn": "selective search, 50",
        "fast_rcnn": "selective search, 50",
        "faster_rcnn": "its own, 50",
        "yolo": "a grid's cells, 64",
    }
    rows = []
    for name, where in regions.items():
        if name in found:
            row = found[name]
            scores = [f"{row[key]:.3f}" for key in ("map", "map_75", "recall")]
            recall = f"{row['proposal_recall']:.3f}" if "proposal_recall" in row else "–"
            speed = f"{row['pictures_a_second']:,.0f}"
            rows.append(
                (f"[detection/{name}](detection/{name}.md)", *scores, where, recall, speed, f"{row['parameters']:,}")
            )
        else:
            rows.append((f"[detection/{name}](detection/{name}.md)", *["not run"] * 3, where, "", "", ""))
    told = (
        "The story of the notes in one table. A window at every place is thorough and slow; one convolution shares what "
        "windows have in common; proposals look at few places, first each through the network (R-CNN), then all on one map "
        "(Fast R-CNN), then proposed by that map (Faster R-CNN); YOLO has no regions at all.",
        "Every detector with its default settings, seed 0: up to three digits on a canvas of 64 × 64 pixels, 3,000 to learn "
        "from, 600 to find digits in. The rate is pictures by CPU second of one thread, from pixels to boxes. "
        "`python benchmarks/detectors.py` makes it again.",
    )
    head = (
        "method",
        "mAP, IoU 0.5",
        "mAP, IoU 0.75",
        "found",
        "regions",
        "recall of regions",
        "pictures a second",
        "weights",
    )
    return "\n\n".join(["# Six detectors, one table", *told, table(head, rows)]) + "\n"


def summary(entries: list[Entry]) -> str:
    """Navigation of the methods folder, in the form of literate-nav."""
    lines = ["* [All methods](index.md)"]
    for room in sorted({entry.room for entry in entries}):
        lines.append(f"* {room}")
        lines += [f"    * [{e.name.partition('/')[2]}]({e.name}.md)" for e in entries if e.room == room]
    lines += ["* [One CartPole for all that act](cartpole.md)", "* [Six detectors, one table](detectors.md)"]
    lines.append("* [The notes, row by row](notes.md)")
    return "\n".join([*lines, "* [Benchmarks](benchmarks.md)"]) + "\n"


def course_table(entries: list[Entry]) -> str:
    """Week → sections of the notes → methods, for inclusion in course.md."""
    rows = []
    for week, about, sections in COURSE:
        held = [e for e in entries if any(within(part, whole) for part in e.section.split(",") for whole in sections)]
        held.sort(key=lambda e: _numbers(e.section))
        methods = ", ".join(f"[{e.name}](methods/{e.name}.md)" for e in held)
        rows.append((week, about, ", ".join(sections), methods or "none yet"))
    return table(("week", "about", "notes", "methods"), rows) + "\n"


def errata_table(entries: list[Entry]) -> str:
    """Every erratum that a docstring says it corrects: the corrected statement, where it stands, the tests that show it."""
    tests = shown_by()
    rows = [
        (
            f"E{number:02d}",
            statement,
            place,
            "<br>".join(map(_in_words, tests.get(number, ()))) or WORDS.get(number, "**no test**"),
        )
        for number, statement, place in errata_rows(entries)
    ]
    return table(("erratum", "what is done instead", "where", "shown by"), rows) + "\n"


def _in_words(test: str) -> str:
    """``tests/facts/optim/test_newton.py::test_it_escapes`` → ``it escapes (optim/test_newton)``, which a table can wrap."""
    path, _, name = test.partition("::")
    return f"{name.removeprefix('test_').replace('_', ' ')} ({'/'.join(path.removesuffix('.py').split('/')[2:])})"


def errata_rows(entries: list[Entry]) -> list[tuple[int, str, str]]:
    """(number, corrected statement, where) of every erratum that a docstring of the package names, in order."""
    names = {entry.path: entry.name for entry in entries}
    found: set[tuple[int, str, str]] = set()
    for path in sorted(catalog.PACKAGE.rglob("*.py")):
        place = f"[{names[path]}](methods/{names[path]}.md)" if path in names else f"`{_relative(path)}`"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for number, statement in errata(ast.get_docstring(node) or ""):
                    found.add((number, prose(statement), place))
    return sorted(found)


@functools.cache
def shown_by() -> dict[int, list[str]]:
    """Number of an erratum → the tests, as pytest names them, that name it (``E07``) in their docstring or a comment."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("[fl]*s/*/test_*.py")):  # facts and learns
        text = path.read_text(encoding="utf-8")
        lines = re.sub(r"# noqa.*", "", text).splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                for number in sorted(set(map(int, re.findall(r"\bE(\d{2,3})\b", own)))):
                    found.setdefault(number, []).append(f"{_relative(path)}::{node.name}")
    return found


def errata(docstring: str) -> list[tuple[int, str]]:
    """(number, statement) of each erratum named in the Differences of a docstring (in all of it, if it has none).

    An item that opens with an erratum is its statement; a mention inside another item counts where no item opens so.
    """
    found: dict[int, list[str]] = {}
    mentioned: dict[int, list[str]] = {}
    for item in items(catalog.parse_contract(docstring).get("Differences", docstring)):
        opening = re.match(r"((?:E\d{2,3}(?:, | and )?)+)(?:\s*\([^)]*\))?\s*:\s*", item)
        for number in map(int, re.findall(r"\bE(\d{2,3})\b", opening[1] if opening else item)):
            (found if opening else mentioned).setdefault(number, []).append(item[opening.end() :] if opening else item)
    return [(number, text) for number, texts in (mentioned | found).items() for text in texts]


# -------------------------------------------------------------------------------------------------------- benchmarks


def benchmark_rows() -> list[dict[str, Any]]:
    """The rows of ``results/bench/*.json``, each with the room of its file."""
    found = []
    for path in sorted((catalog.results_folder() / "bench").glob("*.json")):
        found += [{"room": path.stem.partition("_")[0]} | row for row in json.loads(path.read_text(encoding="utf-8"))]
    return found


def concerns(row: dict[str, Any], entry: Entry) -> bool:
    """Whether a race is about this method: it lies in the method's room and names it as a word."""
    words = row["name"].lower().replace("_", " ")
    own = entry.name.partition("/")[2].replace("_", " ")
    return row["room"] == entry.room and re.search(rf"\b{re.escape(own)}\b", words) is not None


def race_table(rows: list[dict[str, Any]]) -> str:
    """Ratios with their spread, the bar, the peer and what was checked to be equal."""
    cells = [
        (
            prose(row["name"]),
            f"{row['ratio']:.2f}× ({row['low']:.2f} – {row['high']:.2f})",
            f"{row['bar']:g}×",
            "yes" if row["ratio"] >= row["bar"] else "**no**",
            prose(f"{row['peer']} {row['peer_version']}"),
            prose(row["equal"]),
        )
        for row in rows
    ]
    return table(("what", "median ratio (low – high)", "bar", "cleared", "peer", "checked equal"), cells)


# ---------------------------------------------------------------------------------------------------------- markdown


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table of cells that `prose` and `code` made (a bar in prose is an entity there)."""
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def code(text: str) -> str:
    """An inline code span (empty text stays empty)."""
    return f"`{text}`" if text else ""


def prose(text: str) -> str:
    """Docstring text as Markdown: code spans and *emphasis* stay, arXiv numbers become links, the rest is literal.

    Formulas such as ``x_i^2`` or ``w[o, c]`` must not turn into emphasis, superscripts, links or TeX.
    """
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(part if index % 2 else _literal(part) for index, part in enumerate(parts))


def items(text: str) -> list[str]:
    """The bullets and paragraphs of a section, each joined to one line."""
    found: list[list[str]] = [[]]
    for line in _hanging(text).splitlines():
        line = line.strip()
        if line.startswith("- ") or not line:
            found.append([])
        if line:
            found[-1].append(line.removeprefix("- "))
    return [" ".join(item) for item in found if item]


def within(section: str, whole: str) -> bool:
    """Whether section 5.1.3 lies in 5.1 (and not in 5.10)."""
    section = section.strip()
    return section == whole or section.startswith(whole + ".")


def _section(heading: str, text: str) -> str:
    if heading == "Equation":
        return typeset(text)
    if heading == "Algorithm":
        return f"```text\n{_hanging(text)}\n```"
    text = _hanging(text)
    if re.search(r"^\s*- ", text, flags=re.MULTILINE):
        return "\n".join(f"- {prose(item)}" for item in items(text))
    return prose(text)


def _hanging(text: str) -> str:
    """Take the common indent off the lines after the first; the first stands beside the heading and has none."""
    first, _, rest = text.partition("\n")
    if not first.strip():
        return textwrap.dedent(rest).rstrip()
    if first[0].isspace() or not rest:
        return textwrap.dedent(text).rstrip()
    return f"{first}\n{rest}".rstrip()


def _literal(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\_\[\]{}]", r"\\\g<0>", text)
    text = re.sub(r"[$^~|]|==", lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), text)
    emphasis = r"(?<![\w*])\*(\w(?:[^*]*[\w.!?])?)\*(?![\w*])"
    text = re.sub(emphasis + r"|\*", lambda found: found[0] if found[1] else "\\*", text)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _flag_row(field: dict[str, str]) -> tuple[str, str, str]:
    return (code("--" + field["name"].replace("_", "-")), code(field["default"]), prose(field["help"]))


def _source(entry: Entry, source: str) -> str:
    body = textwrap.indent(f"```python\n{entry.source.rstrip()}\n```", "    ")
    return f'??? abstract "{source}"\n\n{body}'


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _numbers(section: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", section.partition(",")[0])]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    print(f"{len(write(target))} files written under {target}")
    if len(sys.argv) == 1:
        update_readme()
