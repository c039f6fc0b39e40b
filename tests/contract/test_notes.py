"""The table of the lecture notes: every row names a method, a block or nothing, and a test that exists."""

from __future__ import annotations

import json
import re

import pytest

from etude import catalog, cli

ROWS = catalog.systems()


def test_all_197_systems_are_in_it() -> None:
    assert len(ROWS) == 197
    assert len({(row["section"], row["system"]) for row in ROWS}) == 197
    assert {row["chapter"].split()[0] for row in ROWS} == {str(chapter) for chapter in range(2, 12)}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["where"]], ids=lambda row: f"{row['section']} {row['system']}"
)
def test_a_row_names_what_exists(row: dict[str, str]) -> None:
    assert row["where"] in catalog.entries() or (catalog.PACKAGE / row["where"]).is_file()
    root = catalog.checkout_folder()
    assert root is not None
    test = root / row["test"]
    assert test.is_file()
    assert re.search(r"^(def|class) test_|^    def test_", test.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_row_without_a_place_claims_nothing() -> None:
    for row in ROWS:
        if not row["where"]:
            assert (row["test"], row["missing"], row["badge"]) == ("", "", "not yet")
        if row["where"] not in catalog.entries() and row["where"]:
            assert row["missing"], f"{row['section']}: a block is no method; say what is missing"


def test_every_method_is_in_it() -> None:
    """Or shares its section with the method that has done it (A2C), or goes on from there (TD3, SAC)."""
    done = {row["where"]: row["section"] for row in ROWS if row["where"]}
    for name, entry in catalog.entries().items():
        sections = [part.strip() for part in entry.section.split(",")]
        assert name in done or any(row.startswith(part) for row in done.values() for part in sections), name


def test_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--notes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"chapter", "section", "system", "where", "test", "badge"} <= told[0].keys()
    assert cli.main(["list", "--notes", "9.3.2"]) == 0
    assert "robustness/fgsm" in capsys.readouterr().out
    assert cli.main(["list", "--notes", "nothing of the kind"]) == 2
