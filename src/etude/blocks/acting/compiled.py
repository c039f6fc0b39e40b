"""The classic worlds of Gymnasium as batches in machine code: thousands of copies a call, transitions equal to the last bit.

    CartPole-v0, CartPole-v1, MountainCar-v0, Acrobot-v1     discrete actions
    Pendulum-v1                                              one number in [−2, 2]

`vector` makes a batch behind the interface of a Gymnasium vector environment, so `Worlds` takes it like any other. A copy
begins anew in the very step that ends its episode (SAME_STEP): no step is spent on a reset. What a copy does is what
Gymnasium's single environment does, in float64 and in the same order of operations; only the draws of the first states come
from one generator for all copies. (Gymnasium's own batch of CartPole computes in float32.)

Needs numba (imported when first used; about 2 s to compile the first time ever, then from numba's cache) and gymnasium.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.core.errors import UserError, nearest


class Kind(NamedTuple):
    """What one world is made of."""

    env_id: str
    """Registered with Gymnasium, which has the spaces and the time limit."""
    step: Callable[..., None]
    """(state, action, two) → state in place, reward, terminated: the loop that is compiled."""
    look: Callable[..., None]
    """(state) → observation: the loop that is compiled."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Where a first state is drawn from, uniformly."""
    single: bool = False
    """The first state is rounded to float32."""


# n copies, S numbers of state, D numbers observed. `two` is 2: x ** 2 in Gymnasium is a call of the C library's power, which
# is not always x · x to the last bit, and which a compiler would turn into it if it could see the 2.


def _cartpole(state, action, two, reward, terminated):
    for i in range(len(state)):
        x, x_dot, theta, theta_dot = state[i]
        force = 10.0 if action[i] == 1 else -10.0
        cosine, sine = math.cos(theta), math.sin(theta)
        temp = (force + 0.05 * (theta_dot * theta_dot) * sine) / 1.1
        turn = (9.8 * sine - cosine * temp) / (0.5 * (4.0 / 3.0 - 0.1 * (cosine * cosine) / 1.1))
        push = temp - 0.05 * turn * cosine / 1.1
        x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * push
        theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * turn
        state[i] = x, x_dot, theta, theta_dot
        widest = 12 * 2 * math.pi / 360
        terminated[i] = x < -2.4 or x > 2.4 or theta < -widest or theta > widest
        reward[i] = 1.0


def _mountain_car(state, action, two, reward, terminated):
    for i in range(len(state)):
        position, velocity = state[i]
        velocity += (action[i] - 1) * 0.001 + math.cos(3 * position) * (-0.0025)
        velocity = min(max(velocity, -0.07), 0.07)
        position = min(max(position + velocity, -1.2), 0.6)
        if position == -1.2 and velocity < 0:
            velocity = 0.0
        state[i] = position, velocity
        terminated[i] = position >= 0.5 and velocity >= 0
        reward[i] = -1.0


def _acrobot_slope(theta1, theta2, dtheta1, dtheta2, torque, two):
    """(dθ1, dθ2, ddθ1, ddθ2) of the book's equations, all masses, lengths and inertias 1, centres of mass at 0.5."""
    d1 = 0.25 + (1.0 + 0.25 + 2 * 1.0 * 0.5 * math.cos(theta2)) + 1.0 + 1.0
    d2 = (0.25 + 1.0 * 0.5 * math.cos(theta2)) + 1.0
    phi2 = 0.5 * 9.8 * math.cos(theta1 + theta2 - math.pi / 2.0)
    phi1 = (
        -1.0 * 1.0 * 0.5 * dtheta2**two * math.sin(theta2)
        - 2 * 1.0 * 1.0 * 0.5 * dtheta2 * dtheta1 * math.sin(theta2)
        + (0.5 + 1.0) * 9.8 * math.cos(theta1 - math.pi / 2)
        + phi2
    )
    ddtheta2 = (torque + d2 / d1 * phi1 - 0.5 * dtheta1**two * math.sin(theta2) - phi2) / (0.25 + 1.0 - d2**two / d1)
    ddtheta1 = -(d2 * ddtheta2 + phi1) / d1
    return dtheta1, dtheta2, ddtheta1, ddtheta2


def _acrobot(state, action, two, reward, terminated):
    for i in range(len(state)):
        s, torque = state[i], action[i] - 1.0
        k1 = _acrobot_slope(s[0], s[1], s[2], s[3], torque, two)
        half = 0.2 / 2.0
        k2 = _acrobot_slope(
            s[0] + half * k1[0], s[1] + half * k1[1], s[2] + half * k1[2], s[3] + half * k1[3], torque, two
        )
        k3 = _acrobot_slope(
            s[0] + half * k2[0], s[1] + half * k2[1], s[2] + half * k2[2], s[3] + half * k2[3], torque, two
        )
        k4 = _acrobot_slope(s[0] + 0.2 * k3[0], s[1] + 0.2 * k3[1], s[2] + 0.2 * k3[2], s[3] + 0.2 * k3[3], torque, two)
        for j in range(4):
            s[j] = s[j] + 0.2 / 6.0 * (k1[j] + 2 * k2[j] + 2 * k3[j] + k4[j])
        for j in range(2):
            while s[j] > math.pi:
                s[j] -= math.pi - -math.pi
            while s[j] < -math.pi:
                s[j] += math.pi - -math.pi
            widest = (4 + 5 * j) * math.pi
            s[2 + j] = min(max(s[2 + j], -widest), widest)
        terminated[i] = -math.cos(s[0]) - math.cos(s[1] + s[0]) > 1.0
        reward[i] = 0.0 if terminated[i] else -1.0


def _acrobot_looks(state, two, seen):
    for i in range(len(state)):
        a, b, c, d = state[i]
        seen[i] = math.cos(a), math.sin(a), math.cos(b), math.sin(b), c, d


def _pendulum(state, action, two, reward, terminated):
    for i in range(len(state)):
        angle, speed = state[i]
        torque = min(max(action[i, 0], np.float32(-2.0)), np.float32(2.0))  # float32, and what is multiplied with it
        upright = ((angle + math.pi) % (2 * math.pi)) - math.pi
        cost = upright**two + 0.1 * speed**two + np.float32(0.001) * torque ** np.float32(two)
        speed = speed + (3 * 10.0 / (2 * 1.0) * math.sin(angle) + np.float32(3.0) * torque) * 0.05
        speed = min(max(speed, -8.0), 8.0)
        state[i] = angle + speed * 0.05, speed
        terminated[i] = False
        reward[i] = -cost


def _pendulum_looks(state, two, seen):
    for i in range(len(state)):
        angle, speed = state[i]
        seen[i] = math.cos(angle), math.sin(angle), speed


def _plain(state, two, seen):
    for i in range(len(state)):
        seen[i] = state[i]


KINDS = {
    kind.env_id: kind
    for kind in (
        Kind("CartPole-v0", _cartpole, _plain, (-0.05,) * 4, (0.05,) * 4),
        Kind("CartPole-v1", _cartpole, _plain, (-0.05,) * 4, (0.05,) * 4),
        Kind("MountainCar-v0", _mountain_car, _plain, (-0.6, 0.0), (-0.4, 0.0)),
        Kind("Acrobot-v1", _acrobot, _acrobot_looks, (-0.1,) * 4, (0.1,) * 4, single=True),
        Kind("Pendulum-v1", _pendulum, _pendulum_looks, (-math.pi, -1.0), (math.pi, 1.0)),
    )
}


@functools.cache
def _built(kernel: Callable[..., None]) -> Callable[..., None]:
    from numba import njit
    from numba.extending import register_jitable

    register_jitable(_acrobot_slope)
    try:
        return njit(cache=True)(kernel)
    except RuntimeError:  # no writable place for the cache
        return njit(kernel)


class Compiled:
    """n copies of one of KINDS, stepped together; a Gymnasium vector environment in all that `Worlds` asks for.

    Raises UserError for another environment.
    """

    def __init__(self, name: str, count: int) -> None:
        import gymnasium
        from gymnasium.vector import AutoresetMode

        if name not in KINDS:
            raise UserError(
                f"--env {name} is none of the compiled worlds {', '.join(KINDS)}{nearest(name, KINDS)}; leave out --engine"
            )
        self.kind, self.num_envs = KINDS[name], count
        one = gymnasium.make(name)
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.limit = int(one.spec.max_episode_steps)  # type: ignore[union-attr]
        one.close()
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.np_random = np.random.default_rng(0)
        self.state = np.zeros((count, len(self.kind.low)))
        self.elapsed = np.zeros(count, np.int64)
        self._step, self._look = _built(self.kind.step), _built(self.kind.look)
        self._size = int(np.prod(one.observation_space.shape))  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """All copies at the beginning of an episode: observations (n, D)."""
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        self.state[:] = self._first(self.num_envs)
        self.elapsed[:] = 0
        return self._seen(self.state), {}

    def step(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of every copy: what is seen then (n, D), reward, terminated, truncated (n,).

        Where an episode ended, its last observation is in ``info["final_obs"]``, (n, D), and the next has begun.
        """
        reward, terminated = np.empty(self.num_envs), np.empty(self.num_envs, bool)
        self._step(self.state, action, 2.0, reward, terminated)
        self.elapsed += 1
        truncated = self.elapsed >= self.limit
        seen, info = self._seen(self.state), {}
        over = np.flatnonzero(terminated | truncated)
        if len(over):
            info["final_obs"] = seen
            self.state[over] = self._first(len(over))
            self.elapsed[over] = 0
            seen = seen.copy()
            seen[over] = self._seen(self.state[over])
        return seen, reward, terminated, truncated, info

    def close(self) -> None:
        """Nothing is held open."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the generator, which `Worlds` keeps."""
        return {"state": self.state, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.state[:], self.elapsed[:] = state["state"], state["elapsed"]

    def _first(self, count: int) -> NDArray[np.float64]:
        drawn = self.np_random.uniform(self.kind.low, self.kind.high, (count, len(self.kind.low)))
        return drawn.astype(np.float32).astype(np.float64) if self.kind.single else drawn

    def _seen(self, state: NDArray[np.float64]) -> NDArray[np.float32]:
        seen = np.empty((len(state), self._size), np.float32)
        self._look(state, 2.0, seen)
        return seen
