"""PPO and A2C on one rank and on two, as torchrun starts them, with the same worlds and the same batch in all.

    python benchmarks/ranks.py           the scaling of each row (or of those named) → results/rl/ranks.json
    python benchmarks/ranks.py curves    returns on CartPole after equal steps in all, 3 seeds → the same file

Two ranks have half the worlds, half the minibatch and half the environment steps each, so the updates are as many and learn from
as much. Every rank has one thread. What is timed is a step of the run's clock (a segment with its updates), the median over the
run: no evaluation, nothing of the first steps. `wall` is the ratio of seconds and says something only where two cores are idle;
`cpu` is the ratio of CPU seconds, of one rank to the busier one of two, the exchange included: the most that two idle cores would
give. `exchange` is the share of a rank's CPU seconds that go to all-reduces.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

LIGHT = {
    "evaluate_every": 0,
    "evaluation_episodes": 1,
    "final_episodes": 1,
    "quiet": True,
    "threads": 1,
    "device": "cpu",
}
SPLIT = ("worlds", "batch", "steps")  # what is shared among the ranks
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # cheap worlds, then dear ones
    "ppo, CartPole, 8 worlds": ("rl/ppo", {"steps": 4096, "worlds": 8, "batch": 256}),
    "ppo, Acrobot, 16 worlds": (
        "rl/ppo", {"env": "Acrobot-v1", "steps": 12_288, "worlds": 16, "segment": 64, "passes": 4, "batch": 256},
    ),
    "ppo, Acrobot, 64 worlds": (
        "rl/ppo", {"env": "Acrobot-v1", "steps": 32_768, "worlds": 64, "segment": 32, "passes": 4, "batch": 1024},
    ),
    "a2c, CartPole, 64 worlds": ("rl/a2c", {"steps": 32_768, "worlds": 64}),
    "a2c, Acrobot, 16 worlds": ("rl/a2c", {"env": "Acrobot-v1", "steps": 8192, "worlds": 16}),
    "a2c, Acrobot, 64 worlds": ("rl/a2c", {"env": "Acrobot-v1", "steps": 32_768, "worlds": 64}),
}  # fmt: skip
ONE = """
import json, os, sys, time
import torch
import etude
from etude.core.run import Run
name, settings, told = json.loads(sys.argv[1])
steps, reduce, clock, exchange = Run.steps, torch.distributed.all_reduce, [], [0.0]
def timed(run, total):
    for step in steps(run, total):
        clock.append((time.perf_counter(), time.process_time(), exchange[0]))
        yield step
def counted(*given, **named):
    before = time.process_time()
    done = reduce(*given, **named)
    exchange[0] += time.process_time() - before
    return done
Run.steps, torch.distributed.all_reduce = timed, counted
found = etude.run(name, **settings)
taken = list(zip(*([b - a for a, b in zip(*pair)] for pair in zip(clock[2:-1], clock[3:]))))
median = lambda values: sorted(values)[len(values) // 2]
spent = dict(zip(("wall", "cpu", "exchange"), map(median, taken))) if len(clock) > 4 else {}
open(f"{told}.{os.environ.get('RANK', 0)}", "w").write(json.dumps(spent | {"metrics": found.metrics}))
"""


def ranks(name: str, settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a step costs each of `count` ranks: wall, cpu and exchange in seconds; and its metrics."""
    share = {k: v // count if k in SPLIT else v for k, v in settings.items()}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        words = [name, {**LIGHT, **share, "out": f"{folder}/run"}, f"{folder}/told"]
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", ONE, json.dumps(words)],
                env=os.environ | ({} if count == 1 else {**shared, "RANK": str(n), "LOCAL_RANK": str(n)}),
                stdout=subprocess.DEVNULL,
            )
            for n in range(count)
        ]  # fmt: skip
        codes = [one.wait() for one in started]
        if any(codes):
            raise SystemExit(f"{name} on {count} ranks failed")
        return [json.loads(Path(f"{folder}/told.{n}").read_text()) for n in range(count)]


def scaling(name: str, pairs: int = 2) -> dict[str, Any]:
    """The median of `pairs` of runs in turn, one rank and two."""
    found = []
    for _ in range(pairs):
        (alone,), both = (ranks(*ROWS[name], count) for count in (1, 2))
        found.append({
            "wall": alone["wall"] / max(one["wall"] for one in both),
            "cpu": alone["cpu"] / max(one["cpu"] for one in both),
            "exchange": max(one["exchange"] / one["cpu"] for one in both),
        })  # fmt: skip
    row = {"name": name, **{key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}}
    print(row, file=sys.stderr, flush=True)
    return row | {"bar": 1.7, "busy": round(os.getloadavg()[0], 1)}


def curves() -> list[dict[str, Any]]:
    """Sampled return on 100 fresh episodes after the default preset's steps in all, on one rank and on two."""
    found = []
    for name, settings in (
        ("rl/ppo", {"steps": 100_000, "worlds": 8, "batch": 256}),
        ("rl/a2c", {"steps": 200_000, "worlds": 8}),
    ):
        for count in (1, 2):
            scores = [
                ranks(name, {**settings, "seed": seed, "final_episodes": 100}, count)[0]["metrics"]["sampled_return"]
                for seed in range(3)
            ]
            found.append({"name": f"{name}, {count} rank{'s' * (count > 1)}", "sampled_return": scores})
            print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    path = ROOT / "results/rl/ranks.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"scaling": [], "curves": []}
    if sys.argv[1:] == ["curves"]:
        kept["curves"] = curves()
    else:
        chosen = [name for name in ROWS if name in sys.argv[1:]] or list(ROWS)
        fresh = [scaling(name) for name in chosen]
        kept["scaling"] = [row for row in kept["scaling"] if row["name"] not in chosen] + fresh
    path.write_text(json.dumps(kept, indent=1) + "\n")
