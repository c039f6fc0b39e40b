"""Finite worlds written out: the transition tables of Gymnasium's toy-text worlds, and exact answers from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.worlds import STATE, TOY, kind_of, layers
from etude.core.errors import UserError


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


def tables(env: str | Environment, declared: bool = False) -> Tables | None:
    """The exact dynamics of a toy-text world (FrozenLake, CliffWalking, Taxi); None for any other environment.

    Also None where a registered wrapper stands round the world: what it changes is not in the world's table. `declared`
    takes the word of an environment of the user's own that has discrete states and actions and P as those worlds have it:
    P[s][a] a list of (probability, next state, reward, terminated), with `initial_state_distrib` (S,) or, without it,
    an equal chance for every state to be the first. Raises UserError where such a P is not one.
    """
    env = environment(env)
    outer = env.make()
    inner = outer.unwrapped
    if (env.spec and env.spec.additional_wrappers) or layers(outer) is None:
        return None
    kind = kind_of(inner)
    if not kind.startswith(TOY) or kind not in STATE or getattr(inner, "fickle_passenger", False):
        spaces = (inner.observation_space, inner.action_space)
        if not (declared and hasattr(inner, "P") and all(hasattr(space, "n") for space in spaces)):
            return None
        return _checked(inner, env.name)
    return _written(inner, inner.initial_state_distrib)


def _written(inner: Any, start: NDArray[np.float64]) -> Tables:
    """P of an environment as arrays."""
    states, actions = int(inner.observation_space.n), int(inner.action_space.n)
    outcomes = max(len(inner.P[s][a]) for s in range(states) for a in range(actions))
    shape = (states, actions, outcomes)
    table = Tables(np.zeros(shape, np.int64), np.zeros(shape), np.ones(shape, bool), np.zeros(shape), start)
    for s in range(states):
        for a in range(actions):
            for o, (probability, next_state, reward, terminated) in enumerate(inner.P[s][a]):
                table.probability[s, a, o], table.next_state[s, a, o] = probability, next_state
                table.reward[s, a, o], table.terminated[s, a, o] = reward, terminated
    return table


def _checked(inner: Any, name: str) -> Tables:
    """The same of an environment whose P nobody has looked at; raises UserError with the first place that is wrong."""
    states = int(inner.observation_space.n)
    try:
        start = np.asarray(getattr(inner, "initial_state_distrib", np.full(states, 1 / states)), dtype=np.float64)
        table = _written(inner, start)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"--env {name} has a P that cannot be read ({type(error).__name__}: {error}); P[s][a] must be a list of "
            "(probability, next state, reward, terminated) for every state and action"
        ) from error
    odd = np.argwhere(~(table.probability >= 0))  # NaN, too
    if len(odd):
        s, a, o = map(int, odd[0])
        raise UserError(
            f"--env {name}: P[{s}][{a}] has the probability {table.probability[s, a, o]:g}; it must be 0 or more"
        )
    sums = table.probability.sum(2)
    wrong = np.argwhere(~(np.abs(sums - 1) <= 1e-9))
    if len(wrong):
        s, a = map(int, wrong[0])
        raise UserError(f"--env {name}: the probabilities in P[{s}][{a}] must sum to 1, and sum to {sums[s, a]:g}")
    lost = np.argwhere((table.next_state < 0) | (table.next_state >= states) | ~(np.abs(table.reward) <= 1e30))
    if len(lost):
        s, a, o = map(int, lost[0])
        raise UserError(
            f"--env {name}: outcome {o} of P[{s}][{a}] leads to state {table.next_state[s, a, o]} of {states} for a reward "
            f"of {table.reward[s, a, o]:g}"
        )
    if start.shape != (states,) or not abs(start.sum() - 1) < 1e-9 or (start < 0).any():
        raise UserError(f"--env {name}: initial_state_distrib must be {states} probabilities that sum to 1")
    return table


def optimal_q(world: Tables, gamma: float, tolerance: float = 1e-12, sweeps: int = 20_000) -> NDArray[np.float64]:
    """Q* (S, A) by value iteration, Q(s, a) = E[r + γ (1 − terminated) max Q(s', ·)], to `tolerance` in the sup norm.

    It starts from the values of the best policy that policy iteration finds, so that it ends soon for γ near 1 too;
    there, where `tolerance` is below what float64 can tell, it ends after `sweeps`. Raises ValueError unless 0 ≤ γ < 1.
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"value iteration needs 0 <= gamma < 1, got {gamma}")

    def better(value: NDArray[np.float64]) -> NDArray[np.float64]:
        target = world.reward + gamma * ~world.terminated * value[world.next_state]
        return (world.probability * target).sum(2)

    here = np.arange(len(world.start))
    q = better(np.zeros(len(here)))
    for _ in range(100):
        policy = q.argmax(1)
        flow = np.eye(len(here))
        leads = gamma * world.probability[here, policy] * ~world.terminated[here, policy]
        np.add.at(flow, (here[:, None], world.next_state[here, policy]), -leads)
        gain = (world.probability[here, policy] * world.reward[here, policy]).sum(1)
        try:
            q = better(np.linalg.solve(flow, gain))
        except np.linalg.LinAlgError:  # γ is 1 to all digits, and this policy never ends
            break
        if (q.argmax(1) == policy).all():
            break
    for _ in range(sweeps):
        before, q = q, better(q.max(1))
        if np.abs(q - before).max() <= tolerance * (1 - gamma):
            break
    return q


def expected_return(world: Tables, policy: NDArray[np.int64], steps: int) -> float:
    """Exact mean undiscounted return of a deterministic policy (S,) over episodes of at most `steps` steps."""
    here = np.arange(len(policy))
    probability, terminated = world.probability[here, policy], world.terminated[here, policy]  # (S, O)
    gain = (probability * world.reward[here, policy]).sum(1)
    flow = np.zeros((len(here), len(here)))
    np.add.at(flow, (here[:, None], world.next_state[here, policy]), probability * ~terminated)
    occupied, total = world.start.copy(), 0.0
    for step in range(steps):
        total += float(occupied @ gain)
        before, occupied = occupied, occupied @ flow
        if (before == occupied).all():  # all is over, or stands still for ever
            return total + (steps - step - 1) * float(occupied @ gain)
    return total


def _staircase(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    rising = np.cumsum(probability, -1)
    # rounding must not leave a gap above the last real outcome
    last = probability.shape[-1] - 1 - np.argmax(probability[..., ::-1] > 0, -1)
    return np.where(np.arange(probability.shape[-1]) >= last[..., None], 2.0, rising)
