"""Dynamic programming against the double loop over states and actions that textbooks print, to equal values.

    python benchmarks/rl_planning.py   → results/bench/rl_planning.json

Ours is the loop of a real `etude run rl/dynamic_programming` (logging included); the peer is plain Python over Gymnasium's table
P, as in most courses; CPU seconds of one thread on both sides. Both end at the same change of a value, and their values
agree to 1e-10, which is checked before anything is timed. Policy iteration solves linear equations here, where the loop sweeps.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

GAMMA = 0.99
TOLERANCE = 1e-12
SIZE = 32


def world(name: str) -> Any:
    """A world by its registered name; "lake": a frozen lake of `SIZE` by `SIZE` cells."""
    import gymnasium
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    if name != "lake":
        return gymnasium.make(name)
    return gymnasium.make("FrozenLake-v1", desc=generate_random_map(SIZE, seed=0), max_episode_steps=1000)


WORLDS = {"FrozenLake8x8-v1": "64 states", "Taxi-v4": "500 states", "lake": f"{SIZE**2} states"}


def ours(name: str, algorithm: str) -> tuple[float, np.ndarray]:
    """CPU seconds of the run's loop, and V (S,)."""
    import etude

    env = name if name != "lake" else (lambda: world(name))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = {"env": env, "algorithm": algorithm, "gamma": GAMMA, "tolerance": TOLERANCE, "quiet": True}
        result = etude.run("rl/dynamic_programming", out=out, **flags)
        sessions = json.loads((result.folder / "environment.json").read_text())["sessions"]
        value = etude.load(out).model.value.numpy().copy()
    return sum(session["loop_cpu_seconds"] for session in sessions), value


def backup(outcomes: list[tuple[float, int, float, bool]], value: list[float]) -> float:
    """Σ p (r + γ (1 − terminated) V(s')) of one state and action."""
    return sum(p * (r + GAMMA * (0.0 if terminated else value[s])) for p, s, r, terminated in outcomes)


def looped_value_iteration(table: dict[int, dict[int, Any]]) -> np.ndarray:
    """V (S,) by sweeps of all states, each a maximum over actions, until no value moves by more than the tolerance."""
    value = [0.0] * len(table)
    while True:
        new = [max(backup(table[s][a], value) for a in table[s]) for s in range(len(table))]
        change = max(abs(a - b) for a, b in zip(new, value, strict=True))
        value = new
        if change <= TOLERANCE:
            return np.array(value)


def looped_policy_iteration(table: dict[int, dict[int, Any]]) -> np.ndarray:
    """V (S,) by rounds of evaluation, in sweeps until no value moves, and improvement, until no action changes."""
    value, policy = [0.0] * len(table), [0] * len(table)
    while True:
        while True:
            new = [backup(table[s][policy[s]], value) for s in range(len(table))]
            change = max(abs(a - b) for a, b in zip(new, value, strict=True))
            value = new
            if change <= TOLERANCE:
                break
        rests = True
        for s in range(len(table)):
            q = [backup(table[s][a], value) for a in table[s]]
            if max(q) > q[policy[s]] + 1e-9:
                policy[s], rests = q.index(max(q)), False
        if rests:
            return np.array(value)


def rows() -> list[dict[str, object]]:
    """Both algorithms in both worlds."""
    from race import race

    loops = {"policy_iteration": looped_policy_iteration, "value_iteration": looped_value_iteration}
    found = []
    for env, size in WORLDS.items():
        table = world(env).unwrapped.P
        for algorithm, loop in loops.items():
            apart = float(np.abs(ours(env, algorithm)[1] - loop(table)).max())
            assert apart <= 1e-10, f"{algorithm} in {env}: values differ by {apart}"

            def timed(loop: Any = loop, table: Any = table) -> float:
                start = time.process_time()
                loop(table)
                return time.process_time() - start

            found.append(
                race(
                    f"dynamic programming, {algorithm.replace('_', ' ')}, {env} ({size})",
                    partial(lambda env, algorithm: ours(env, algorithm)[0], env, algorithm),
                    timed, "a Python double loop over P", f"Gymnasium {version('gymnasium')}", 20.0,
                    f"γ {GAMMA}, changes down to {TOLERANCE}; values equal to {apart:.0e}", pairs=5,
                )
            )  # fmt: skip
    return found


if __name__ == "__main__":
    from race import report

    report("rl_planning", rows())
