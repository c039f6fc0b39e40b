"""A missing package is answered with a command that works, and no address is named that does not exist."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from etude import catalog
from etude.core import extras
from etude.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", catalog.EXTRAS)
def test_the_command_names_the_checkout_or_the_packages(monkeypatch, extra) -> None:
    monkeypatch.setattr(catalog, "checkout_folder", lambda: Path("/a checkout"))
    assert extras.how(extra) == f"pip install -e '/a checkout[{extra}]'"
    monkeypatch.setattr(catalog, "checkout_folder", lambda: None)
    lines = [f"{package}; extra == '{extra}'" for package in DECLARED[extra]] + ["torch>=2.10", "x; extra == 'other'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert extras.packages(extra) == DECLARED[extra]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert extras.how(extra) == f"pip install {' '.join(catalog.EXTRAS[extra])}"


def test_a_method_whose_extra_is_missing(monkeypatch) -> None:
    entry = next(entry for entry in catalog.entries().values() if "rl" in entry.needs)
    monkeypatch.setattr(catalog, "extra_installed", lambda extra: False)
    with pytest.raises(UserError, match=r"needs a package that is not installed; run: pip install -e \S.*\[rl\]"):
        catalog.load_method(entry)


def test_nothing_says_a_name_or_an_address_that_is_nobodys() -> None:
    """`pip install 'etude[rl]'` would install whatever someone registers under that name first."""
    files = [path for folder in ("src", "docs") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "mkdocs.yml")]
    found = []
    for path in files:
        if "generated" not in path.parts and path.relative_to(ROOT).parts[:2] != ("docs", "methods"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path}: {hit[0]}" for hit in re.finditer(r"pip install '?etude\b|readthedocs\.io", text)]
    assert found == []
