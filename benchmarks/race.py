"""Alternating timing of us against a peer: A B A B …, one process tree, the ratio taken pair by pair.

Shared machines drift, so absolute seconds do not travel; the median of the pairwise ratios does. Every
`benchmarks/<room>.py` builds its rows with `race` and writes them with `report` to `bench/<room>.json` in `results/` (in
ETUDE_RESULTS where that is set).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from etude.catalog import results_folder

RESULTS = results_folder() / "bench"


def race(
    name: str,
    ours: Callable[[], float | None],
    peer: Callable[[], float | None],
    peer_name: str,
    peer_version: str,
    bar: float,
    equal: str,
    pairs: int = 7,
    warmup: int = 1,
) -> dict[str, object]:
    """Time `ours` and `peer` in turn and return one benchmark row.

    A callable that returns a float reports its own cost (seconds, or seconds per unit of work: both sides must
    use the same unit); one that returns None is timed from outside. `ratio` = peer / ours, so above 1 we are
    faster; `low` and `high` are the extremes over the pairs; `equal` says what was checked to be the same.
    """
    for _ in range(warmup):
        ours()
        peer()
    ratios, mine, theirs = [], [], []
    for pair in range(pairs):
        # the order flips each pair, so a drift of the machine favours neither side
        first, second = (ours, peer) if pair % 2 == 0 else (peer, ours)
        a, b = _seconds(first), _seconds(second)
        ours_s, peer_s = (a, b) if pair % 2 == 0 else (b, a)
        mine.append(ours_s)
        theirs.append(peer_s)
        ratios.append(peer_s / ours_s)
    row = {
        "name": name,
        "peer": peer_name,
        "peer_version": peer_version,
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "bar": bar,
        "equal": equal,
        "ours_seconds": statistics.median(mine),
        "peer_seconds": statistics.median(theirs),
    }
    print(
        f"{name:<40} {row['ratio']:6.2f}x [{row['low']:.2f}, {row['high']:.2f}]  bar {bar}x  vs {peer_name}",
        file=sys.stderr,
        flush=True,
    )
    return row


def report(room: str, rows: list[dict[str, object]]) -> Path:
    """Write the rows of one room to `results/bench/<room>.json` (replacing it whole) and return the path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{room}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(path)
    print(path)
    return path


def cpu(work: Callable[[], Any], repeats: int = 8) -> Callable[[], float]:
    """CPU seconds of this process for one call: the median of `repeats`. Other programs are not counted."""

    def once() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return lambda: statistics.median(once() for _ in range(repeats))


def _seconds(work: Callable[[], float | None]) -> float:
    start = time.perf_counter()
    own = work()
    return time.perf_counter() - start if own is None else own
