"""Dynamic programming: policy and value iteration in a world that is known

Paper: Bellman, Dynamic Programming, 1957; Howard, Dynamic Programming and Markov Processes, 1960; for m sweeps Puterman &
    Shin, Modified Policy Iteration Algorithms for Discounted Markov Decision Problems, Management Science 24, 1978.

Equation: Q(s, a) = E[r + γ (1 − terminated) V(s')]

    policy iteration: V = (I − γ P_π)⁻¹ r_π,  π(s) = argmax_a Q(s, a)
    value iteration: V ← max_a Q(·, a), a contraction: ‖V_{k+1} − V^∗‖_∞ ≤ γ ‖V_k − V^∗‖_∞

Algorithm: (notes, Algorithms 13 to 15)
    1. V = 0, π(s) = 0 for every state
    2. repeat
    3.     policy iteration: evaluate π, V ← V^π by linear equations, or by m sweeps of V(s) ← Q(s, π(s))
    4.     Q(s, a) = E[r + γ (1 − terminated) V(s')] for every state and action
    5.     π(s) ← argmax_a Q(s, a), and stays what it is where that is as good
    6.     value iteration: V(s) ← max_a Q(s, a)
    7. until π stays the same and (but after linear equations) no V(s) has changed by more than the tolerance

Differences:
- E91 (notes 7.5.2): Algorithm 14 sweeps over the states once and then improves. That is not policy iteration, which wants the
  value of the policy: it is modified policy iteration, here `--evaluation-sweeps 1`, and as one sweep after an improvement is
  value iteration but for its first round. It must not end when the policy rests either: on FrozenLake it rests after one
  round, when no value has moved. The old action stays where several are equally good, or two of them could alternate for ever.
- E93 (7.5): the notes' targets lack the terminal mask; behind a termination nothing is worth anything.
- Time limits are not part of these worlds: γ < 1 makes V finite. What an episode of limited length brings is
  computed beside it (`greedy_return`).
- The method is deterministic; a seed only chooses the episode that is filmed.

Expect: one core, milliseconds. FrozenLake 4×4, γ = 0.99: 7 rounds of policy iteration, V*(start) = 0.5420259, success within
    100 steps 0.7402; value iteration ends at the same after 704 sweeps. CliffWalking −13; Taxi 7.93 a ride.
Command: `etude run rl/dynamic_programming --env FrozenLake8x8-v1`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, show
from etude.blocks.acting.memory import afford
from etude.blocks.acting.tables import Tables, expected_return, tables
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Fraction, Positive, Range, Whole
from etude.core.errors import UserError
from etude.core.loaded import Loaded
from etude.core.run import Run
from etude.core.spec import Spec
from etude.rl.parts.films import films
from etude.rl.parts.maps import grid, value_map

Thousands = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True)
class Config:
    env: str = "FrozenLake-v1"
    """A world with tables of its probabilities: FrozenLake, CliffWalking or Taxi by a name registered with Gymnasium, or an
    environment of your own (``file.py:Name``, which is run; in Python an object) with discrete states and actions and P, where
    P[s][a] is a list of (probability, next state, reward, terminated)."""
    algorithm: Literal["policy_iteration", "value_iteration"] = "policy_iteration"
    """Which of the two."""
    evaluation_sweeps: Annotated[int, Range(0, 100_000)] = 0
    """m: sweeps that evaluate the policy in a round of policy iteration; 0 solves the linear equations."""
    gamma: Fraction = 0.99
    """Discount γ."""
    tolerance: Positive = 1e-12
    """Largest change of a value in the last round, where values only approach their limit."""
    iterations: Thousands = 100_000
    """Iterations after which it ends in any case."""
    max_episode_steps: Thousands = 1000
    """Steps of the episodes whose return is reported, if the environment has no shorter time limit of its own."""


PRESETS = {
    "tiny": Config(),
    "default": Config(),
    "lake": Config(env="FrozenLake8x8-v1", algorithm="value_iteration"),
    "cliff": Config(env="CliffWalking-v1"),
    "taxi": Config(env="Taxi-v4"),
}

SETTINGS = {
    "env": "CliffWalking-v1",
    "tolerance": {"algorithm": "value_iteration", "tolerance": 1e-3},
    "iterations": 2,
    "max_episode_steps": 20,
}

METRICS = {
    "start_value": "discounted value V of the state in which episodes begin (its mean, where several may be the first)",
    "greedy_return": "exact mean undiscounted return of the last policy within the time limit",
    "bellman_error": "largest |max Q(s, ·) − V(s)|; below (1 − γ) ε, V is within ε of V*",
    "iterations": "iterations until the policy rested and the values had come to their limit",
    "sweeps": "backups of all states, those of evaluations included; linear equations count as none",
}

UNMASKED = Control("no terminal mask (E93)", swap={"operator": "etude.rl.parts.nulls.unmasked_operator"})
RESTED = Control(
    "ends when the policy rests (E91)", flags={"evaluation_sweeps": 1}, swap={"settled": "etude.rl.parts.nulls.rested"}
)

EXPERIMENTS = (
    Experiment(
        "policy_iteration", preset="default", metric="start_value", bar=0.5420259, better="near", tolerance=1e-7, seeds=(0,),
        notes="nothing is drawn",
        controls=(RESTED, Control("one round", {"iterations": 1}), Control("another discount", {"gamma": 0.98})),
    ),
    Experiment(
        "modified_policy_iteration", preset="default", flags={"evaluation_sweeps": 5}, metric="start_value", bar=0.5420259,
        better="near", tolerance=1e-7, seeds=(0,), notes="nothing is drawn",
        controls=(Control("ends at a change of 0.001", {"tolerance": 1e-3}),),
    ),
    Experiment(
        "value_iteration", preset="default", flags={"algorithm": "value_iteration"}, metric="start_value", bar=0.5420259,
        better="near", tolerance=1e-7, seeds=(0,), notes="nothing is drawn",
        controls=(Control("ends at a change of 0.001", {"tolerance": 1e-3}), Control("100 sweeps", {"iterations": 100})),
    ),
    Experiment(
        "frozen_lake", preset="default", metric="greedy_return", bar=0.740165, better="near", tolerance=1e-6, seeds=(0,),
        notes="exact probability to arrive within 100 steps", controls=(Control("the first improvement", {"iterations": 1}),),
    ),
    Experiment(
        "cliff_walking", preset="cliff", metric="greedy_return", bar=-13.0, better="near", tolerance=1e-9, seeds=(0,),
        published="-13 is the shortest way (Sutton & Barto, example 6.6)",
        controls=(UNMASKED, Control("only the next reward counts", {"gamma": 0.0})),
    ),
    Experiment(
        "taxi", preset="taxi", metric="greedy_return", bar=7.93, better="near", tolerance=0.005, seeds=(0,),
        notes="the mean over all starts", controls=(Control("the first improvement", {"iterations": 1}),),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ exact backups


def action_values(world: Tables, value: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """Q(s, a) = E[r + γ (1 − terminated) V(s')], (S, A), of values V (S,)."""
    return (world.probability * (world.reward + gamma * ~world.terminated * value[world.next_state])).sum(2)


def operator(world: Tables, gamma: float) -> tuple[NDArray[np.float64], sparse.csr_array]:
    """r (S·A,) and γ P (S·A, S), without what leads to a termination: all backups of V (S,) are r + γ P V, Q in one product."""
    states, actions, outcomes = world.next_state.shape
    leads = gamma * world.probability * ~world.terminated
    ends = np.arange(0, leads.size + 1, outcomes)  # a row of `outcomes` entries for every state and action
    matrix = sparse.csr_array((leads.ravel(), world.next_state.ravel(), ends), (states * actions, states))
    return (world.probability * world.reward).sum(2).ravel(), matrix


def followed(policy: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Which of the `rows` S·A rows of the operator a deterministic policy (S,) takes: (S,)."""
    return np.arange(len(policy)) * (rows // len(policy)) + policy


def solve(gain: NDArray[np.float64], leads: sparse.csr_array, policy: NDArray[np.int64]) -> NDArray[np.float64]:
    """V^π = (I − γ P_π)⁻¹ r_π, (S,), of a deterministic policy (S,)."""
    rows = followed(policy, len(gain))
    return spsolve((sparse.eye_array(len(policy)) - leads[rows]).tocsc(), gain[rows])


def sweep(
    gain: NDArray[np.float64],
    leads: sparse.csr_array,
    policy: NDArray[np.int64],
    value: NDArray[np.float64],
    times: int,
) -> NDArray[np.float64]:
    """V ← r_π + γ P_π V, `times` times: (S,)."""
    rows = followed(policy, len(gain))
    gain, leads = gain[rows], leads[rows]
    for _ in range(times):
        value = gain + leads @ value
    return value


def improve(q: NDArray[np.float64], policy: NDArray[np.int64]) -> NDArray[np.int64]:
    """argmax_a Q(s, a), (S,): the action of `policy` (S,) where it is as good up to rounding, else the first that is."""
    best = q.max(1, keepdims=True)
    good = q >= best - 1e-12 * np.maximum(1.0, np.abs(best))
    return np.where(good[np.arange(len(q)), policy], policy, good.argmax(1))


def settled(rests: bool, change: float, exact: bool, tolerance: float) -> bool:
    """Line 7: whether a policy that `rests` is the last; values that only approach their limit must be there too."""
    return rests and (exact or change <= tolerance)


# ---------------------------------------------------------------------------------------------------- the method


class Plan(nn.Module):
    """What is known so far: `value` V (S,), `q` Q (S, A), float64, and `policy` π (S,), int64; one-hot states (N, S) → (N, A)."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(states, dtype=torch.float64))
        self.register_buffer("q", torch.zeros(states, actions, dtype=torch.float64))
        self.register_buffer("policy", torch.zeros(states, dtype=torch.int64))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Action values (N, A) of one-hot states (N, S)."""
        return self.q[state.argmax(1)]


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "states" (S) and "actions" (A)."""
    return {"model": Plan(spec.extra["states"], spec.extra["actions"])}


@method(
    "rl/dynamic_programming", paper="Howard 1960; Bellman 1957", section="7.5.1, 7.5.2, 7.5.3", needs=("rl",), threads=1
)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.evaluation_sweeps and config.algorithm == "value_iteration":
        raise UserError(
            "--evaluation-sweeps belongs to --algorithm policy_iteration; value iteration evaluates nothing"
        )
    kind = environment(config.env, run.env)
    world = tables(kind, declared=True)
    if world is None:
        raise UserError(
            f"--env {config.env} has no table of probabilities to plan with; FrozenLake-v1, CliffWalking-v1 and Taxi-v4 "
            "have one, and a world of yours with P[s][a] has one"
        )
    states, actions = world.next_state.shape[:2]
    if exact := config.algorithm == "policy_iteration" and not config.evaluation_sweeps:
        afford(f"the linear equations of {states:,} states", 3 * 8 * states**2)  # where no zero stays one
    run.describe(Spec(extra={"env": config.env, "states": states, "actions": actions}))
    model = build(config, Spec(extra={"states": states, "actions": actions}))["model"]
    box = Box(iterations=0, sweeps=0, changes=[])
    run.track(model=model, box=box)  # line 1
    gain, leads = operator(world, config.gamma)
    value, q, policy = model.value.numpy(), model.q.numpy(), model.policy.numpy()  # views of what is tracked
    run.say(f"{kind.name}: {states:,} states, {actions:,} actions")

    for _ in run.steps(config.iterations):  # line 2
        before, old = value.copy(), policy.copy()
        if exact:  # line 3
            value[:] = solve(gain, leads, policy)
        elif config.algorithm == "policy_iteration":
            value[:] = sweep(gain, leads, policy, value, config.evaluation_sweeps)
            box.sweeps += config.evaluation_sweeps
        q[:] = (gain + leads @ value).reshape(states, actions)  # line 4
        policy[:] = improve(q, policy)  # line 5
        box.sweeps += 1
        box.iterations += 1
        if config.algorithm == "value_iteration":
            value[:] = q.max(1)  # line 6
        change, moved = float(np.abs(value - before).max()), int((policy != old).sum())
        if len(box.changes) < 10_000:
            box.changes.append(change)
        run.log(start_value=float(world.start @ value), change=change, changed_actions=float(moved))
        if settled(moved == 0, change, exact, config.tolerance):  # line 7
            break

    pictures(run, kind, value, policy, box.changes, config)
    limit = kind.limit(config.max_episode_steps)
    return {
        "start_value": float(world.start @ value),
        "greedy_return": expected_return(world, policy, limit),
        "bellman_error": float(np.abs(action_values(world, value, config.gamma).max(1) - value).max()),
        "iterations": float(box.iterations),
        "sweeps": float(box.sweeps),
    }


def pictures(run: Run, kind: Any, value: NDArray, policy: NDArray, changes: list[float], config: Config) -> None:
    """The map of values and actions, how the values came to rest, and a film of one episode."""
    if cells := grid(kind, len(value)):
        shape, arrows = cells
        signs = [arrows[action] for action in policy] if arrows else None
        run.artifact("values", value_map(value, shape, signs), caption="V of each cell, and what is done there.")
    run.artifact("convergence", figure(changes, config.gamma), caption="The largest change of a value in each round.")
    show(run, kind, lambda state: policy[state.argmax(1)], config.max_episode_steps)


def figure(changes: list[float], gamma: float) -> Any:
    """Changes ‖V_{k+1} − V_k‖_∞ (rounds,) and the bound γ^k on those of value iteration, on a logarithmic axis."""
    from etude.blocks.pictures.panels import label, legend, panels
    from etude.blocks.pictures.plots import PALETTE, SOFT

    picture, (axes,) = panels(1, width=6.2, height=3.6)
    rounds = np.arange(1, len(changes) + 1)
    bound = max(changes[:1] + [1e-300]) * gamma ** (rounds - 1.0)
    axes.semilogy(rounds, np.maximum(changes, 1e-17), color=PALETTE[0], linewidth=1.7, label="largest change")
    axes.semilogy(
        rounds, np.maximum(bound, 1e-17), color=SOFT, linewidth=1, linestyle="--", label="γ^k times the first"
    )
    label(axes, "coming to rest", "round", "‖V′ − V‖∞")
    legend(axes, loc="upper right")
    return picture


@dataclass(frozen=True)
class Sample:
    """Settings of `etude sample`."""

    count: Copies = 3
    """Episodes to show."""
    seed: Whole = 0
    """Seed of the worlds."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Episodes of the last policy as films, or their returns where the world cannot be drawn."""
    policy = loaded.model.policy.numpy()
    return films(
        environment(loaded.config.env), lambda state: policy[state.argmax(1)], options.count, options.seed, folder
    )
