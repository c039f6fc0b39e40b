"""DDPG's form, TD3 and SAC against Stable-Baselines3 on Pendulum: CPU seconds an environment step, learning included.

    python benchmarks/rl_continuous.py             → results/bench/rl_continuous.json
    python benchmarks/rl_continuous.py compiled    the rows of `--update compiled` alone; the others stay as they are
    python benchmarks/rl_continuous.py learning N  what all three have learned after N steps, 5 seeds: the peer's, ours by torch
                                                   and in machine code → results/rl/continuous_learning.json

Both sides run on one thread with equal networks, Adam, learning rates, batch, buffer, γ, τ, noise and updates per environment
step: those of our default presets, in the same number of worlds. The clock of ours is the loop of a real `etude run` (log and
checkpoints included), which a warm-up run has compiled before; the peer's is `learn()` without callbacks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS, STARTS = 1600, 320
COMMON = {"steps": STEPS, "worlds": 4, "collect": 64, "updates": 32, "batch": 128, "learning_starts": STARTS}
LIGHT = {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "quiet": True, "threads": 1}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPG": ("rl/off_policy_actor_critic", {"gradient": "mean"}),
    "TD3": ("rl/td3", {}),
    "SAC": ("rl/sac", {}),
}
TORCH: tuple[dict[str, str], ...] = ({}, {"engine": "compiled"})
MACHINE: tuple[dict[str, str], ...] = ({"update": "compiled"}, {"engine": "compiled", "update": "compiled"})
NAMES = {
    (): "",
    ("engine",): ", compiled worlds",
    ("update",): ", compiled updates",
    ("engine", "update"): ", compiled whole loop",
}


def ours(kind: str, **flags: Any) -> float:
    """CPU seconds an environment step of `etude run`, first step to last."""
    import etude

    name, own = OURS[kind]
    with tempfile.TemporaryDirectory() as folder:
        result = etude.run(name, out=f"{folder}/run", **{**COMMON, **own, **flags}, **LIGHT)
        sessions = json.loads((result.folder / "environment.json").read_text())["sessions"]
    return sum(session["loop_cpu_seconds"] for session in sessions) / result.metrics["env_steps"]


def theirs(kind: str) -> float:
    """CPU seconds an environment step of the peer's `learn`."""
    model = _peer(kind, STARTS, 0)
    start = time.process_time()
    model.learn(STEPS)
    return (time.process_time() - start) / model.num_timesteps


def _peer(kind: str, starts: int, seed: int) -> Any:
    import numpy as np
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "batch_size": 128,
        "buffer_size": 100_000,
        "learning_starts": starts,
        "gamma": 0.98,
        "tau": 0.01,
        "train_freq": 16,
        "gradient_steps": 32,
        "policy_kwargs": {"net_arch": [256, 256]},
    }  # fmt: skip  (train_freq counts calls, each a step of 4 worlds)
    if kind != "SAC":
        settings["action_noise"] = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    env = make_vec_env("Pendulum-v1", n_envs=4, seed=seed)
    return getattr(stable_baselines3, kind)("MlpPolicy", env, seed=seed, device="cpu", **settings)


def rows(kinds: tuple[dict[str, str], ...]) -> list[dict[str, object]]:
    """Each method with each of these flags: worlds and updates as they come, or compiled."""
    from race import race

    return [
        race(
            OURS[kind][0].partition("/")[2].replace("_", " ") + NAMES[tuple(flags)],
            lambda kind=kind, flags=flags: ours(kind, **flags),
            lambda kind=kind: theirs(kind),
            f"Stable-Baselines3 {kind}", version("stable-baselines3"), 2.0,
            "Pendulum-v1, 4 worlds, 1 thread, all hyperparameters of our default preset, updates per environment step",
            pairs=5,
        )
        for kind in OURS
        for flags in kinds
    ]  # fmt: skip


def learning(total: int) -> None:
    """Return of the last actor's best actions on 50 fresh episodes, of all three on every seed."""
    import etude
    from etude.blocks.acting.episodes import play

    path = Path(__file__).resolve().parent.parent / "results" / "rl" / "continuous_learning.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for kind, (name, own) in OURS.items():
        found: dict[str, Any] = {"env": "Pendulum-v1", "steps": total, "peer_version": version("stable-baselines3")}
        found |= {who: [] for who in ("stable_baselines3", "torch", "compiled")}
        for seed in range(5):
            for update in ("torch", "compiled"):
                flags: dict[str, Any] = (
                    COMMON | own | LIGHT | {"steps": total, "learning_starts": 1000, "final_episodes": 50}
                )
                with tempfile.TemporaryDirectory() as folder:
                    out = f"{folder}/run"
                    result = etude.run(name, out=out, seed=seed, engine="compiled", update=update, **flags)
                found[update].append(result.metrics["greedy_return"])
            model = _peer(kind, 1000, seed)
            model.learn(total)
            scores = play(
                "Pendulum-v1", lambda s, m=model: m.predict(s, deterministic=True)[0], 50, seed, "final evaluation"
            )
            found["stable_baselines3"].append(float(scores.mean()))
            told = (f"{who} {found[who][-1]:.1f}" for who in ("stable_baselines3", "torch", "compiled"))
            print(kind, seed, *told, file=sys.stderr, flush=True)
        known = known | {f"{kind} {total}": found}
        path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the peer's, about its own dependencies
    if sys.argv[1:] == ["once"]:
        for kind in OURS:
            print(kind, *(ours(kind, **flags) * 1e3 for flags in (*TORCH, *MACHINE)), theirs(kind) * 1e3)
    elif sys.argv[1:2] == ["learning"]:
        learning(int(sys.argv[2]))
    else:
        from race import RESULTS, report

        known = json.loads((RESULTS / "rl_continuous.json").read_text()) if sys.argv[1:] == ["compiled"] else []
        fresh = rows(MACHINE) if sys.argv[1:] == ["compiled"] else rows((*TORCH, *MACHINE))
        told = {row["name"] for row in fresh}
        report("rl_continuous", [row for row in known if row["name"] not in told] + fresh)
