"""A world outside: n copies of a Gymnasium environment behind one interface that never stores a pair across a reset.

`Worlds` wraps a Gymnasium vector environment (the environment's own vectorised form where it has one, else
`SyncVectorEnv`). Gymnasium has three rules for what happens when an episode ends, and each hides a trap:

    NEXT_STEP   the step after the end is spent on the reset and its action is ignored: that row is not a transition
    SAME_STEP   the returned observation is already the next episode's first: the true last one is in `info`
    DISABLED    nothing happens; the caller resets the rows that ended

`Worlds.step` gives the same answer under all three: only real transitions, `next_state` the state truly reached, and
`terminated` (the task ended: nothing follows, V = 0) apart from `truncated` (a time limit cut it: V goes on).

Needs gymnasium ≥ 1.1 (imported when first used).
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting import physics
from etude.blocks.acting.compiled import Compiled
from etude.blocks.acting.environments import Environment, boxed, discrete, encoder, environment, is_boxed, refusal
from etude.core.randomness import fold

Engine = Literal["gymnasium", "compiled"]
"""Whose copies of an environment: Gymnasium's, or those of `etude.blocks.acting.compiled`."""


class Transition(NamedTuple):
    """What happened in M ≤ n worlds (a world that spent the step on a reset has no row)."""

    state: NDArray[Any]
    """(M, D) float32, or images (M, C, H, W) uint8"""
    action: NDArray[Any]
    """(M,) int64, counted from 0; or (M, A) float32"""
    reward: NDArray[np.float32]
    """(M,)"""
    next_state: NDArray[Any]
    """like `state`; the state truly reached, also where the episode ended"""
    terminated: NDArray[np.bool_]
    """(M,); the task is over and nothing follows"""
    truncated: NDArray[np.bool_]
    """(M,); cut from outside, as by a time limit: the value of `next_state` still counts"""
    world: NDArray[np.int64]
    """(M,); which copy each row comes from"""


class Worlds:
    """n copies of one environment, stepped together.

    `env` is a Gymnasium vector environment with Box (flattened; with `images`, bytes as they are) or Discrete (one-hot)
    observations, and with discrete actions, or, with `box`, continuous ones between bounds (None: either); `Worlds.make`
    builds one from its name. The seed of every copy is a function of (seed, purpose, rank) and nothing else. `state_dict`
    holds everything that exact continuation needs; see `load_state_dict`.
    """

    def __init__(
        self,
        env: Any,
        seed: int = 0,
        purpose: str = "training",
        rank: int = 0,
        name: str = "",
        box: bool | None = False,
        images: bool = False,
    ) -> None:
        from gymnasium.vector import AutoresetMode

        self.env, self.name, self.count = env, name or str(env), int(env.num_envs)
        self.shape, self._encode = encoder(env.single_observation_space, self.name, images)
        """Of one state: (D,), or (C, H, W) of images."""
        self.size = int(np.prod(self.shape))
        first = getattr(env, "envs", [env])[0]
        self.planes = int(getattr(getattr(first, "unwrapped", first), "planes", self.shape[0]))
        """Of an image's C planes, those of its newest screen, which come last; before them the older ones."""
        space = env.single_action_space
        self.box = is_boxed(space) if box is None else box
        """Whether actions are continuous."""
        if self.box:
            self.actions, self.low, self.high = boxed(space, self.name)
            self._shape = (self.count, *space.shape)
        else:
            self.actions, self._first_action = discrete(space, self.name)
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
    def make(
        cls,
        env: str | Environment,
        count: int = 1,
        seed: int = 0,
        purpose: str = "training",
        rank: int = 0,
        engine: Engine = "gymnasium",
        box: bool | None = False,
        images: bool = False,
    ) -> Worlds:
        """Build `count` copies of an environment (what may be named: `etude.blocks.acting.environments`).

        `engine` "compiled" takes the copies of `etude.blocks.acting.compiled`; `purpose` "training" those to learn in.
        Raises UserError for an unknown name (with the nearest one), a missing package, actions of the other kind than
        `box` says, a world that is not compiled, or observations that are structures or, without `images`, images.
        """
        import gymnasium
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        kind = environment(env)
        spec = kind.spec
        if engine == "compiled":
            vector: Any = Compiled(kind.name, count)
        elif not kind.own and spec is not None and spec.vector_entry_point is not None and not spec.additional_wrappers:
            try:
                vector = gymnasium.make_vec(spec.id, num_envs=count, vectorization_mode="vector_entry_point")
            except Exception as error:
                raise refusal(kind.name, error) from error
        else:
            make = partial(kind.make, training=purpose == "training")
            one = make()
            encoder(one.observation_space, kind.name, images)  # before n copies of something unusable are made
            (boxed if is_boxed(one.action_space) and box is not False else discrete)(one.action_space, kind.name)
            makers = [lambda: one, *(make for _ in range(count - 1))]
            vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        return cls(vector, seed, purpose, rank, name=kind.name, box=box, images=images)

    def step(self, action: NDArray[Any]) -> Transition:
        """Take `action` (n,) (counted from 0), or (n, A) within the bounds, in every world; return the real transitions.

        `self.observation` (n, *shape) is then what the next actions must be chosen from.
        """
        before, resetting = self.observation, self._resetting
        if self.box:
            action = np.clip(np.asarray(action, dtype=np.float32), self.low, self.high)
            raw, reward, terminated, truncated, info = self.env.step(action.reshape(self._shape))
        else:
            action = np.asarray(action, dtype=np.int64)
            raw, reward, terminated, truncated, info = self.env.step(action + self._first_action)
        reward = np.asarray(reward, dtype=np.float32)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        over = terminated | truncated
        after = reached = self._encode(raw)
        ended = bool(over.any())
        if ended and self._same_step:
            reached = after.copy()
            reached[over] = self._encode(np.stack([info["final_obs"][world] for world in np.flatnonzero(over)]))
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
        generator is handled here), as Atari games have them; and MuJoCo's.
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
        self.observation: NDArray[Any] = self._encode(self.env.reset(seed=seed)[0])
        """(n, *shape): where every world stands."""
        self._resetting = self._none
        self._running = np.zeros(self.count)


# ----------------------------------------------------------------------------------------------- inner state

_CLASSIC, TOY = "gymnasium.envs.classic_control", "gymnasium.envs.toy_text"
STATE: dict[str, tuple[str, ...]] = {
    # everything that `step` reads and `reset` or `step` writes, beside the random generator
    f"{_CLASSIC}.cartpole.CartPoleVectorEnv": ("state", "steps", "prev_done", "low", "high"),
    f"{_CLASSIC}.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    f"{_CLASSIC}.mountain_car.MountainCarEnv": ("state",),
    f"{_CLASSIC}.acrobot.AcrobotEnv": ("state",),
    f"{_CLASSIC}.pendulum.PendulumEnv": ("state", "last_u"),
    f"{TOY}.frozen_lake.FrozenLakeEnv": ("s", "lastaction"),
    f"{TOY}.cliffwalking.CliffWalkingEnv": ("s", "lastaction"),
    f"{TOY}.taxi.TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
}


def kind_of(env: Any) -> str:
    """module.Class of an environment."""
    return f"{type(env).__module__}.{type(env).__qualname__}"


def layers(env: Any) -> tuple[Any, Any] | None:
    """(time limit wrapper or None, the environment itself); None when a wrapper might hold state of its own."""
    from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

    from etude.blocks.acting.guard import Guard

    limit = None
    while hasattr(env, "env"):
        if type(env) is TimeLimit and limit is None:
            limit = env
        elif type(env) not in (OrderEnforcing, PassiveEnvChecker, Guard):
            return None
        env = env.env
    return limit, env


def _capture(env: Any) -> list[dict[str, Any]] | None:
    """The inner state of each copy as plain values and arrays; None when some copy's cannot be read exactly."""
    states = []
    for copy_ in getattr(env, "envs", [env]):
        found = layers(copy_)
        if found is None:
            return None
        limit, inner = found
        kind = kind_of(inner)
        if kind in STATE and all(hasattr(inner, name) for name in STATE[kind]):
            values: Any = {name: getattr(inner, name) for name in STATE[kind]}
        elif physics.simulated(inner):
            values = physics.state_of(inner)
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
    found = [layers(copy_) for copy_ in copies]
    if len(states) != len(copies) or None in found:
        return False
    env.reset()  # makes every attribute and passes the order check; all of it is overwritten below
    for state, (limit, inner) in zip(states, found):  # type: ignore[misc]
        if state["kind"] != kind_of(inner):
            return False
        values = copy.deepcopy(state["values"])
        if physics.simulated(inner):
            physics.put(inner, values)
        elif state["kind"] in STATE:
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
