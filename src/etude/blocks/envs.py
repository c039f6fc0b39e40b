"""A world outside: n copies of a Gymnasium environment behind one interface that never stores a pair across a reset.

`Worlds` wraps a Gymnasium vector environment (the environment's own vectorised form where it has one, else
`SyncVectorEnv`). Gymnasium has three rules for what happens when an episode ends, and each hides a trap:

    NEXT_STEP   the step after the end is spent on the reset and its action is ignored: that row is not a transition
    SAME_STEP   the returned observation is already the next episode's first: the true last one is in `info`
    DISABLED    nothing happens; the caller resets the rows that ended

`Worlds.step` gives the same answer under all three: only real transitions, `next_state` the state truly reached, and
`terminated` (the task ended: nothing follows, V = 0) apart from `truncated` (a time limit cut it: V goes on).

`tables` reads the transition table of Gymnasium's toy-text worlds, where exact answers can be computed.
Needs gymnasium ≥ 1.1 (imported when first used).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.core.errors import UserError, nearest
from etude.core.randomness import fold

Policy = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""states (N, D) → actions (N,)"""


class Transition(NamedTuple):
    """What happened in M ≤ n worlds (a world that spent the step on a reset has no row)."""

    state: NDArray[np.float32]
    """(M, D)"""
    action: NDArray[np.int64]
    """(M,), counted from 0"""
    reward: NDArray[np.float32]
    """(M,)"""
    next_state: NDArray[np.float32]
    """(M, D); the state truly reached, also where the episode ended"""
    terminated: NDArray[np.bool_]
    """(M,); the task is over and nothing follows"""
    truncated: NDArray[np.bool_]
    """(M,); cut from outside, as by a time limit: the value of `next_state` still counts"""
    world: NDArray[np.int64]
    """(M,); which copy each row comes from"""


class Worlds:
    """n copies of one environment, stepped together.

    `env` is a Gymnasium vector environment with discrete actions and Box (flattened) or Discrete (one-hot)
    observations; `Worlds.make` builds one from its name. The seed of every copy is a function of (seed, purpose, rank)
    and nothing else. `state_dict` holds everything that exact continuation needs; see `load_state_dict`.
    """

    def __init__(self, env: Any, seed: int = 0, purpose: str = "training", rank: int = 0, name: str = "") -> None:
        from gymnasium.vector import AutoresetMode

        self.env, self.name, self.count = env, name or str(env), int(env.num_envs)
        self.size, self._encode = _encoder(env.single_observation_space, self.name)
        self.actions, self._first_action = _discrete(env.single_action_space, self.name)
        mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._next_step, self._same_step = mode is AutoresetMode.NEXT_STEP, mode is AutoresetMode.SAME_STEP
        self._seed, self._purpose, self._rank = seed, purpose, rank
        self.steps = 0
        """Real transitions so far, over all copies."""
        self.episodes = 0
        """Finished episodes so far."""
        self.note = ""
        """One sentence when a resumed run had to restart its worlds, else empty."""
        self._finished: list[float] = []
        self._every, self._none = np.arange(self.count), np.zeros(self.count, dtype=bool)
        self._restart(0)

    @classmethod
    def make(cls, env: str, count: int = 1, seed: int = 0, purpose: str = "training", rank: int = 0) -> Worlds:
        """Build `count` copies of the registered environment `env` (``CartPole-v1`` or ``module:Name-v0``).

        Raises UserError for an unknown name (with the nearest one), a missing package, continuous actions, or
        observations that are images or structures.
        """
        import gymnasium
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        spec = _spec(env)
        if spec.vector_entry_point is not None and not spec.additional_wrappers:
            with _kind_errors(env):
                vector = gymnasium.make_vec(env, num_envs=count, vectorization_mode="vector_entry_point")
        else:
            one = single(env)
            _encoder(one.observation_space, env)  # before n copies of something unusable are made
            _discrete(one.action_space, env)
            makers = [lambda: one, *(lambda: single(env) for _ in range(count - 1))]
            vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        return cls(vector, seed, purpose, rank, name=env)

    def step(self, action: NDArray[np.int64]) -> Transition:
        """Take `action` (n,) (counted from 0) in every world and return the real transitions.

        `self.observation` (n, D) is then what the next actions must be chosen from.
        """
        action = np.asarray(action, dtype=np.int64)
        before, resetting = self.observation, self._resetting
        raw, reward, terminated, truncated, info = self.env.step(action + self._first_action)
        reward = np.asarray(reward, dtype=np.float32)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        over = terminated | truncated
        after = reached = self._encode(raw)
        ended = bool(over.any())
        if ended and self._same_step:
            reached = after.copy()
            for world in np.flatnonzero(over):
                reached[world] = self._encode(np.asarray(info["final_obs"][world])[None])[0]
        elif ended and not self._next_step:
            after = self._encode(self.env.reset(options={"reset_mask": over})[0])
        skipped = bool(resetting.any())
        self.observation, self._resetting = after, over if self._next_step else self._none
        self._running += np.where(resetting, 0.0, reward) if skipped else reward
        if ended:
            self._finished += self._running[over].tolist()
            self.episodes += int(over.sum())
            self._running[over] = 0.0
        transition = Transition(before, action, reward, reached, terminated, truncated, self._every)
        if skipped:
            real = ~resetting
            transition = Transition._make(column[real] for column in transition)
        self.steps += len(transition.reward)
        return transition

    def drain(self) -> list[float]:
        """Undiscounted returns of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters, running returns, and the inner state of every copy (None where it cannot be read exactly)."""
        return {
            "rank": self._rank,
            "steps": self.steps,
            "episodes": self.episodes,
            "finished": list(self._finished),
            "running": self._running.copy(),
            "observation": self.observation.copy(),
            "resetting": self._resetting.copy(),
            "inner": _capture(self.env),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        An environment whose inner state cannot be read or written exactly is restarted instead: its unfinished
        episodes are dropped, new ones start from a seed that is a function of (seed, purpose, rank, steps so far),
        and `note` says so. So is the state of another rank. Gymnasium's classic-control and toy-text worlds continue
        exactly; so does any environment whose unwrapped object has `state_dict` and `load_state_dict` (its random
        generator is handled here).
        """
        self.steps, self.episodes, self._finished = state["steps"], state["episodes"], list(state["finished"])
        mine = state["rank"] == self._rank  # other ranks must not live through rank 0's episodes again
        if mine and state["inner"] is not None and _restore(self.env, state["inner"], state["resetting"]):
            self.observation, self._resetting = state["observation"].copy(), state["resetting"].copy()
            self._running = state["running"].copy()
            self.note = ""
        else:
            self._restart(self.steps)
            self.note = (
                f"{self.name} cannot be restored exactly, so its {self.count} worlds were restarted "
                f"at environment step {self.steps:,}; unfinished episodes were dropped."
            )

    def _restart(self, at: int) -> None:
        if hasattr(self.env, "envs"):  # one seed for each copy
            seed: Any = [fold(self._seed, at, self._rank, f"{self._purpose}/{i}") for i in range(self.count)]
        else:
            seed = fold(self._seed, at, self._rank, self._purpose)
        self.observation: NDArray[np.float32] = self._encode(self.env.reset(seed=seed)[0])
        """(n, D): where every world stands."""
        self._resetting = self._none
        self._running = np.zeros(self.count)


# ------------------------------------------------------------------------------------------- one environment


def single(env: str, **options: Any) -> Any:
    """`gymnasium.make` with UserError in place of its exceptions."""
    import gymnasium

    _spec(env)
    with _kind_errors(env):
        return gymnasium.make(env, disable_env_checker=True, **options)


def time_limit(env: str, otherwise: int) -> int:
    """The registered number of steps after which an episode is truncated, or `otherwise` where there is none."""
    limit = _spec(env).max_episode_steps
    return otherwise if limit is None else int(limit)


def play(env: str, policy: Policy, episodes: int, seed: int, purpose: str = "evaluation", limit: int = 1000) -> NDArray:
    """Undiscounted returns (episodes,) of a policy, one episode in each of `episodes` worlds.

    One world an episode: taking the first `episodes` to finish in fewer worlds would favour short episodes. Where the
    environment has no time limit of its own an episode is left after `limit` steps.
    """
    worlds = Worlds.make(env, episodes, seed, purpose)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    for _ in range(time_limit(env, limit)):
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
    env: str, policy: Policy, seed: int, purpose: str = "film", limit: int = 1000, frames: int = 120, width: int = 300
) -> tuple[list[Any], float, str]:
    """Play one episode and return (pictures, return, reason): at most `frames` PIL images `width` pixels wide.

    Pictures are evenly spaced over the episode. Where the environment cannot be drawn (no ``rgb_array`` mode, no
    pygame) the list is empty, the return nan, and the reason says why; nothing is raised.
    """
    import gymnasium
    from PIL import Image

    if "rgb_array" not in single(env).metadata.get("render_modes", ()):
        return [], float("nan"), f"{env} cannot be drawn here (it has no rgb_array mode)"
    try:
        with warnings.catch_warnings(), _no_window():
            # pygame imports pkg_resources, which announces its own retirement; nothing of ours is concerned
            warnings.filterwarnings("ignore", message=r"pkg_resources is deprecated|.*declare_namespace")
            world = single(env, render_mode="rgb_array")
            raw, _ = world.reset(seed=fold(seed, 0, 0, purpose))
            shots = [world.render()]
    except (gymnasium.error.Error, ImportError, TypeError, RuntimeError, UserError) as error:
        return [], float("nan"), f"{env} cannot be drawn here ({str(error).splitlines()[0]})"
    _, encode = _encoder(world.observation_space, env)
    _, first = _discrete(world.action_space, env)
    total = 0.0
    for _ in range(time_limit(env, limit)):
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


# ---------------------------------------------------------------------------------------------------- spaces


def _spec(env: str) -> Any:
    """The registered specification; UserError names the nearest one otherwise."""
    import gymnasium

    module, _, name = env.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--env {env}: the module '{module}' cannot be imported ({error})") from error
    if name not in gymnasium.registry:
        raise UserError(f"--env {env} is not a registered Gymnasium environment{nearest(name, gymnasium.registry)}")
    return gymnasium.registry[name]


class _kind_errors:
    """Context that turns the exceptions of `gymnasium.make` into one sentence each."""

    def __init__(self, env: str) -> None:
        self.env = env

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import gymnasium

        if isinstance(error, UserError) or error is None:
            return
        if isinstance(error, (gymnasium.error.DependencyNotInstalled, ImportError)):
            raise UserError(f"--env {self.env} needs a package that is not installed ({error})") from error
        if isinstance(error, gymnasium.error.Error):
            raise UserError(f"--env {self.env} cannot be made: {error}") from error


def _discrete(space: Any, name: str) -> tuple[int, int]:
    """(number of actions, first action) of a Discrete space."""
    from gymnasium.spaces import Discrete

    if not isinstance(space, Discrete):
        raise UserError(
            f"--env {name} has the action space {space}; this method needs discrete actions, as in CartPole-v1 or "
            "LunarLander-v3"
        )
    return int(space.n), int(space.start)


def _encoder(space: Any, name: str) -> tuple[int, Callable[[Any], NDArray[np.float32]]]:
    """(D, function from raw observations (N, …) to fresh float32 (N, D)) of a Box or Discrete space."""
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete):
        rows, first = np.eye(int(space.n), dtype=np.float32), int(space.start)
        return int(space.n), lambda raw: rows[np.asarray(raw, dtype=np.int64) - first]
    if not isinstance(space, Box):
        raise UserError(f"--env {name} has the observation space {space}; Box and Discrete observations are supported")
    if len(space.shape) >= 2 and space.dtype == np.uint8:
        raise UserError(f"--env {name} observes images {space.shape}; image observations are not supported here")
    size = int(np.prod(space.shape))
    return size, lambda raw: np.array(raw, dtype=np.float32).reshape(-1, size)


# ----------------------------------------------------------------------------------------------- inner state

_CLASSIC, _TOY = "gymnasium.envs.classic_control", "gymnasium.envs.toy_text"
_STATE: dict[str, tuple[str, ...]] = {
    # everything that `step` reads and `reset` or `step` writes, beside the random generator
    f"{_CLASSIC}.cartpole.CartPoleVectorEnv": ("state", "steps", "prev_done", "low", "high"),
    f"{_CLASSIC}.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    f"{_CLASSIC}.mountain_car.MountainCarEnv": ("state",),
    f"{_CLASSIC}.acrobot.AcrobotEnv": ("state",),
    f"{_TOY}.frozen_lake.FrozenLakeEnv": ("s", "lastaction"),
    f"{_TOY}.cliffwalking.CliffWalkingEnv": ("s", "lastaction"),
    f"{_TOY}.taxi.TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
}


def _layers(env: Any) -> tuple[Any, Any] | None:
    """(time limit wrapper or None, the environment itself); None when a wrapper might hold state of its own."""
    from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

    limit = None
    while hasattr(env, "env"):
        if type(env) is TimeLimit and limit is None:
            limit = env
        elif type(env) not in (OrderEnforcing, PassiveEnvChecker):
            return None
        env = env.env
    return limit, env


def _capture(env: Any) -> list[dict[str, Any]] | None:
    """The inner state of each copy as plain values and arrays; None when some copy's cannot be read exactly."""
    states = []
    for copy_ in getattr(env, "envs", [env]):
        layers = _layers(copy_)
        if layers is None:
            return None
        limit, inner = layers
        kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
        if kind in _STATE and all(hasattr(inner, name) for name in _STATE[kind]):
            values: Any = {name: getattr(inner, name) for name in _STATE[kind]}
        elif hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict"):
            values = inner.state_dict()
        else:
            return None
        states.append(
            {
                "kind": kind,
                "values": copy.deepcopy(values),
                "random": copy.deepcopy(inner.np_random.bit_generator.state),
                "elapsed": getattr(limit, "_elapsed_steps", None),
            }
        )
    return states


def _restore(env: Any, states: list[dict[str, Any]], resetting: NDArray[np.bool_]) -> bool:
    """Write what `_capture` read; False when these copies are of another kind or number."""
    copies = getattr(env, "envs", [env])
    layers = [_layers(copy_) for copy_ in copies]
    if len(states) != len(copies) or None in layers:
        return False
    env.reset()  # makes every attribute and passes the order check; all of it is overwritten below
    for state, (limit, inner) in zip(states, layers):  # type: ignore[misc]
        if state["kind"] != f"{type(inner).__module__}.{type(inner).__qualname__}":
            return False
        values = copy.deepcopy(state["values"])
        if state["kind"] in _STATE:
            for name, value in values.items():
                setattr(inner, name, value)
        else:
            inner.load_state_dict(values)
        inner.np_random.bit_generator.state = state["random"]
        if limit is not None:
            limit._elapsed_steps = state["elapsed"]
    if hasattr(env, "_autoreset_envs"):
        env._autoreset_envs = resetting.copy()
    return True


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Tables:
    """A finite world written out: S states, A actions, O outcomes of each."""

    next_state: NDArray[np.int64]
    """(S, A, O)"""
    reward: NDArray[np.float64]
    """(S, A, O)"""
    terminated: NDArray[np.bool_]
    """(S, A, O)"""
    probability: NDArray[np.float64]
    """(S, A, O); sums to 1 over O, 0 for outcomes that do not exist"""
    start: NDArray[np.float64]
    """(S,); distribution of the first state"""

    @property
    def cumulative(self) -> NDArray[np.float64]:
        """(S, A, O): outcome o is drawn by a uniform u when it is the first with cumulative > u."""
        return _staircase(self.probability)

    @property
    def cumulative_start(self) -> NDArray[np.float64]:
        """(S,): the same for the first state."""
        return _staircase(self.start)


def tables(env: str) -> Tables | None:
    """The exact dynamics of a toy-text world (FrozenLake, CliffWalking, Taxi); None for any other environment.

    Also None where a registered wrapper stands round the world: what it changes is not in the world's table.
    """
    outer = single(env)
    inner = outer.unwrapped
    if _spec(env).additional_wrappers or _layers(outer) is None:
        return None
    kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
    if not kind.startswith(_TOY) or kind not in _STATE or getattr(inner, "fickle_passenger", False):
        return None
    states, actions = int(inner.observation_space.n), int(inner.action_space.n)
    outcomes = max(len(inner.P[s][a]) for s in range(states) for a in range(actions))
    shape = (states, actions, outcomes)
    table = Tables(
        np.zeros(shape, np.int64), np.zeros(shape), np.ones(shape, bool), np.zeros(shape), inner.initial_state_distrib
    )
    for s in range(states):
        for a in range(actions):
            for o, (probability, next_state, reward, terminated) in enumerate(inner.P[s][a]):
                table.probability[s, a, o], table.next_state[s, a, o] = probability, next_state
                table.reward[s, a, o], table.terminated[s, a, o] = reward, terminated
    return table


def optimal_q(world: Tables, gamma: float, tolerance: float = 1e-12) -> NDArray[np.float64]:
    """Q* (S, A) by value iteration, Q(s, a) = E[r + γ (1 − terminated) max Q(s', ·)], to `tolerance` in the sup norm.

    Raises ValueError unless 0 ≤ γ < 1 (the contraction that makes it end).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"value iteration needs 0 <= gamma < 1, got {gamma}")
    q = np.zeros(world.probability.shape[:2])
    while True:
        target = world.reward + gamma * ~world.terminated * q.max(1)[world.next_state]
        better = (world.probability * target).sum(2)
        if np.abs(better - q).max() <= tolerance * (1 - gamma):
            return better
        q = better


def expected_return(world: Tables, policy: NDArray[np.int64], steps: int) -> float:
    """Exact mean undiscounted return of a deterministic policy (S,) over episodes of at most `steps` steps."""
    here = np.arange(len(policy))
    probability, terminated = world.probability[here, policy], world.terminated[here, policy]  # (S, O)
    gain = (probability * world.reward[here, policy]).sum(1)
    flow = np.zeros((len(here), len(here)))
    np.add.at(flow, (here[:, None], world.next_state[here, policy]), probability * ~terminated)
    occupied, total = world.start.copy(), 0.0
    for _ in range(steps):
        total += float(occupied @ gain)
        occupied = occupied @ flow
    return total


def _staircase(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    rising = np.cumsum(probability, -1)
    # rounding must not leave a gap above the last real outcome
    last = probability.shape[-1] - 1 - np.argmax(probability[..., ::-1] > 0, -1)
    return np.where(np.arange(probability.shape[-1]) >= last[..., None], 2.0, rising)
