"""The report of one run: a single HTML page that opens anywhere, offline, with or without JavaScript.

`render` reads a run folder and writes `report.html` into it. It knows no method and never imports torch: whatever a
method logged, returned or drew is shown by its shape (a number over steps, a picture, a table, a text). Every file may
be missing, because a run that has just started, or has failed, deserves a report too; a file that cannot be read is
named at the foot of the page. The page loads nothing: pictures, style and script are inside it, and a content security
policy with the hash of our one script makes the browser refuse anything else.

The modules build on each other in this order: reading, words, charts, headline and tiles, page.
"""

from __future__ import annotations

import os
from pathlib import Path

from etude.core.report.page import compose
from etude.core.report.reading import Contract, Record

__all__ = ["Contract", "render"]


def render(folder: Path, contract: Contract | None = None) -> Path:
    """Write ``report.html`` into this run folder and return its path; the old page stays until the new one is whole.

    Raises FileNotFoundError if the folder does not exist. Missing or damaged files inside it are not errors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}")
    text = compose(Record(folder), contract or Contract())
    path = folder / "report.html"
    part = folder / f".report.{os.getpid()}.part"
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
