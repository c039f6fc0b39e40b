"""One word for one thing: the table of docs/vocabulary.md holds for every Config and every returned number."""

from __future__ import annotations

import dataclasses
import re

import pytest

from etude import catalog

ROOT = catalog.checkout_folder()
assert ROOT is not None
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "vocabulary.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
REFUSED = {word: cells[0] for cells in TABLE for word in re.findall(r"`([^`…, ]+)`", cells[2])}
ENDINGS = {word.rstrip("…"): cells[0] for cells in TABLE for word in re.findall(r"`([^`]+_…)`", cells[2])}
KEPT = {word for cells in TABLE for word in re.findall(r"`([^`…, ]+)`", cells[0])}


def test_the_table_is_read_and_does_not_contradict_itself() -> None:
    assert len(TABLE) > 20
    assert "lr" in REFUSED
    assert "val_" in ENDINGS
    assert not KEPT & REFUSED.keys()


@pytest.mark.parametrize("name", [name for name, entry in catalog.entries().items() if not entry.missing])
def test_settings_and_numbers_use_the_words(name: str) -> None:
    module = catalog.load_method(catalog.find(name))
    fields = [field.name for field in dataclasses.fields(module.Config)]
    wrong = {field: f"say {REFUSED[field]}" for field in fields if field in REFUSED}
    metrics = {experiment.metric for experiment in module.EXPERIMENTS}
    wrong |= {word: f"say {ENDINGS[e]}" for word in [*metrics, *fields] for e in ENDINGS if word.startswith(e)}
    wrong |= {
        field: "say learning_rate"
        for field in fields
        if re.search(r"(^|_)(lr|rate|rates)$", field) and "learning_rate" not in field
    }
    assert wrong == {}
