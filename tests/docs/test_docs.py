"""The documentation is generated whole and builds without a warning; README and guide say what is true."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from etude import catalog
from etude.core.digest import digest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly from a copy of the sources by the commands of `make docs`."""
    root = tmp_path_factory.mktemp("docs copy")  # with a space in its path
    for name in ("docs", "src", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "methods", "generated"))
    for name in ("mkdocs.yml", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "results", root / "results")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ETUDE_RESULTS")}
    for words in (["docs/generate.py"], ["-m", "zensical", "build", "--clean", "--strict"]):
        finished = subprocess.run(
            [sys.executable, *words],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        said = finished.stdout + finished.stderr
        assert finished.returncode == 0, said
        assert "warning" not in said.lower(), said
    return root / "site"


# ---------------------------------------------------------------------------------------------------- generated pages


def test_every_method_has_a_page_with_its_whole_contract(generate: ModuleType) -> None:
    pages = generate.pages()
    for name, entry in catalog.entries().items():
        page = pages[f"methods/{name}.md"]
        headings = re.findall(r"^## (.+)$", page.partition("\n## Source")[0], flags=re.MULTILINE)
        written = [heading for heading in catalog.SECTIONS if entry.contract.get(heading, "").strip()]
        assert [heading for heading in headings if heading in catalog.SECTIONS] == written
        assert {"Settings", "Presets", "Evidence"} <= set(headings)
        for field in entry.fields:
            assert f"| `--{field['name'].replace('_', '-')}` |" in page
        for preset in entry.presets:
            assert f"| `{preset}` |" in page
        assert f"({name}.md)" in pages["methods/index.md"]
        assert f"({name}.md)" in pages["methods/SUMMARY.md"]
        assert f"(methods/{name}.md)" in pages["generated/course.txt"], (
            f"no week of the course covers § {entry.section}"
        )


def test_the_generator_imports_no_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, 'docs'); import generate; generate.pages(); assert 'torch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


CARD = {
    "badge": "runs",
    "written": "2026-01-01T00:00:00+00:00",
    "commit": "abc",
    "oracle": {"file": "tests/facts/basics/test_mlp.py", "tests": 7, "passed": True},
    "hardware": {"cpu": "Some CPU", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "experiments": [
        {
            "name": "mnist",
            "metric": "test_accuracy",
            "mean": 0.98125,
            "spread": 0.0012,
            "seeds": [0, 1, 2],
            "seconds": [10.0, 31.4, 20.0],
            "peak_memory_mb": [100.0, 321.6],
            "better": "higher",
            "bar": 0.99,
            "passed": False,
            "published": "0.99 (a paper)",
            "notes": "a miss",
            "command": "etude run basics/mlp --preset mnist",
        }
    ],
}


def test_scores_come_from_the_card_and_a_miss_is_shown(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    entry = catalog.find("basics/mlp")
    assert "etude verify basics/mlp" in generate.evidence(entry)
    (tmp_path / "basics").mkdir()
    (tmp_path / "basics" / "mlp.json").write_text(
        json.dumps(CARD | {"digest": digest(entry.path)._asdict()}), encoding="utf-8"
    )
    shown = generate.method_page(entry, [])
    row = next(line for line in shown.splitlines() if line.startswith("| mnist | `test_accuracy`"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
        "0.9812 ± 0.0012", "3", "≥ 0.99", "**no**", "0.99 (a paper)", "31", "322"
    ]  # fmt: skip
    assert "Evidence: **runs**" in shown
    assert "7 tests" in shown
    (tmp_path / "bench").mkdir()
    race = {"peer": "torch", "peer_version": "2", "ratio": 0.9, "low": 0.8, "high": 1.1, "bar": 1.0, "equal": "loss"}
    rows = [race | {"name": "mlp step"}, race | {"name": "smlp step"}]
    (tmp_path / "bench" / "basics.json").write_text(json.dumps(rows), encoding="utf-8")
    shown = generate.method_page(entry, generate.benchmark_rows())
    assert "| mlp step | 0.90× (0.80 – 1.10) | 1× | **no** | torch 2 | loss |" in shown
    assert "smlp" not in shown
    assert "smlp" in generate.pages()["methods/benchmarks.md"]


def test_one_page_compares_all_that_act(generate: ModuleType) -> None:
    page = generate.pages()["methods/cartpole.md"]
    assert all(f"[{name}]({name}.md)" in page for name in ("rl/ppo", "rl/dqn", "rl/reinforce", "rl/a3c", "rl/fitted"))
    assert "| rl/" not in page


def test_errata_are_read_from_docstrings(generate: ModuleType) -> None:
    differences = "- E12: first\n  goes on\n- E3 is none; see E12\n- other (E140) here\n- E15, E16: both"
    text = f"Claim\n\nDifferences:\n{differences}\n\nExpect: E99"
    found = sorted(generate.errata(text))
    assert found == [(12, "first goes on"), (15, "both"), (16, "both"), (140, "other (E140) here")]
    assert generate.errata("A note.\n\nNo heading, but E05 is\nmeant.\n") == [(5, "No heading, but E05 is meant.")]


def test_every_erratum_is_shown_by_a_test(generate: ModuleType) -> None:
    """A test shows an erratum by naming it in its docstring or a comment; the table links the two."""
    rows = generate.errata_rows(list(catalog.entries().values()))
    shown = generate.shown_by()
    assert (
        sorted({f"E{number:02d} ({place})" for number, _, place in rows if number not in {*shown, *generate.WORDS}})
        == []
    )
    assert "tests/facts/optim/test_newton.py::test_plain_newton_converges_to_the_saddle_and_damping_escapes" in shown[8]
    line = next(line for line in generate.pages()["generated/errata.txt"].splitlines() if line.startswith("| E08 "))
    assert "plain newton converges to the saddle and damping escapes (optim/test_newton)" in line
    places = " ".join(place for _, _, place in rows)
    for place in ("src/etude/optim/", "src/etude/blocks/", "src/etude/data/", "methods/basics/"):
        assert place in places


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w[o, c]_i^2 = $5 | a*b", r"w\[o, c\]\_i&#94;2 = &#36;5 &#124; a\*b"),
        ("the *whole* of `a_b*c`", "the *whole* of `a_b*c`"),
        ("2 * 3 * 4 and <b>", r"2 \* 3 \* 4 and &lt;b&gt;"),
        ("arXiv:1704.00028", "[arXiv:1704.00028](https://arxiv.org/abs/1704.00028)"),
    ],
)
def test_formulas_are_not_markup(generate: ModuleType, text: str, expected: str) -> None:
    assert generate.prose(text) == expected


def test_sections_of_the_notes(generate: ModuleType) -> None:
    assert generate.within("5.1.3.1", "5.1")
    assert generate.within("9", "9")
    assert not generate.within("5.10", "5.1")


# ----------------------------------------------------------------------------------------------------------- the site


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get("src") or values.get("href") or ""
        self.found.append(address)
        if tag in ("img", "script") or (tag == "link" and values.get("rel") in ("stylesheet", "icon")):
            self.loaded.append(address)


def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(site: Path) -> None:
    """Pages, pictures and styles that a page names are in the site, and nothing is loaded from another host."""
    names = [*catalog.entries(), "index", "benchmarks"]
    for name in names:
        place = site / "methods" / ("index.html" if name == "index" else f"{name}/index.html")
        assert place.is_file()
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(names) + 7
    for page in pages:
        if page.name == "404.html":
            continue
        links = _Links()
        links.feed(page.read_text(encoding="utf-8"))
        assert [address for address in links.loaded if urlsplit(address).netloc] == []
        for address in links.found:
            split = urlsplit(address)
            if not split.scheme and not split.netloc and split.path:
                target = (page.parent / unquote(split.path)).resolve()
                assert target.exists(), f"{page.relative_to(site)} names {address}, which is not there"


def test_tables_are_included_and_generator_is_not_published(site: Path) -> None:
    assert "basics/mlp" in (site / "course" / "index.html").read_text(encoding="utf-8")
    assert "E12" in (site / "errata" / "index.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))


# ------------------------------------------------------------------------------------------------------ README, guide


def test_the_readme_counts_what_there_is(generate: ModuleType) -> None:
    """`make docs` writes the sentence; a merge that added a method or a fault runs it again."""
    found = generate.MARKED.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found
    assert found[2] == generate.counts(), "run make docs"


def test_the_folder_map_is_true() -> None:
    """Every path on the README's map exists, and every room, test folder and package folder is on it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Folder map\s+```text\n(.*?)```", readme, flags=re.DOTALL)
    assert block is not None
    named = {line.split()[0] for line in block[1].splitlines()}
    assert [path for path in named if not (ROOT / path).exists()] == []
    package = {f"src/etude/{path.name}/" for path in catalog.PACKAGE.iterdir() if any(path.glob("*.py"))}
    tests = {f"tests/{path.name}/" for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))}
    assert sorted((package | tests) - named) == []
    rooms = {entry.room for entry in catalog.entries().values()}
    described = {line.split()[0] for line in block[1].splitlines() if " methods: " in line}
    assert described == {f"src/etude/{room}/" for room in rooms}


@pytest.mark.parametrize("path", GUIDE, ids=lambda path: path.name)
def test_links_of_the_guide_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not urlsplit(target).scheme and not target.startswith("methods/"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", GUIDE, ids=lambda path: path.name)
def test_commands_of_the_guide_exist(path: Path) -> None:
    """Every `etude VERB` and `make TARGET` shown is one; flags of `etude run METHOD` exist and take these values."""
    from etude import cli

    text = path.read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines() + re.findall(
        r"`([^`\n]+)`", text
    )
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in shown:
        words = _words(line)
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, line
        if words[:1] == ["etude"] and len(words) > 1 and words[1].islower():
            assert words[1] in cli.VERBS, line
            if words[1] == "run" and len(words) > 2 and words[2] in catalog.entries():
                entry = catalog.find(words[2])
                cli.parse_settings(entry, catalog.load_method(entry), words[3:])


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line.partition(" #")[0])
    except ValueError:  # not a command
        return []


def test_what_continuous_integration_runs_is_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.rstrip().endswith("\nexec make test")
    assert "\nmake test " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_what_the_extras_name() -> None:
    """Each package that the Makefile installs by an extra (and torch) has one tested version."""
    import tomllib

    def plain(text: str) -> str:
        return re.split(r"[\[<>=!~; ]", text, maxsplit=1)[0].lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {plain(line): line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins.values())
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r"'\.\[(.*?)\]'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert extras is not None
    needed = [
        *project["dependencies"],
        *(n for extra in extras[1].split(",") for n in project["optional-dependencies"][extra]),
    ]
    assert sorted({plain(name) for name in needed} - set(pins)) == []
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
