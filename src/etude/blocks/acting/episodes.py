"""Whole episodes: their returns under a policy, and pictures of one."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.environments import LONGEST, Environment, discrete, encoder, environment, is_boxed, spot
from etude.blocks.acting.worlds import Worlds
from etude.core.config import Range
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold
from etude.core.run import Run

Policy = Callable[[NDArray[Any]], NDArray[Any]]
"""states (N, D), or images (N, C, H, W), → actions (N,), or (N, A) where they are continuous"""
Copies = Annotated[int, Range(1, 10_000)]
"""How many worlds may be made at once (an evaluation takes one for each episode)."""


def play(
    env: str | Environment,
    policy: Policy,
    episodes: int,
    seed: int,
    purpose: str = "evaluation",
    limit: int | None = None,
    gamma: float = 1.0,
) -> NDArray[np.float64]:
    """Returns (episodes,) of a policy, Σ γ^t r_t, one episode in each of `episodes` worlds.

    One world an episode: taking the first `episodes` to finish in fewer worlds would favour short episodes. An
    episode is left after `limit` steps, or as `Environment.limit` says.
    """
    env = environment(env)
    worlds = Worlds.make(env, episodes, seed, purpose, box=None, images=True)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    weight = np.ones(episodes)
    for _ in range(env.limit(limit)):
        # a world that has finished is stepped on with the others, and what happens there is not counted
        row = worlds.step(policy(worlds.observation))
        counts = running[row.world]
        returns[row.world[counts]] += weight[row.world[counts]] * row.reward[counts]
        weight[row.world] *= gamma
        running[row.world[row.terminated | row.truncated]] = False
        if not running.any():
            break
    worlds.close()
    return returns


def film(
    env: str | Environment,
    policy: Policy,
    seed: int,
    purpose: str = "film",
    limit: int | None = None,
    frames: int = 120,
    width: int = 300,
) -> tuple[list[Any], float, str]:
    """Play one episode and return (pictures, return, reason): at most `frames` PIL images `width` pixels wide.

    Pictures are evenly spaced over the episode (its first 1000 steps). Where the environment cannot be drawn (no
    ``rgb_array`` mode, no pygame) the list is empty, the return nan, and the reason says why; nothing is raised.
    """
    env = environment(env)
    try:
        if "rgb_array" not in env.make().metadata.get("render_modes", ()):
            return [], float("nan"), f"{env.name} cannot be drawn here (it has no rgb_array mode)"
        with warnings.catch_warnings(), _no_window():
            # pygame imports pkg_resources, which announces its own retirement; nothing of ours is concerned
            warnings.filterwarnings("ignore", message=r"pkg_resources is deprecated|.*declare_namespace")
            warnings.filterwarnings("ignore", module="glfw")  # MuJoCo tries a screen first, then goes without
            shots, total = _filmed(env, policy, fold(seed, 0, 0, purpose), min(env.limit(limit), LONGEST), width)
    except Exception as error:
        known = isinstance(error, (UserError, RunError))
        return [], float("nan"), f"{env.name} cannot be drawn here ({error if known else spot(error)})"
    keep = np.unique(np.linspace(0, len(shots) - 1, min(frames, len(shots))).round().astype(int))
    return [shots[i] for i in keep], total, ""


def show(run: Run, env: Environment, policy: Policy, limit: int | None = None) -> None:
    """Leave a film of one episode in the run's folder, or the reason why there is none."""
    pictures, total, reason = film(env, policy, run.seed, limit=limit)
    if pictures:
        run.artifact("episode", pictures, caption=f"One greedy episode of {env.name}: return {total:g}")
    else:
        run.artifact("episode", reason)


def _filmed(env: Environment, policy: Policy, seed: int, steps: int, width: int) -> tuple[list[Any], float]:
    """A picture of every step of one episode, and its return."""
    from PIL import Image

    world = env.make(render_mode="rgb_array")
    _, encode = encoder(world.observation_space, env.name)
    space = world.action_space
    first = 0 if is_boxed(space) else discrete(space, env.name)[1]

    def meant(action: NDArray[Any]) -> Any:
        return action.reshape(space.shape).clip(space.low, space.high) if is_boxed(space) else int(action) + first

    def shot() -> Any:
        pixels = world.render()
        return Image.fromarray(pixels).resize((width, max(1, round(pixels.shape[0] * width / pixels.shape[1]))))

    raw, _ = world.reset(seed=seed)
    shots, total = [shot()], 0.0
    for _ in range(steps):
        raw, reward, terminated, truncated, _ = world.step(meant(policy(encode(np.asarray(raw)[None]))[0]))
        total += float(reward)
        shots.append(shot())
        if terminated or truncated:
            break
    world.close()
    return shots, total


@contextlib.contextmanager
def _no_window() -> Iterator[None]:
    """Pictures need no screen: without one SDL is told so, or it complains and may refuse."""
    screen = any(os.environ.get(name) for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"))
    if screen or sys.platform != "linux":
        yield
        return
    before = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    try:
        yield
    finally:
        os.environ.pop("SDL_VIDEODRIVER")
        if before is not None:
            os.environ["SDL_VIDEODRIVER"] = before
