"""Every method that acts, on one CartPole at equal environment steps: learning curves with their spread over seeds.

    python benchmarks/cartpole.py        all → results/rl/cartpole.json and docs/pictures/cartpole.png
    python benchmarks/cartpole.py ppo    this one again; the others stay as they are
    python benchmarks/cartpole.py draw   the picture again

Each method has the settings it comes with (its default preset); only the length is equal. The curve is the mean return of 20
greedy episodes in fresh worlds, at the environment steps that had been taken when they were played. Methods that learn from
recordings or from an expert have no curve: they are points at the environment steps (or labels) that they were given.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECORD, PICTURE = ROOT / "results/rl/cartpole.json", ROOT / "docs/pictures/cartpole.png"
STEPS = 100_000
SEEDS = range(5)
EVALUATE = {"evaluate_every": 5000, "evaluation_episodes": 20, "final_episodes": 100}
CURVES: dict[str, dict[str, Any]] = {
    "rl/reinforce": {"episodes": 800, "evaluate_every": 40},
    "rl/off_policy_gradient": {"episodes": 640, "evaluate_every": 40},
    "rl/actor_critic": {"steps": STEPS},
    "rl/a2c": {"steps": STEPS},
    "rl/a3c": {"steps": STEPS},
    "rl/ppo": {"steps": STEPS},
    "rl/dqn": {"steps": STEPS},
}
POINTS: dict[str, dict[str, Any]] = {
    "rl/fitted": {},
    "imitation/behaviour_cloning": {"preset": "pole"},
    "imitation/dagger": {"preset": "few"},
}
GIVEN = {  # what those without a curve learn from, read off their results or settings
    "rl/fitted": ("transitions of the uniform policy", 10_000),
    "imitation/behaviour_cloning": ("steps of an expert", 10_000),
    "imitation/dagger": ("labels of an expert", 0),
}


def learn(name: str, flags: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: its curve [(environment steps, greedy return)], results and seconds."""
    import etude

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = etude.run(name, seed=seed, out=Path(folder) / "run", quiet=True, threads=1, **flags)
        seconds = time.perf_counter() - start
        log = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((result.folder / "config.json").read_text())
    points, steps = [], 0.0
    for row in log:
        steps = row.get("env_steps", steps)
        if "greedy_return" in row and name in CURVES:
            points.append((steps, row["greedy_return"]))
    points = [point for point in points if point[0] <= STEPS * 1.05]
    score = result.metrics.get("greedy_return", result.metrics.get("learner_return"))
    given = result.metrics.get("labels", config.get("transitions"))
    return {"seed": seed, "curve": points, "greedy_return": score, "given": given, "seconds": round(seconds, 1)}


def record(names: list[str]) -> dict[str, Any]:
    """Run what is named, on all seeds, and write it beside what is known."""
    from etude import catalog

    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, flags in (CURVES | POINTS).items():
        if name not in catalog.entries() or (names and name.partition("/")[2] not in names):
            continue
        takes = {field["name"] for field in catalog.find(name).fields}
        light = {key: value for key, value in EVALUATE.items() if key in takes} if name in CURVES else {}
        light |= {"engine": "compiled"} if "engine" in takes else {}  # the same transitions bit by bit
        found[name] = [learn(name, light | flags, seed) for seed in SEEDS]
        print(name, *(f"{run['greedy_return']:.0f}" for run in found[name]), file=sys.stderr, flush=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw(found: dict[str, Any]) -> None:
    """A small panel for each method with a curve: its seeds, their mean, and where 475 lies."""
    from etude.blocks.pictures.panels import label, panels
    from etude.blocks.pictures.plots import PALETTE, SOFT

    shown = {name: runs for name, runs in found.items() if name in CURVES}
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = panels(columns, rows, width=3.0 * columns, height=2.5 * rows, sharex=True, sharey=True)
    for place in axes[len(shown) :]:
        place.set_visible(False)
    for place, (name, runs) in zip(axes, shown.items(), strict=False):
        grid = np.linspace(0, STEPS, 81)
        curves = [np.array(run["curve"]) for run in runs]
        lines = np.array([np.interp(grid, curve[:, 0], curve[:, 1], left=np.nan, right=np.nan) for curve in curves])
        for line in lines:
            place.plot(grid, line, color=PALETTE[0], linewidth=0.7, alpha=0.35)
        seen = ~np.isnan(lines).any(0)
        place.plot(grid[seen], lines[:, seen].mean(0), color=PALETTE[0], linewidth=2)
        place.axhline(475, color=SOFT, linewidth=0.8, linestyle="--")
        place.set(ylim=(0, 515), xlim=(0, STEPS))
        label(place, name, "environment steps", "greedy return" if place in axes[::columns] else "")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    words = sys.argv[1:]
    draw(json.loads(RECORD.read_text()) if words == ["draw"] else record(words))
