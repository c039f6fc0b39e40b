"""Policy evaluation: Monte Carlo returns against bootstrapped targets, TD(0)

Paper: Sutton, Learning to predict by the methods of temporal differences, Machine Learning 3, 1988; Sutton & Barto,
    Reinforcement Learning, second edition, 2018, chapters 5 and 6.

Equation: V^π(s_t) = E[Σ_{t' ≥ t} γ^{t' − t} r_{t'}]
    Monte Carlo: y_t = Σ_{t' ≥ t} γ^{t' − t} r_{t'};    TD(0): y_t = r_t + γ (1 − terminated) V(s_{t+1})
    V(s_t) ← V(s_t) − α (V(s_t) − y_t), one step of gradient descent on ½ (V(s_t) − y_t)² in a table

Algorithm: (notes 7.4.3.1 and 7.4.3.2)
    1. V = the first value in every state, in n tables for each of the two
    2. for each episode: in every one of n rounds, play π from a first state to the end
    3.     TD(0): update V(s_t) after every step
    4.     Monte Carlo: update V(s_t) of every step, the last one first, when the episode is over

Differences:
- E87 (notes 7.4.3.2): the notes call bootstrapping a form of Monte Carlo evaluation; it is TD(0), which does without whole
  returns. y_t is a constant: no gradient flows through V(s_{t+1}).
- E93 (7.5): nothing is bootstrapped behind a termination. Behind a cut by `--max-episode-steps` V counts, in both.
- E85, E86 (7.4.1, 7.4.2): V(s) is an expectation for each state, not over states; A^π = Q^π − V^π sums from t on.
- 7.4.4.2: discounting is dying with probability 1 − γ in every step. `with_death` builds that world, and `death_gap` says
  how far its undiscounted values are from the discounted ones: not at all.
- Both learn from the very same episodes, in `--rounds` independent repeats at once, whose mean error is reported.

Expect: one core, 2 s. Random walk over 5 states, α = 0.1, seeds 0-2: after 100 episodes
    TD(0) errs by 0.060, 0.053 and 0.055, Monte Carlo (α = 0.02) by 0.085, 0.076 and 0.081.

Command: `etude run rl/evaluation --env FrozenLake-v1 --gamma 0.99 --episodes 2000`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.memory import afford
from etude.blocks.acting.tables import Tables, optimal_q, tables
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Probability, Range
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    env: str = "walk"
    """walk (the random walk along `states` places, which pays 1 at its right end), or a world with tables of its
    probabilities, as for rl/dynamic_programming."""
    states: Annotated[int, Range(1, 1000)] = 5
    """Places of the walk; it begins in the middle."""
    policy: Literal["uniform", "optimal"] = "uniform"
    """The policy that is evaluated: every action with equal probability, or one that is best."""
    episodes: Count = 100
    """Episodes of each round."""
    rounds: Few = 100
    """Independent repeats; the reported errors are means over them."""
    td_learning_rate: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    """α of TD(0)."""
    monte_carlo_learning_rate: Annotated[float, Range(0, 1, open_low=True)] = 0.02
    """α of the Monte Carlo updates."""
    gamma: Probability = 1.0
    """Discount γ; 1 where every episode ends."""
    initial_value: float = 0.5
    """V of every state before the first episode."""
    max_episode_steps: Annotated[int, Range(1, 100_000)] = 1000
    """Steps after which an episode is cut."""


PRESETS = {
    "tiny": Config(episodes=20, rounds=10),
    "default": Config(),
    "long": Config(episodes=1000, td_learning_rate=0.02, monte_carlo_learning_rate=0.005),
    "lake": Config(env="FrozenLake-v1", gamma=0.99, episodes=2000, initial_value=0.0),
}

SETTINGS = {
    "env": {"env": "FrozenLake-v1", "gamma": 0.9},
    "policy": {"env": "FrozenLake-v1", "gamma": 0.9, "policy": "optimal"},
    "max_episode_steps": 4,
}

METRICS = {
    "td_rmse": "root mean squared error over states of TD(0)'s V, mean over rounds",
    "monte_carlo_rmse": "root mean squared error over states of the Monte Carlo estimate, mean over rounds",
    "first_rmse": "root mean squared error over states before the first episode",
    "fixed_point_gap": "largest expected TD error of a state at V^π, where TD(0) comes to rest; 0",
    "death_gap": "largest difference of V^π from the undiscounted values of a world that ends with probability 1 − γ; 0",
}

EXPERIMENTS = (
    Experiment(
        "walk, TD(0)", preset="default", metric="td_rmse", bar=0.072, better="lower",
        published="0.05 or less at α = 0.1 after 100 episodes (Sutton & Barto, example 6.2, by the figure)",
        controls=(
            Control("before the first episode", metric="first_rmse"),
            Control("no terminal mask (E93)", swap={"td_targets": "etude.rl.parts.nulls.unmasked_td_targets"}),
        ),
    ),
    Experiment(
        "walk, Monte Carlo", preset="long", metric="monte_carlo_rmse", bar=0.044, better="lower",
        notes="after 1,000 episodes",
        controls=(
            Control("before the first episode", metric="first_rmse"),
            Control("steps that do not shrink the noise (α = 0.5)", {"monte_carlo_learning_rate": 0.5}),
        ),
    ),
    Experiment(
        "death", preset="lake", flags={"episodes": 2, "rounds": 1}, metric="death_gap", bar=1e-10, better="lower", seeds=(0,),
        notes="nothing of it is drawn", controls=(Control("nobody dies", swap={"with_death": "etude.rl.parts.nulls.deathless"}),),
    ),
)  # fmt: skip

# S states, A actions, O outcomes, n rounds


def walk(states: int) -> Tables:
    """Sutton & Barto's random walk: left (0) or right (1); it is over at both ends, and the right one pays 1."""
    here = np.arange(states)
    after = np.stack([here - 1, here + 1], 1)[..., None]
    over = (after < 0) | (after >= states)
    start = np.zeros(states)
    start[states // 2] = 1.0
    return Tables(after.clip(0, states - 1), (after >= states).astype(float), over, np.ones(after.shape), start)


def action_values(world: Tables, value: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """Q(s, a) = E[r + γ (1 − terminated) V(s')], (S, A), of values V (S,)."""
    return (world.probability * (world.reward + gamma * ~world.terminated * value[world.next_state])).sum(2)


def exact_value(world: Tables, policy: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """V^π = (I − γ P_π)⁻¹ r_π, (S,), of a stochastic policy π (S, A). Raises UserError where it has no solution."""
    states = len(policy)
    share = policy[..., None] * world.probability  # (S, A, O)
    matrix = np.eye(states)
    leads = gamma * share * ~world.terminated
    np.add.at(matrix, (np.arange(states)[:, None, None], world.next_state), -leads)
    try:
        value = np.linalg.solve(matrix, (share * world.reward).sum((1, 2)))
    except np.linalg.LinAlgError:
        value = np.full(states, np.inf)
    if not np.abs(value).max() < 1e12:
        raise UserError(f"--gamma {gamma:g} gives no finite values, for some episodes never end; lower it")
    return value


def with_death(world: Tables, gamma: float) -> Tables:
    """7.4.4.2: the same world in which every step is the last with probability 1 − γ: one more outcome, behind it nothing."""
    shape = (*world.probability.shape[:2], 1)
    expected = (world.probability * world.reward).sum(2, keepdims=True)  # who dies has been paid for the step
    return replace(
        world,
        probability=np.concatenate([gamma * world.probability, np.full(shape, 1 - gamma)], 2),
        next_state=np.concatenate([world.next_state, np.zeros(shape, np.int64)], 2),
        reward=np.concatenate([world.reward, expected], 2),
        terminated=np.concatenate([world.terminated, np.ones(shape, bool)], 2),
    )


def td_targets(
    reward: NDArray[np.float64], terminated: NDArray[np.bool_], behind: NDArray[np.float64], gamma: float
) -> NDArray[np.float64]:
    """y = r + γ (1 − terminated) V(s'), all (n,)."""
    return reward + gamma * np.where(terminated, 0.0, behind)


def draw(shares: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first index whose cumulative share exceeds a uniform number: shares (n, K), numbers (n,) → (n,)."""
    return np.minimum((uniform[:, None] >= np.cumsum(shares, 1)).sum(1), shares.shape[1] - 1)


class Values(nn.Module):
    """`td` and `monte_carlo`, V of n rounds by S states, (n, S) float64; one-hot states (N, S) → their mean TD values (N,)."""

    def __init__(self, rounds: int, states: int, first: float) -> None:
        super().__init__()
        for name in ("td", "monte_carlo"):
            self.register_buffer(name, torch.full((rounds, states), float(first), dtype=torch.float64))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Mean over rounds of TD(0)'s V, (N,), of one-hot states (N, S)."""
        return self.td.mean(0)[state.argmax(1)]


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "states" (S)."""
    return {"model": Values(config.rounds, spec.extra["states"], config.initial_value)}


@method("rl/evaluation", paper="Sutton 1988", section="7.4.2, 7.4.3.1, 7.4.3.2, 7.4.4.2", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.env == "walk":
        world: Tables | None = walk(config.states)
    else:
        world = tables(environment(config.env, run.env), declared=True)
    if world is None:
        raise UserError(f"--env {config.env} has no table of probabilities to hold the estimates against")
    states, actions = world.next_state.shape[:2]
    afford(f"{config.rounds:,} tables of {states:,} states", 6 * 8 * config.rounds * states + 3 * 8 * states**2)
    policy = np.full((states, actions), 1 / actions)
    if config.policy == "optimal":
        policy = np.eye(actions)[optimal_q(world, min(config.gamma, 1 - 1e-9)).argmax(1)]
    best = exact_value(world, policy, config.gamma)
    spec = Spec(extra={"env": config.env, "states": states, "actions": actions})
    run.describe(spec)
    model = build(config, spec)["model"]
    box = Box(curve=np.zeros((config.episodes, 2)))
    run.track(model=model, box=box)  # line 1
    td, mc = model.td.numpy(), model.monte_carlo.numpy()  # views of what is tracked
    every, first = np.arange(config.rounds), rmse(np.full((1, states), config.initial_value), best)

    for step in run.steps(config.episodes):  # line 2
        dice = np.random.default_rng(fold(run.seed, step, 0, "episode"))
        s = draw(np.broadcast_to(world.start, (config.rounds, states)), dice.random(config.rounds))
        going, lived = np.ones(config.rounds, bool), []
        for _ in range(config.max_episode_steps):
            a = draw(policy[s], dice.random(config.rounds))
            o = draw(world.probability[s, a], dice.random(config.rounds))
            after, reward, over = world.next_state[s, a, o], world.reward[s, a, o], world.terminated[s, a, o]
            y = td_targets(reward, over, td[every, after], config.gamma)
            td[every, s] -= np.where(going, config.td_learning_rate * (td[every, s] - y), 0.0)  # line 3
            lived.append((s, reward, over, going))
            s, going = after, going & ~over
            if not going.any():
                break
        y = mc[every, s]  # what a cut has left; nothing is left behind a termination
        for s, reward, over, alive in reversed(lived):  # line 4
            y = np.where(alive, td_targets(reward, over, y, config.gamma), y)
            mc[every, s] -= np.where(alive, config.monte_carlo_learning_rate * (mc[every, s] - y), 0.0)
        box.curve[step] = rmse(td, best), rmse(mc, best)
        if not np.isfinite(box.curve[step]).all():
            raise RunError(f"the values are not finite after {step + 1:,} episodes; lower the learning rates")
        run.log(td_rmse=box.curve[step, 0], monte_carlo_rmse=box.curve[step, 1])

    count = np.arange(1, config.episodes + 1)
    lines = {"TD(0)": (count, box.curve[:, 0]), "Monte Carlo": (count, box.curve[:, 1])}
    run.artifact("errors", curves(lines, "episodes", "rms error over states"), f"Means over {config.rounds} rounds.")
    places = np.arange(1, states + 1)
    told = {"V^π": (places, best), "TD(0)": (places, td.mean(0)), "Monte Carlo": (places, mc.mean(0))}
    run.artifact(
        "values", curves(told, "state", "value"), "The estimates, their means over rounds, and the exact values."
    )
    slip = (policy * action_values(world, best, config.gamma)).sum(1) - best
    death = exact_value(with_death(world, config.gamma), policy, 1.0)
    return {
        "td_rmse": rmse(td, best),
        "monte_carlo_rmse": rmse(mc, best),
        "first_rmse": first,
        "fixed_point_gap": float(np.abs(slip).max()),
        "death_gap": float(np.abs(death - best).max()),
    }


def rmse(value: NDArray[np.float64], best: NDArray[np.float64]) -> float:
    """Root of the mean over states of (V − V^π)², mean over rounds: V (n, S), V^π (S,)."""
    return float(np.sqrt(((value - best) ** 2).mean(1)).mean())
