"""Whole episodes: their returns under a policy, and pictures of one."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.environments import Environment, discrete, encoder, environment
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError
from etude.core.randomness import fold

Policy = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""states (N, D) → actions (N,)"""


def play(
    env: str | Environment,
    policy: Policy,
    episodes: int,
    seed: int,
    purpose: str = "evaluation",
    limit: int = 1000,
) -> NDArray[np.float64]:
    """Undiscounted returns (episodes,) of a policy, one episode in each of `episodes` worlds.

    One world an episode: taking the first `episodes` to finish in fewer worlds would favour short episodes. Where the
    environment has no time limit of its own an episode is left after `limit` steps.
    """
    env = environment(env)
    worlds = Worlds.make(env, episodes, seed, purpose)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    for _ in range(env.limit(limit)):
        # a world that has finished is stepped on with the others, and what happens there is not counted
        row = worlds.step(policy(worlds.observation))
        counts = running[row.world]
        returns[row.world[counts]] += row.reward[counts]
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
    limit: int = 1000,
    frames: int = 120,
    width: int = 300,
) -> tuple[list[Any], float, str]:
    """Play one episode and return (pictures, return, reason): at most `frames` PIL images `width` pixels wide.

    Pictures are evenly spaced over the episode. Where the environment cannot be drawn (no ``rgb_array`` mode, no
    pygame) the list is empty, the return nan, and the reason says why; nothing is raised.
    """
    import gymnasium
    from PIL import Image

    env = environment(env)
    if "rgb_array" not in env.make().metadata.get("render_modes", ()):
        return [], float("nan"), f"{env.name} cannot be drawn here (it has no rgb_array mode)"
    try:
        with warnings.catch_warnings(), _no_window():
            # pygame imports pkg_resources, which announces its own retirement; nothing of ours is concerned
            warnings.filterwarnings("ignore", message=r"pkg_resources is deprecated|.*declare_namespace")
            world = env.make(render_mode="rgb_array")
            raw, _ = world.reset(seed=fold(seed, 0, 0, purpose))
            shots = [world.render()]
    except (gymnasium.error.Error, ImportError, TypeError, RuntimeError, UserError) as error:
        return [], float("nan"), f"{env.name} cannot be drawn here ({str(error).splitlines()[0]})"
    _, encode = encoder(world.observation_space, env.name)
    _, first = discrete(world.action_space, env.name)
    total = 0.0
    for _ in range(env.limit(limit)):
        raw, reward, terminated, truncated, _ = world.step(int(policy(encode(np.asarray(raw)[None]))[0]) + first)
        total += float(reward)
        shots.append(world.render())
        if terminated or truncated:
            break
    world.close()
    keep = np.unique(np.linspace(0, len(shots) - 1, min(frames, len(shots))).round().astype(int))
    height = max(1, round(shots[0].shape[0] * width / shots[0].shape[1]))
    return [Image.fromarray(shots[i]).resize((width, height)) for i in keep], total, ""


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
