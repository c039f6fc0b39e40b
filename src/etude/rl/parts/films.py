"""`etude sample` of what acts: its episodes as films, or their returns where the environment cannot be drawn."""

from __future__ import annotations

from pathlib import Path

from etude.blocks.acting.environments import Environment
from etude.blocks.acting.episodes import Policy, film, play
from etude.core.randomness import fold


def films(env: Environment, policy: Policy, count: int, seed: int, folder: Path) -> str:
    """Write ``episode-0.gif`` … into `folder` and return a line for each; without pictures, the reason and the returns."""
    lines = []
    for index in range(count):
        pictures, total, reason = film(env, policy, fold(seed, index))
        if not pictures:
            returns = play(env, policy, count, seed)
            return f"{reason}\nreturns: " + ", ".join(f"{value:g}" for value in returns)
        path = folder / f"episode-{index}.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50, loop=0)
        lines.append(f"{path}: return {total:g}")
    return "\n".join(lines)
