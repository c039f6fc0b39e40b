"""Watkins' Q-learning: a table of action values from one step at a time

Paper: Watkins, Learning from Delayed Rewards, 1989; Watkins & Dayan, Q-learning, Machine Learning 8, 1992.

Equation: Q(s, a) ← Q(s, a) + α (r + γ (1 − terminated) max_a' Q(s', a') − Q(s, a)),    α = 1 / n(s, a)^ω

Algorithm: (notes, Algorithm 19)
    1. while the budget of episodes lasts
    2.     take an action a by ε-greedy or Boltzmann, observe (s, a, s', r)
    3.     y = r + γ (1 − terminated) max_a' Q(s', a')
    4.     Q(s, a) ← Q(s, a) − α (Q(s, a) − y)

Differences:
- E93 (notes 7.6.1): the notes' y lacks the terminal mask. Nothing is bootstrapped behind a termination; behind a
  truncation (time limit) the value still counts. y is a constant: a semi-gradient step.
- E94 (7.6.2): the notes' ε-greedy gives the best action 1 − ε and each other one ε/(|A| − 1), undefined for one action;
  the standard form is 1 − ε + ε/|A| and ε/|A|. Both are here. Boltzmann's exp(Q) has a temperature here. Ties are
  broken uniformly.
- E95 (7.6.1): it is Watkins', not Watkin's.
- α = n^−ω with ½ < ω ≤ 1 fulfils the conditions of Watkins & Dayan's proof; a constant α does not.
- FrozenLake, CliffWalking and Taxi are stepped in compiled code from Gymnasium's own transition tables, which gives the
  trajectories of Gymnasium's `step` draw by draw (a test); any other world with discrete states is stepped itself.
- ω is 0.6: with ω = 0.8 and γ = 0.99 the first guess fades too slowly for 20,000 episodes of FrozenLake (success 0.511
  on one of five seeds). Worlds without chance take ω = 0.

Expect: CPU 3 s on FrozenLake → greedy success 0.740 within 100 steps on seeds 0-4 (the best possible); CliffWalking −13
on seeds 0-4; Taxi mean return 7.93, equal to Q* (seed 0).

Command: `etude run rl/q_learning --env FrozenLake-v1`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford
from etude.blocks.acting.tables import expected_return, optimal_q, tables
from etude.blocks.acting.worlds import Worlds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Fraction, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.spec import Spec
from etude.rl.parts.maps import grid, value_map

Million = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True)
class Config:
    env: str = "FrozenLake-v1"
    """An environment with discrete states and actions: registered with Gymnasium (``module:Name-v0`` imports the module
    first), ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that
    makes one."""
    episodes: Count = 20_000
    """Episodes to learn from."""
    log_every: Million = 200
    """Episodes between two lines of the log."""
    gamma: Fraction = 0.99
    """Discount γ."""
    learning_rate_power: NonNegative = 0.6
    """ω of the step size α = n(s, a)^−ω, n the visits so far; 0 is α = 1 (for worlds without chance)."""
    exploration: Literal["epsilon_greedy", "notes_epsilon_greedy", "boltzmann"] = "epsilon_greedy"
    """How actions are tried out."""
    epsilon_start: Probability = 1.0
    """ε in the first episode."""
    epsilon_end: Probability = 0.1
    """ε after its descent."""
    epsilon_fraction: NonNegative = 0.5
    """Share of the episodes over which ε falls linearly."""
    temperature: Positive = 0.1
    """τ of Boltzmann exploration."""
    max_episode_steps: Million = 1000
    """Steps after which an episode is truncated, if the environment has no shorter time limit of its own."""
    evaluate_every: Whole = 2000
    """Episodes between greedy evaluations (at a line of the log); 0: only the last."""
    evaluation_episodes: Copies = 100
    """Episodes of a greedy evaluation where it cannot be computed exactly from tables."""


PRESETS = {
    "tiny": Config(episodes=600, log_every=100, evaluate_every=200),
    "default": Config(),
    "cliff": Config(
        env="CliffWalking-v1", episodes=2000, log_every=50, evaluate_every=500, learning_rate_power=0.0, gamma=0.999
    ),
    "taxi": Config(env="Taxi-v4", episodes=20_000, learning_rate_power=0.0),
}

SETTINGS = {
    "env": "CliffWalking-v1",
    "temperature": {"exploration": "boltzmann", "temperature": 0.01},
    "max_episode_steps": 10,
    "evaluate_every": 300,
    "evaluation_episodes": Idle("a world with tables is scored exactly; a test runs one without"),
}

METRICS = {
    "q_error": "largest |Q − Q*| over the pairs that were visited, where Q* can be computed",
}

EXPERIMENTS = (
    Experiment(
        "frozen_lake", preset="default", metric="greedy_return", bar=0.70,
        published="0.74016 is the best possible in 100 steps (value iteration)",
        notes="exact success probability of the greedy policy within 100 steps",
        controls=(
            Control("steps that do not shrink (α = 1)", {"learning_rate_power": 0.0}),
            Control("no exploration", {"epsilon_start": 0.0, "epsilon_end": 0.0}),
        ),
    ),
    Experiment(
        "cliff_walking", preset="cliff", metric="greedy_return", bar=-13.0,
        published="-13 is the shortest way (Sutton & Barto, example 6.6)",
        controls=(Control("nothing is bootstrapped (γ = 0)", {"gamma": 0.0}),),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ exploration


def epsilon_greedy(q: NDArray, epsilon: float, notes: bool = False) -> NDArray[np.float64]:
    """π(· | s) (n, A) from values (n, A): 1 − ε + ε/|A| for the best action and ε/|A| for the others.

    `notes`: 1 − ε and ε/(|A| − 1) (E94; raises UserError for one action). Ties share equally.
    """
    best = q == q.max(-1, keepdims=True)
    best = best / best.sum(-1, keepdims=True)
    if notes:
        epsilon = spread(epsilon, q.shape[-1])
    return (1 - epsilon) * best + epsilon / q.shape[-1]


def spread(epsilon: Any, actions: int) -> Any:
    """The ε (any shape) with which the standard form gives what the notes' form gives: ε |A|/(|A| − 1), even above 1."""
    if actions == 1:
        raise UserError("the notes' epsilon-greedy is undefined for a single action: epsilon / (|A| - 1)")
    return epsilon * actions / (actions - 1)


def boltzmann(q: NDArray, temperature: float) -> NDArray[np.float64]:
    """π(a | s) ∝ exp(Q(s, a)/τ), (n, A): greedy as τ → 0, uniform as τ → ∞, unchanged by a constant added to Q."""
    with np.errstate(over="ignore"):  # e^−∞ is 0, as it should be
        weight = np.exp((q - q.max(-1, keepdims=True)).astype(np.float64) / temperature)
    return weight / weight.sum(-1, keepdims=True)


def draw(probability: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Actions (n,) of the given probabilities (n, A) for uniform numbers in [0, 1) (n,)."""
    rising = np.cumsum(probability, -1)
    return np.minimum((uniform[:, None] * rising[:, -1:] >= rising).sum(-1), probability.shape[-1] - 1)


def linear(start: float, end: float, fraction: float, progress: float) -> float:
    """ε_t = start + (end − start) min(1, progress / fraction), progress in [0, 1]: 7.6.8's gradual descent."""
    return end if progress >= fraction else start + (end - start) * progress / fraction


# -------------------------------------------------------------------------------------------------- Q-learning


def update(q: Any, visits: Any, s: int, a: int, reward: float, terminated: bool, s2: int, gamma: float, power: float):
    """Lines 3 and 4, in place: q, visits (S, A)."""
    y = reward if terminated else reward + gamma * q[s2].max()
    visits[s, a] += 1
    q[s, a] -= visits[s, a] ** -power * (q[s, a] - y)


def choose(q: Any, epsilon: float, temperature: float, uniform: float) -> int:
    """One action for values (A,): standard ε-greedy, or Boltzmann where the temperature is positive."""
    best = q.max()
    total, actions = 0.0, len(q)
    ties = (q == best).sum()
    weight = np.empty(actions)
    for a in range(actions):
        if temperature > 0:
            weight[a] = np.exp((q[a] - best) / temperature)
        else:
            weight[a] = epsilon / actions + ((1 - epsilon) / ties if q[a] == best else 0.0)
        total += weight[a]
    left = uniform * total
    for a in range(actions - 1):
        left -= weight[a]
        if left < 0:
            return a
    return actions - 1


def episodes_in_tables(
    q: Any, visits: Any, next_state: Any, reward: Any, terminated: Any, cumulative: Any, start: Any,
    epsilon: Any, temperature: float, gamma: float, power: float, limit: int, world: Any, dice: Any,
) -> Any:  # fmt: skip
    """Algorithm 19 in a world given by tables: one episode for each entry of `epsilon` (E,); returns (E,) and steps.

    `world` and `dice` are numpy Generators: draws of the world (one a reset, one a step), of the policy (one a step).
    """
    returns = np.zeros(len(epsilon))
    steps = 0
    for episode in range(len(epsilon)):
        u = world.random()
        s = 0
        while start[s] <= u:
            s += 1
        for _ in range(limit):
            a = choose(q[s], epsilon[episode], temperature, dice.random())
            u = world.random()
            o = 0
            while cumulative[s, a, o] <= u:
                o += 1
            s2, r, over = next_state[s, a, o], reward[s, a, o], terminated[s, a, o]
            update(q, visits, s, a, r, over, s2, gamma, power)
            returns[episode] += r
            steps += 1
            s = s2
            if over:
                break
    return returns, steps


@functools.cache
def compiled() -> Callable[..., Any]:
    """`episodes_in_tables` in machine code (about 2 s the first time ever, then from numba's cache)."""
    from numba import njit
    from numba.extending import register_jitable

    register_jitable(update)
    register_jitable(choose)
    return njit(cache=True)(episodes_in_tables)


def episodes_in_environment(
    env: Any, seeds: list[int], q: Any, visits: Any, epsilon: Any, temperature: float, gamma: float, power: float,
    limit: int, dice: np.random.Generator,
) -> tuple[NDArray[np.float64], int]:  # fmt: skip
    """The same in a Gymnasium environment without tables; episode e starts from seed `seeds[e]`."""
    returns, steps = np.zeros(len(epsilon)), 0
    first_state, first_action = int(env.observation_space.start), int(env.action_space.start)
    for episode, seed in enumerate(seeds):
        s = int(env.reset(seed=seed)[0]) - first_state
        for _ in range(limit):
            a = choose(q[s], epsilon[episode], temperature, dice.random())
            observed, r, terminated, truncated, _ = env.step(a + first_action)
            s2 = int(observed) - first_state
            update(q, visits, s, a, r, terminated, s2, gamma, power)
            returns[episode] += r
            steps += 1
            s = s2
            if terminated or truncated:
                break
    return returns, steps


class QTable(nn.Module):
    """Q (S, A) and visits (S, A), both float64 buffers; one-hot states (N, S) → values (N, A)."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.register_buffer("q", torch.zeros(states, actions, dtype=torch.float64))
        self.register_buffer("visits", torch.zeros(states, actions, dtype=torch.float64))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.q[state.argmax(1)]


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "states" (S) and "actions" (A)."""
    return {"model": QTable(spec.extra["states"], spec.extra["actions"])}


@method("rl/q_learning", paper="Watkins & Dayan 1992", section="7.6.1, 7.6.2, 7.6.8", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    kind = environment(config.env, run.env)
    probe = Worlds.make(kind)  # answers for continuous actions and structured observations
    env, world = kind.make(), tables(kind)
    if not hasattr(env.observation_space, "n"):
        raise UserError(
            f"--env {config.env} observes {env.observation_space}, and a table needs discrete states: use rl/dqn for it"
        )
    if config.exploration == "notes_epsilon_greedy":
        spread(0.0, probe.actions)
    afford(f"a table of {probe.size:,} states and {probe.actions:,} actions", 6 * 8 * probe.size * probe.actions)
    spec = Spec(extra={"env": config.env, "states": probe.size, "actions": probe.actions})
    run.describe(spec)
    model = build(config, spec)["model"]
    box = Box(env_steps=0, recent=[])
    run.track(model=model, box=box)
    how = "its transition table is read" if world else "it is stepped itself"
    run.say(f"{kind.name}: {probe.size:,} states, {probe.actions:,} actions; {how}")
    if kind.note:
        run.say(kind.note)
        run.artifact("environment", kind.note)
    q, visits = model.q.numpy(), model.visits.numpy()  # views: the loop below writes into the module
    limit = kind.limit(config.max_episode_steps)
    best = optimal_q(world, config.gamma) if world else None
    temperature = config.temperature if config.exploration == "boltzmann" else 0.0

    def greedy(state: NDArray[np.float32]) -> NDArray[np.int64]:
        return q[state.argmax(1)].argmax(1)

    def score(purpose: str) -> float:
        if world:
            return expected_return(world, q.argmax(1), limit)
        return float(play(kind, greedy, config.evaluation_episodes, run.seed, purpose, limit).mean())

    rounds = -(-config.episodes // config.log_every)
    for step in run.steps(rounds):
        first, last = step * config.log_every, min((step + 1) * config.log_every, config.episodes)
        schedule = (config.epsilon_start, config.epsilon_end, config.epsilon_fraction)
        epsilon = np.array([linear(*schedule, number / config.episodes) for number in range(first, last)])
        acting = spread(epsilon, probe.actions) if config.exploration == "notes_epsilon_greedy" else epsilon
        dice = np.random.default_rng(fold(run.seed, step, run.rank, "explore"))
        learn = (acting, temperature, config.gamma, config.learning_rate_power, limit)
        if world:
            chance = np.random.default_rng(fold(run.seed, step, run.rank, "world"))
            outcomes = (world.next_state, world.reward, world.terminated, world.cumulative, world.cumulative_start)
            returns, steps = compiled()(q, visits, *outcomes, *learn, chance, dice)
        else:
            seeds = [fold(run.seed, number, run.rank, "world") for number in range(first, last)]
            returns, steps = episodes_in_environment(env, seeds, q, visits, *learn, dice)
        if not np.isfinite(q).all():
            raise RunError(f"Q is not finite after {last:,} episodes; lower --gamma or raise --learning-rate-power")
        box.env_steps += int(steps)
        box.recent = (box.recent + returns.tolist())[-100:]
        run.log(episodes=last, training_return=float(returns.mean()), episode_length=steps / len(returns))
        if config.exploration != "boltzmann":
            run.log(epsilon=float(epsilon[-1]))
        if best is not None:
            run.log(q_error=float(np.abs(q - best)[visits > 0].max()))
        due = config.evaluate_every and last // config.evaluate_every > first // config.evaluate_every
        if due or step + 1 == rounds:
            run.log(greedy_return=score(f"evaluation {step}"))

    show(run, kind, greedy, limit)
    if cells := grid(kind, len(q)):
        picture = value_map(q.max(1), cells[0], known=visits.sum(1) > 0)
        run.artifact("values", picture, caption="max Q(s, ·) of each cell; never visited ones are blank")
    metrics = {
        "greedy_return": score("final evaluation"),
        "training_return": float(np.mean(box.recent)),
        "env_steps": float(box.env_steps),
    }
    if best is not None:
        metrics["q_error"] = float(np.abs(q - best)[visits > 0].max())
    return metrics
