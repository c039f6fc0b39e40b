"""DDPG's form, TD3 and SAC against Stable-Baselines3 on Pendulum: CPU seconds an environment step, learning included.

    python benchmarks/rl_continuous.py   → results/bench/rl_continuous.json

Both sides run on one thread with equal networks, Adam, learning rates, batch, buffer, γ, τ, noise and updates per environment
step: those of our default presets, in the same number of worlds. The clock of ours is the loop of a real `etude run` (log and
checkpoints included); the peer's is `learn()` without callbacks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from typing import Any

STEPS, STARTS = 1600, 320
COMMON = {"steps": STEPS, "worlds": 4, "collect": 64, "updates": 32, "batch": 128, "learning_starts": STARTS}
LIGHT = {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "quiet": True, "threads": 1}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPG": ("rl/off_policy_actor_critic", {"gradient": "mean"}),
    "TD3": ("rl/td3", {}),
    "SAC": ("rl/sac", {}),
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
        "learning_starts": STARTS,
        "gamma": 0.98,
        "tau": 0.01,
        "train_freq": 16,
        "gradient_steps": 32,
        "policy_kwargs": {"net_arch": [256, 256]},
    }  # fmt: skip  (train_freq counts calls, each a step of 4 worlds)
    if kind != "SAC":
        settings["action_noise"] = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    env = make_vec_env("Pendulum-v1", n_envs=4, seed=0)
    model = getattr(stable_baselines3, kind)("MlpPolicy", env, seed=0, device="cpu", **settings)
    start = time.process_time()
    model.learn(STEPS)
    return (time.process_time() - start) / model.num_timesteps


def rows() -> list[dict[str, object]]:
    """Each method in Gymnasium's worlds and in compiled ones."""
    from race import race

    return [
        race(
            OURS[kind][0].partition("/")[2].replace("_", " ") + (", compiled worlds" if flags else ""),
            lambda kind=kind, flags=flags: ours(kind, **flags),
            lambda kind=kind: theirs(kind),
            f"Stable-Baselines3 {kind}", version("stable-baselines3"), 2.0,
            "Pendulum-v1, 4 worlds, 1 thread, all hyperparameters of our default preset, updates per environment step",
            pairs=5,
        )
        for kind in OURS
        for flags in ({}, {"engine": "compiled"})
    ]  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the peer's, about its own dependencies
    if sys.argv[1:] == ["once"]:
        for kind in OURS:
            print(kind, ours(kind) * 1e3, ours(kind, engine="compiled") * 1e3, theirs(kind) * 1e3)
    else:
        from race import report

        report("rl_continuous", rows())
