"""DQN, PPO and A2C against Stable-Baselines3: environment steps a second with the learning in them, and learning curves.

    python benchmarks/rl.py            the races → results/bench/rl.json
    python benchmarks/rl.py on_policy  PPO and A2C alone; DQN's rows stay as they are (`dqn`, `a2c`, `ppo`: those alone;
                                       `dqn compiled`: those of DQN whose updates are machine code)
    python benchmarks/rl.py learning N what PPO has learned after N steps with the peer's defaults, 5 seeds: the peer's, ours by
                                       torch and in machine code → results/rl/ppo_learning.json
    python benchmarks/rl.py curves     5 seeds of both, with the peer's default settings and with RL Zoo's
                                       → results/rl/dqn_curves.json and docs/pictures/dqn_vs_sb3.png

Both sides run on one thread (`torch.set_num_threads(1)`), which is also the faster setting of the peer on its defaults.
The clock of ours is the loop of a real `etude run` (log, checkpoints and one last evaluation included); the peer's is
`learn()` without callbacks. Equal: network, Adam, learning rate, batch, buffer, ε schedule, γ, clipping, and the number
of updates per environment step. Not equal: ours acts in 8 worlds at once; the peer's default is 1. The bar of 6x was set
for the peer as it comes, that of 4x for RL Zoo's 256-256 network, where matrix products of equal size take most of our time.
Subnormal numbers are flushed within our updates alone; the peer's Adam meets them as it comes.
PPO and A2C have the peer's defaults on both sides, steps of experience between updates included (one world of 2048 steps is
8 worlds of 256); ours runs in Gymnasium's worlds, in compiled ones, and with `--update compiled` in machine code altogether,
which a warm-up run has compiled before the clock starts. Their clock is the CPU's, as both sides have one thread.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ZOO = {
    "learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99,
    "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16,
    "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]},
}  # fmt: skip
DEFAULTS: dict[str, Any] = {}  # the peer's own: 64-64, batch 32, 1 update every 4 steps, learning rate 1e-4
ON_POLICY: dict[str, dict[str, Any]] = {  # the peer's defaults by our names
    "PPO": {
        "passes": 10, "batch": 64, "gamma": 0.99, "gae_lambda": 0.95, "clip_ratio": 0.2, "value_coefficient": 0.5,
        "entropy_bonus": 0.0, "clip_norm": 0.5, "learning_rate": 3e-4, "schedule": "constant", "widths": (64, 64),
        "worlds": 8, "segment": 256, "steps": 4 * 2048,
    },
    "A2C": {
        "gamma": 0.99, "gae_lambda": 1.0, "value_coefficient": 0.5, "entropy_bonus": 0.0, "clip_norm": 0.5,
        "learning_rate": 7e-4, "schedule": "constant", "widths": (64, 64), "segment": 5,
    },
}  # fmt: skip
WORLDS = 8
SEEDS = range(5)


def ours(preset: str, steps: int, engine: str = "gymnasium") -> float:
    """CPU seconds an environment step of `etude run rl/dqn`, first step to last."""
    import etude

    with tempfile.TemporaryDirectory() as folder:
        light = {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "quiet": True, "threads": 1}
        result = etude.run("rl/dqn", preset=preset, steps=steps, engine=engine, out=Path(folder) / "run", **light)
        seconds = _loop_seconds(result.folder, "loop_cpu_seconds")
    return seconds / result.metrics["env_steps"]


def _loop_seconds(folder: Path, kind: str = "loop_seconds") -> float:
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    return sum(session[kind] for session in sessions)


def theirs(settings: dict[str, Any], steps: int, worlds: int = 1) -> float:
    """CPU seconds an environment step of Stable-Baselines3's `learn`."""
    model = _peer(settings, 0, worlds)
    start = time.process_time()
    model.learn(steps)
    return (time.process_time() - start) / model.num_timesteps


def _peer(settings: dict[str, Any], seed: int, worlds: int = 1) -> Any:
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    settings = dict(settings)
    if worlds > 1:  # train_freq counts calls there, so these keep the updates per environment step
        settings["train_freq"] = max(1, settings.get("train_freq", 4) // worlds)
        if "gradient_steps" not in settings:
            settings["gradient_steps"] = settings["train_freq"] * worlds // 4
    env = make_vec_env("CartPole-v1", n_envs=worlds, seed=seed)
    return DQN("MlpPolicy", env, seed=seed, device="cpu", **settings)


def ours_on_policy(kind: str, flags: dict[str, Any]) -> float:
    """CPU seconds an environment step of `etude run rl/ppo` or `rl/a2c`, first step to last."""
    import etude

    with tempfile.TemporaryDirectory() as folder:
        light = {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "quiet": True, "threads": 1}
        result = etude.run(f"rl/{kind.lower()}", out=Path(folder) / "run", **{**ON_POLICY[kind], **flags}, **light)
        return _loop_seconds(result.folder, "loop_cpu_seconds") / result.metrics["env_steps"]


def theirs_on_policy(kind: str, worlds: int, steps: int, total: int) -> float:
    """CPU seconds an environment step of the peer's `learn` with its defaults: `steps` of each world between updates."""
    model, seconds = _learned(kind, worlds, steps, total, 0)
    return seconds / model.num_timesteps


def _learned(kind: str, worlds: int, steps: int, total: int, seed: int) -> tuple[Any, float]:
    """The peer's PPO or A2C with its defaults, after `total` steps, and the CPU seconds they took."""
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    env = make_vec_env("CartPole-v1", n_envs=worlds, seed=seed)
    model = getattr(stable_baselines3, kind)("MlpPolicy", env, n_steps=steps, seed=seed, device="cpu")
    start = time.process_time()
    model.learn(total)
    return model, time.process_time() - start


def on_policy_rows(only: str = "") -> list[dict[str, object]]:
    """PPO and A2C, or one of them: (name, our flags, the peer's worlds, steps between updates and in all, bar)."""
    from race import race

    compiled = {"engine": "compiled"}
    machine = {"engine": "compiled", "update": "compiled", "steps": 8 * 2048}
    races = (
        ("PPO", "ppo", {}, 1, 2048, 8192, 5.0),
        ("PPO", "ppo, the peer in 8 worlds", {}, 8, 256, 8192, 5.0),
        ("PPO", "ppo, compiled worlds", compiled, 1, 2048, 8192, 5.0),
        ("PPO", "ppo, compiled whole loop", machine, 1, 2048, 8192, 30.0),
        ("A2C", "a2c, 8 worlds", {"worlds": 8, "steps": 24_000}, 8, 5, 24_000, 3.0),
        ("A2C", "a2c, 8 compiled worlds", {"worlds": 8, "steps": 24_000, **compiled}, 8, 5, 24_000, 3.0),
        ("A2C", "a2c, 64 worlds", {"worlds": 64, "steps": 96_000}, 64, 5, 96_000, 4.0),
        ("A2C", "a2c, 64 compiled worlds", {"worlds": 64, "steps": 96_000, **compiled}, 64, 5, 96_000, 4.0),
    )
    return [
        race(
            name,
            lambda kind=kind, flags=flags: ours_on_policy(kind, flags),
            lambda kind=kind, worlds=worlds, steps=steps, total=total: theirs_on_policy(kind, worlds, steps, total),
            f"Stable-Baselines3 {kind}", version("stable-baselines3"), bar,
            f"CartPole-v1, 1 thread, the peer's defaults on both sides; ours {flags.get('worlds', 8)} worlds, peer {worlds}",
            pairs=7,
        )
        for kind, name, flags, worlds, steps, total, bar in races
        if name.startswith(only)
    ]  # fmt: skip


def learning(total: int) -> None:
    """J of the last policy (its actions sampled, 100 fresh episodes) and its greedy return, of all three on every seed."""
    import torch

    import etude
    from etude.blocks.acting.episodes import play

    flags = ON_POLICY["PPO"] | {"steps": total, "evaluate_every": 0, "evaluation_episodes": 1, "engine": "compiled"}
    found: dict[str, Any] = {"env": "CartPole-v1", "steps": total, "peer_version": version("stable-baselines3")}
    found |= {who: [] for who in ("stable_baselines3", "torch", "compiled")}
    for seed in SEEDS:
        for update in ("torch", "compiled"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                result = etude.run("rl/ppo", out=out, seed=seed, update=update, quiet=True, threads=1, **flags)
            scores = {"sampled": result.metrics["sampled_return"], "greedy": result.metrics["greedy_return"]}
            found[update].append({"seed": seed, **scores})
        model, _ = _learned("PPO", 1, 2048, total, seed)

        def acting(state: np.ndarray, greedy: bool) -> np.ndarray:
            with torch.no_grad():
                return model.policy.get_distribution(torch.from_numpy(state)).get_actions(greedy).numpy()  # noqa: B023

        scores = {
            name: float(
                play("CartPole-v1", lambda s, greedy=greedy: acting(s, greedy), 100, seed, f"final {name}").mean()
            )
            for name, greedy in (("sampled", False), ("greedy", True))
        }
        found["stable_baselines3"].append({"seed": seed, **scores})
        told = (f"{who} {found[who][-1]['sampled']:.1f}" for who in ("stable_baselines3", "torch", "compiled"))
        print(seed, *told, file=sys.stderr, flush=True)
    path = ROOT / "results" / "rl" / "ppo_learning.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {str(total): found}, indent=1) + "\n")


def rows(engines: str = "") -> list[dict[str, object]]:
    """The races of DQN, one row each (or those of the engines whose names begin so)."""
    from race import race

    peer, number = "Stable-Baselines3 DQN", version("stable-baselines3")
    equal = "CartPole-v1, 1 thread, hyperparameters and updates per environment step; ours 8 worlds, peer {}"
    races = (
        ("dqn, the peer's default hyperparameters", "sb3", DEFAULTS, 4000, 1, 6.0, "gymnasium"),
        ("dqn, the peer's defaults and 8 worlds", "sb3", DEFAULTS, 4000, WORLDS, 6.0, "gymnasium"),
        ("dqn, RL Zoo's CartPole settings (256-256)", "default", ZOO, 4000, 1, 4.0, "gymnasium"),
        ("dqn, RL Zoo's settings and 8 worlds", "default", ZOO, 4000, WORLDS, 4.0, "gymnasium"),
        ("dqn, RL Zoo's settings, ours in compiled worlds", "default", ZOO, 4000, WORLDS, 4.0, "compiled"),
        ("dqn, RL Zoo's settings, compiled updates", "default", ZOO, 4000, 1, 4.0, "compiled_update"),
        ("dqn, RL Zoo's settings, compiled whole loop", "default", ZOO, 4000, 1, 4.0, "compiled_whole"),
        (
            "dqn, RL Zoo's settings and 8 worlds, compiled whole loop",
            "default",
            ZOO,
            4000,
            WORLDS,
            4.0,
            "compiled_whole",
        ),
    )
    return [
        race(
            name,
            lambda preset=preset, steps=steps, engine=engine: ours(preset, steps, engine),
            lambda settings=settings, steps=steps, worlds=worlds: theirs(settings, steps, worlds),
            peer, number, bar, equal.format(worlds), pairs=9,
        )
        for name, preset, settings, steps, worlds, bar, engine in races
        if engine.startswith(engines)
    ]  # fmt: skip


def curves() -> None:
    """Learning curves of both with both settings, and the picture of them."""
    path = ROOT / "results" / "rl" / "dqn_curves.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "defaults": learn("sb3", DEFAULTS, 100_000, 3200),
        "zoo": learn("default", ZOO, 50_000, 2560),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, ROOT / "docs" / "pictures" / "dqn_vs_sb3.png")


def learn(preset: str, settings: dict[str, Any], steps: int, every: int) -> dict[str, Any]:
    """Greedy return of both over `SEEDS`, evaluated in the same worlds by the same function at the same times.

    Both keep the network that did best in 20 episodes and both score it, and the last one, on 100 fresh episodes.
    """
    import torch

    import etude
    from etude.blocks.acting.episodes import play
    from etude.core.randomness import fold

    found: dict[str, Any] = {"env": "CartPole-v1", "steps": steps, "peer_version": version("stable-baselines3")}
    found |= {"settings": settings, "etude": [], "stable_baselines3": []}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            result = etude.run("rl/dqn", preset=preset, steps=steps, seed=seed, out=out, quiet=True, threads=1)
            log = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
            seconds = _loop_seconds(result.folder)
        points = [(row["env_steps"], row["greedy_return"]) for row in log if "greedy_return" in row]
        best, last = result.metrics["greedy_return"], result.metrics["last_greedy_return"]
        found["etude"].append({"seed": seed, "curve": points, "best": best, "last": last, "seconds": seconds})

        from stable_baselines3.common.callbacks import BaseCallback

        class Watch(BaseCallback):
            def __init__(self) -> None:
                super().__init__()
                self.points: list[tuple[int, float]] = []
                self.top, self.kept = -np.inf, None

            def _on_step(self) -> bool:
                if self.num_timesteps % every == 0:
                    here = greedy_of(self.model)
                    score = float(play("CartPole-v1", here, 20, fold(seed, self.num_timesteps)).mean())  # noqa: B023
                    self.points.append((self.num_timesteps, score))
                    if score >= self.top:
                        self.top, self.kept = score, copy.deepcopy(self.model.q_net.state_dict())
                return True

        def greedy_of(model: Any) -> Any:
            def act(state: np.ndarray) -> np.ndarray:
                with torch.no_grad():
                    return model.q_net(torch.from_numpy(state)).argmax(1).numpy()

            return act

        model, watch = _peer(settings, seed), Watch()
        start = time.perf_counter()
        model.learn(steps, callback=watch)
        seconds = time.perf_counter() - start
        last = float(play("CartPole-v1", greedy_of(model), 100, seed, "last evaluation").mean())
        model.q_net.load_state_dict(watch.kept)
        best = float(play("CartPole-v1", greedy_of(model), 100, seed, "final evaluation").mean())
        found["stable_baselines3"].append(
            {"seed": seed, "curve": watch.points, "best": best, "last": last, "seconds": seconds}
        )
        print(seed, *(f"{who} best {found[who][-1]['best']:.1f} last {found[who][-1]['last']:.1f}; "
                      for who in ("etude", "stable_baselines3")), file=sys.stderr, flush=True)  # fmt: skip
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Mean over the seeds and the range from the worst to the best of them, at the times that both were evaluated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="tight")
    titles = {"defaults": "the peer's default settings", "zoo": "RL Zoo's settings"}
    for axes, (kind, one) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        count = min(len(run["curve"]) for who in ("etude", "stable_baselines3") for run in one[who])
        for who, label in (("etude", "etude"), ("stable_baselines3", f"Stable-Baselines3 {one['peer_version']}")):
            series = [np.array(run["curve"])[:count] for run in one[who]]
            x, y = np.mean([points[:, 0] for points in series], 0), np.array([points[:, 1] for points in series])
            (line,) = axes.plot(x, y.mean(0), label=label)
            axes.fill_between(x, y.min(0), y.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
        axes.axhline(475, color="0.5", linewidth=0.8, linestyle="--")
        axes.set(xlabel="environment steps", title=f"DQN on {one['env']}, 5 seeds, {titles[kind]}")
    figure.axes[0].set_ylabel("greedy return, 20 episodes")
    figure.axes[0].legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the peer's, about its own dependencies
    if sys.argv[1:] == ["curves"]:
        curves()
    elif sys.argv[1:2] == ["learning"]:
        learning(int(sys.argv[2]))
    else:
        from race import RESULTS, report

        part = " ".join(sys.argv[1:])
        known = json.loads((RESULTS / "rl.json").read_text()) if part else []
        fresh = rows("" if part != "dqn compiled" else "compiled_") if part in ("", "dqn", "dqn compiled") else []
        if not part.startswith("dqn"):
            fresh += on_policy_rows("" if part == "on_policy" else part)
        told = {row["name"] for row in fresh}
        report("rl", [row for row in known if row["name"] not in told] + fresh)
