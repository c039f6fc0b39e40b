"""The report of a run, with what the catalogue knows of its method beside it."""

from __future__ import annotations

from pathlib import Path

from etude.catalog import Entry


def write_report(entry: Entry, folder: Path) -> Path:
    """Write ``report.html`` of a run folder from its files and the method's contract."""
    from etude.core import report

    contract = entry.contract
    return report.render(
        folder,
        report.Contract(
            title=entry.title,
            paper=contract.get("Paper", entry.paper),
            section=entry.section,
            equation=contract.get("Equation", ""),
            algorithm=contract.get("Algorithm", ""),
            differences=contract.get("Differences", ""),
            expect=contract.get("Expect", ""),
            docs=contract["claim"].partition("\n")[2].strip(),
            fields=tuple((field["name"], field["help"]) for field in entry.fields),
            bars=tuple(entry.experiments),
            metrics=entry.metrics,
            card=entry.card,
            samples=entry.samples,
        ),
    )
