"""Races against peer libraries: `etude bench` runs `benchmarks/<room>.py` and reads what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from etude import catalog
from etude.core.errors import RunError, UserError


def bench(pattern: str | None, run: bool = True) -> list[dict[str, Any]]:
    """Run `benchmarks/<room>.py` of the matching rooms one after the other and return their recorded rows.

    They write to `results/bench` (below ETUDE_RESULTS where that is set). Raises UserError when there is no such race,
    or none can be run from an installed wheel; RunError when a race fails.
    """
    root = catalog.checkout_folder()
    if run and root is None:
        raise UserError("benchmarks run from a source checkout; 'etude bench --recorded' shows the recorded ratios")
    folder = catalog.results_folder() / "bench"
    scripts = sorted((root / "benchmarks").glob("*.py")) if root else []
    rooms = (
        [path.stem for path in scripts if "from race import" in path.read_text(encoding="utf-8")]
        if run
        else [path.stem for path in sorted(folder.glob("*.json"))]
    )
    chosen = [room for room in rooms if pattern is None or pattern.partition("/")[0] == room.partition("_")[0]]
    if not chosen:
        raise UserError(f"there is no benchmark for '{pattern}' (there are {', '.join(rooms) or 'none'})")
    rows = []
    for room in chosen:
        if run:
            assert root is not None
            finished = subprocess.run(
                [sys.executable, str(root / "benchmarks" / f"{room}.py")], check=False, stdout=sys.stderr
            )
            if finished.returncode:
                raise RunError(
                    f"benchmarks/{room}.py failed (exit code {finished.returncode}); its message stands above"
                )
        rows += json.loads((folder / f"{room}.json").read_text(encoding="utf-8"))
    return rows
