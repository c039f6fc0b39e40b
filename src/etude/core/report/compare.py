"""Several runs on one page: their curves laid over each other, what they returned, and the settings that differ."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.core.report.charts import chart
from etude.core.report.page import frame
from etude.core.report.reading import Record, Series, as_dict, same
from etude.core.report.words import escape, html_table, number, spaced, written

MOST = 8
"""Runs that one chart can tell apart by colour."""


def compare(folders: Sequence[Path], path: Path) -> Path:
    """Write the page about these run folders to `path`; the old page stays until the new one is whole."""
    records = [Record(folder) for folder in folders]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(compose(records), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def compose(records: Sequence[Record]) -> str:
    """The whole page."""
    names = labels(records)
    methods = list(dict.fromkeys(record.method for record in records))
    sections = [
        ("result", "Results", _results(records, names)),
        ("curves", "Curves", _curves(records, names)),
        ("settings", "Settings that differ", _settings(records, names)),
        ("runs", "The runs", _runs(records, names)),
    ]
    title = f"{len(records)} runs of {methods[0]}" if len(methods) == 1 else f"{len(records)} runs"
    head = f'<header><p class="method"><span>{escape(", ".join(methods))}</span></p><h1>{escape(title)}</h1></header>'
    notes = [f"{name}: {file}" for name, record in zip(names, records) for file in record.unreadable]
    foot = "".join(f"<p>Could not be read: {escape(note)}.</p>" for note in notes)
    return frame(
        f"{title} · etude",
        head,
        sections,
        foot + "<p>Written by etude. This page is one file and needs no network.</p>",
    )


def labels(records: Sequence[Record]) -> list[str]:
    """A short name for each run: the settings by which it differs from the others, else its folder's name."""
    differing = differences(records)
    names = []
    for index, record in enumerate(records):
        own = [f"{spaced(name)} {written(values[index])}" for name, values in differing.items()]
        text = ", ".join(own)
        names.append(text if own and len(text) <= 40 else record.folder.name)
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, each with its value in every run (None where a run has no such setting)."""
    every = [_settings_of(record) for record in records]
    found = {name: [settings.get(name) for settings in every] for settings in every for name in settings}
    return {name: values for name, values in found.items() if not all(same(value, values[0]) for value in values)}


def _settings_of(record: Record) -> dict[str, Any]:
    shared = {name: value for name, value in as_dict(record.described.get("common")).items() if name != "quiet"}
    source = as_dict(record.described.get("source")).get("sha256")
    named = {"method": record.method} | ({"source": str(source)[:12]} if source else {})
    return named | record.config | shared


def _results(records: Sequence[Record], names: list[str]) -> str:
    metrics = list(dict.fromkeys(name for record in records for name in record.result))
    if not metrics:
        return '<p class="empty">None of the runs has ended yet.</p>'
    only_seeds = set(differences(records)) <= {"seed"} and len(records) > 1
    head = ["", *names, *(["mean", "spread"] if only_seeds else [])]
    rows = []
    for name in metrics:
        values = [record.result.get(name) for record in records]
        row: list[Any] = [spaced(name), *values]
        known = [float(value) for value in values if value is not None]
        if only_seeds:
            row += [statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0]
        rows.append(row)
    return html_table(head, rows)


def _curves(records: Sequence[Record], names: list[str]) -> str:
    kinds = list(dict.fromkeys(one.name for record in records for one in record.series))
    results = {name for record in records for name in record.result}
    drawn = []
    for kind in sorted(kinds, key=lambda kind: kind not in results):
        group = [
            Series(label, one.steps, one.values)
            for label, record in zip(names, records)
            for one in record.series
            if one.name == kind and len(one.steps) > 1
        ]
        if group:
            drawn.append(f"<div><h3>{escape(spaced(kind))}</h3>{chart(group, name=kind)}</div>")
    if not drawn:
        return '<p class="empty">The runs have logged no curves.</p>'
    return f'<div class="charts few">{"".join(drawn)}</div><p class="note">Over steps.</p>'


def _settings(records: Sequence[Record], names: list[str]) -> str:
    differing = differences(records)
    if not differing:
        return '<p class="empty">The runs have the same settings.</p>'
    return html_table(["", *names], [[name, *map(_shown, values)] for name, values in differing.items()])


def _shown(value: Any) -> str:
    return "–" if value is None else written(value)


def _runs(records: Sequence[Record], names: list[str]) -> str:
    rows = [
        [name, record.status, number(record.last_step), str(record.described.get("command") or ""), str(record.folder)]
        for name, record in zip(names, records)
    ]
    return html_table(["", "state", "steps", "command", "folder"], rows)
