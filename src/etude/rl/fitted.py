"""Fitted value and Q-iteration: dynamic programming by regression

Paper: Gordon, Stable Function Approximation in Dynamic Programming, 1995 (values); Ernst, Geurts & Wehenkel, Tree-Based Batch
    Mode Reinforcement Learning, JMLR 6, 2005 (Q, trees); Riedmiller, Neural Fitted Q Iteration, 2005 (networks). Divergence:
    Tsitsiklis & Van Roy, Feature-Based Methods for Large Scale Dynamic Programming, Machine Learning 22, 1996.

Equation: φ ← argmin_φ' ½ Σ_i (Q_φ'(s_i, a_i) − y_i)²,    y_i = r_i + γ (1 − terminated_i) max_a' Q_φ(s'_i, a')

    of values: φ ← argmin_φ' ½ Σ_i (V_φ'(s_i) − y_i)²,    y_i = max_a E[r + γ (1 − terminated) V_φ(s')]

Algorithm: (notes, Algorithms 16 to 18)
    1. fully fitted Q: draw a set of transitions (s, a, r, s') by the uniform policy
    2. for K iterations, or until no value changes by more than the tolerance
    3.     fitted Q: draw the transitions anew, as far as told by the greedy policy of the moment
    4.     y_i as above, of the values V(s') that the last fit gives; Q = 0 at first
    5.     fit: by least squares on features of s, by Extra-Trees, or by gradient steps of a network
    6.     how far the values have moved

Differences:
- E92 (notes 7.5.5): Algorithm 17 takes a maximum over a_i, which would give all actions of a state one value. A transition has
  one action; the maximum is over a'. Values (7.5.4) do need it, and with it a model: `--form fitted_value` wants tables.
- E93 (7.5): the notes' targets lack the terminal mask; behind a termination nothing is worth anything. Behind a truncation (time
  limit) the value of the state truly reached counts. y is a constant.
- `--transitions 0` puts exact expectations over every state and action in place of data; with tabular features that is value
  iteration. On data, tabular features give value iteration in the world whose chances are the relative frequencies.
- Convergence is promised for averagers only (a table, or trees of one structure: Gordon). `two_states` is Tsitsiklis & Van Roy's
  example: values w and 2w, no reward, and w ← (6γ/5) w by exact least squares. Baird's star is none, as its eight
  weights can write any seven values: what diverges there are gradient steps.
- Trees draw as many cuts of a node as there are inputs, as Ernst's do. Their first split is by the action. After `--freeze`
  iterations they keep their cuts, as Ernst et al. propose: new ones would change the values for ever.
- NFQ takes Rprop over all rows; here Adam takes `--updates` minibatches and goes on from the last weights.
- The data are a function of the seed, equal on all ranks, and are drawn again by a run that is resumed. The policy of the last
  iteration is scored: nothing is chosen by playing.

Expect: one core, seeds 0-2. CartPole from 10,000 transitions of the uniform policy (return 22), mean return of 100 episodes:
    network 500, 500 and 499.8 (13 s), trees 207, 263 and 304 (23 s). FrozenLake with everything known: 704 iterations to
    V*(start) = 0.5420259; from 100,000 transitions the best policy, Q within 0.06 of Q* (8 s).

Command: `etude run rl/fitted --preset trees`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.episodes import Copies, Policy, play, show
from etude.blocks.acting.memory import afford, afford_learning
from etude.blocks.acting.tables import Tables, expected_return, optimal_q, tables
from etude.blocks.acting.worlds import Worlds
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.loaded import Loaded
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim.adam import Adam
from etude.rl.dqn import QNetwork
from etude.rl.dynamic_programming import action_values
from etude.rl.parts.films import films
from etude.rl.parts.inputs import Fitted, places, standardised
from etude.rl.parts.linear import Linear, solvers
from etude.rl.parts.maps import grid, landscape, value_map
from etude.rl.parts.mlp import activations, backward
from etude.rl.parts.transitions import Data, collect, known, observed, two_states
from etude.rl.parts.trees import Trees, most_nodes


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium, ``file.py:Name`` of your own (which is run), or in Python
    an object; or two_states, in which linear features diverge."""
    form: Literal["fitted_value", "fitted_q", "fully_fitted_q"] = "fully_fitted_q"
    """Values of states by a known model; action values on fresh data in every iteration; action values on one set of data."""
    features: Literal["tabular", "linear", "trees", "mlp"] = "mlp"
    """What is fitted: a table, least squares on polynomials of the state, extremely randomised trees, or a network."""
    transitions: Annotated[int, Range(0, 10_000_000)] = 10_000
    """Transitions that are drawn, of which a form of values takes the states; 0: every state and action of a world with tables,
    with exact expectations."""
    iterations: Annotated[int, Range(1, 1_000_000)] = 60
    """Regressions K."""
    tolerance: NonNegative = 0.0
    """Ends earlier when no value has changed by more (not on fresh data)."""
    gamma: Fraction = 0.98
    """Discount γ."""
    uniform_share: Probability = 1.0
    """Share of uniformly drawn actions in the fresh data of fitted Q; the others are greedy."""
    degree: Annotated[int, Range(1, 10)] = 2
    """Highest power in the polynomials of linear features."""
    constant: bool = True
    """A constant among the linear features."""
    initial_weight: float = 0.0
    """Every weight of tabular and linear features before the first iteration."""
    l2: NonNegative = 0.0
    """Coefficient of ‖w‖² in least squares; 0 takes the shortest of several solutions."""
    trees: Few = 50
    """Trees."""
    leaf: Count = 10
    """Least rows in a leaf of a tree."""
    freeze: Count = 30
    """Iterations after which the trees keep their cuts, and only the means in their leaves change."""
    widths: tuple[Count, ...] = (512,)
    """Widths of the network's hidden layers."""
    updates: Count = 50
    """Gradient steps of the network in an iteration."""
    batch: Count = 512
    """Rows in a minibatch."""
    learning_rate: Positive = 1e-3
    """Adam's α."""
    evaluate_every: Whole = 10
    """Iterations between scores of the greedy policy; 0: only the last."""
    evaluation_episodes: Copies = 100
    """Episodes of a score, where it cannot be computed from tables."""
    max_episode_steps: Annotated[int, Range(1, 1_000_000)] = 1000
    """Steps of the episodes that are scored, if the environment has no shorter time limit of its own."""


PRESETS = {
    "tiny": Config(
        env="FrozenLake-v1", features="tabular", transitions=1000, iterations=30, gamma=0.95, max_episode_steps=30
    ),
    "default": Config(),
    "trees": Config(features="trees"),
    "polynomials": Config(features="linear", degree=4),  # diverges
    "lake": Config(
        env="FrozenLake-v1", form="fitted_value", features="tabular", transitions=0, iterations=5000, tolerance=1e-12,
        gamma=0.99, evaluate_every=100,
    ),
    "lake_data": Config(
        env="FrozenLake-v1", features="tabular", transitions=100_000, iterations=1000, gamma=0.99, evaluate_every=100
    ),
    "two_states": Config(
        env="two_states", form="fitted_value", features="linear", transitions=0, iterations=100, gamma=0.99, degree=1,
        constant=False, initial_weight=1.0, evaluate_every=0,
    ),
}  # fmt: skip

_NET = {"env": "CartPole-v1", "features": "mlp", "transitions": 300, "iterations": 3, "updates": 5, "batch": 16}
_TREES = {"env": "CartPole-v1", "features": "trees", "transitions": 300, "iterations": 3, "trees": 5}
_FRESH = {"form": "fitted_q", "transitions": 300, "iterations": 3}

SETTINGS = {
    "env": "CliffWalking-v1",
    "form": "fitted_value",
    "features": "trees",
    "tolerance": 1e-2,
    "uniform_share": {**_FRESH, "uniform_share": 0.2},
    "degree": {"features": "linear", "degree": 3},
    "constant": {"features": "linear", "constant": False},
    "initial_weight": 0.5,
    "l2": 0.1,
    "trees": {**_TREES, "trees": 7},
    "leaf": {**_TREES, "leaf": 20},
    "freeze": {**_TREES, "freeze": 1},
    "widths": {**_NET, "widths": (24,)},
    "updates": {**_NET, "updates": 7},
    "batch": {**_NET, "batch": 24},
    "learning_rate": {**_NET, "learning_rate": 0.01},
    "evaluate_every": 7,
    "evaluation_episodes": {**_TREES, "evaluation_episodes": 3},
    "max_episode_steps": 20,
}

METRICS = {
    "start_value": "V of the state in which episodes begin; its mean, where several may be the first",
    "largest_value": "largest |V(s)| of a state of the data; in truth none is above the largest |r| / (1 − γ)",
    "change": "largest change of such a V(s) in the last iteration",
    "contraction": "the last change over the one before; at most γ for exact backups, and above 1 where it diverges",
    "fit_error": "root mean square of what the last regression left of its targets",
    "value_error": "largest |V − V*| of the data's states, or |Q − Q*| of its pairs, where these can be computed",
    "iterations": "regressions",
}

E92 = Control("the notes' maximum over a_i (E92)", swap={"targets": "etude.rl.parts.nulls.best_of_all"})
E93 = Control("no terminal mask (E93)", swap={"expected": "etude.rl.parts.nulls.unmasked_expected"})
ONE = Control("regression on the reward (K = 1)", {"iterations": 1})

EXPERIMENTS = (
    Experiment(
        "value_iteration", preset="lake", metric="value_error", bar=1e-9, better="lower", seeds=(0,), notes="nothing is drawn",
        controls=(
            Control("100 iterations", {"iterations": 100}),
            Control("squares of row and column for a table", {"features": "linear"}),
        ),
    ),
    Experiment(
        "q_iteration", preset="lake", flags={"form": "fitted_q"}, metric="value_error", bar=1e-9, better="lower", seeds=(0,),
        notes="nothing is drawn", controls=(E92, Control("100 iterations", {"iterations": 100})),
    ),
    Experiment(
        "off_policy", preset="lake_data", metric="greedy_return", bar=0.70,
        published="0.740165 is the best possible in 100 steps (value iteration)",
        notes="100,000 transitions of the uniform policy, which arrives in 1.4 % of its episodes", controls=(E92, ONE),
    ),
    Experiment(
        "cartpole_mlp", preset="default", metric="greedy_return", bar=420.0,
        notes="10,000 transitions of the uniform policy, whose return is 22", controls=(E93, ONE),
    ),
    Experiment(
        "cartpole_trees", preset="trees", metric="greedy_return", bar=180.0,
        notes="10,000 transitions of the uniform policy, whose return is 22", controls=(E93, ONE),
    ),
    Experiment(
        "divergence", preset="two_states", metric="contraction", bar=1.188, better="near", tolerance=1e-6, seeds=(0,),
        published="w grows by 6γ/5 in every iteration (Tsitsiklis & Van Roy, 1996)", notes="nothing is drawn",
        controls=(
            Control("a table", {"features": "tabular"}),
            Control("a constant beside the one feature", {"constant": True}),
            Control("γ below 5/6", {"gamma": 0.8}),
        ),
    ),
    Experiment(
        "divergence_cartpole", preset="polynomials", metric="largest_value", bar=260.0,
        notes="polynomials of degree 4 on the data on which trees converge; no value of this world is above 50",
        controls=(Control("degree 1", {"degree": 1}), Control("trees", {"features": "trees"})),
    ),
)  # fmt: skip

# N rows of data, B backups of each, O outcomes of each, P points (states), D numbers observed, d inputs, A outputs


def expected(
    reward: NDArray, terminated: NDArray[np.bool_], probability: NDArray, behind: NDArray, gamma: float
) -> NDArray[np.float64]:
    """E[r + γ (1 − terminated) V(s')] over outcomes: everything (R, O), `behind` V(s'), → (R,)."""
    return (probability * (reward + gamma * np.where(terminated, 0.0, behind))).sum(1)


def targets(data: Data, value: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """y (N,) of values V (P,): a row's one backup, or the best of its actions'."""
    each = expected(data.reward, data.terminated, data.probability, value[data.there], gamma)
    return each.reshape(len(data.here), -1).max(1)


# ------------------------------------------------------------------------------------------------------ functions


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (D), "inputs" (d), "outputs" (A) and "rows" (N)."""
    size, inputs, outputs, rows = (spec.extra[name] for name in ("size", "inputs", "outputs", "rows"))
    if config.features == "mlp":
        return {"model": Fitted(QNetwork(inputs, outputs, config.widths), size, inputs, torch.float32)}
    if config.features == "trees":
        body: nn.Module = Trees(config.trees, most_nodes(rows, outputs, config.leaf), outputs)
    else:
        degree = config.degree if config.features == "linear" else 0
        body = Linear(inputs, outputs, degree, config.constant, config.initial_weight)
    return {"model": Fitted(body, size, inputs, torch.float64)}


def policy_of(config: Config, model: Fitted, world: Tables | None) -> Policy:
    """The greedy policy; for values, one that looks a step ahead in the tables."""
    if config.form != "fitted_value" or world is None:
        return lambda state: model.of(state).argmax(1)
    value = model.of(np.eye(len(world.start), dtype=np.float32))[:, 0]
    best = action_values(world, value, config.gamma).argmax(1)
    return lambda state: best[state.argmax(1)]


def refuse(config: Config, world: Tables | None, discrete: bool) -> None:
    """Raise UserError for what does not go together."""
    if world is None and (config.form == "fitted_value" or not config.transitions):
        what = "--form fitted_value" if config.form == "fitted_value" else "--transitions 0"
        raise UserError(f"{what} takes expectations, and --env {config.env} has no table of probabilities")
    if not discrete and config.features == "tabular":
        raise UserError(f"--env {config.env} has no discrete states for a table; take --features linear, trees or mlp")
    if config.env == "two_states" and config.transitions:
        raise UserError("--env two_states is a table and no place to act in; it wants --transitions 0")
    if config.uniform_share < 1 and (config.form != "fitted_q" or not config.transitions):
        raise UserError("--uniform-share belongs to the fresh data of --form fitted_q; other data are drawn uniformly")


# ------------------------------------------------------------------------------------------------------ the method


@method("rl/fitted", paper="Ernst, Geurts & Wehenkel 2005", section="7.5.4, 7.5.5, 7.5.6", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    kind = None if config.env == "two_states" else environment(config.env, run.env)
    world = tables(kind, declared=True) if kind else two_states()
    discrete = world is not None or (kind is not None and hasattr(kind.make().observation_space, "n"))
    refuse(config, world, discrete)
    probe = Worlds.make(kind) if kind else None
    size, actions = (probe.size, probe.actions) if probe else (2, 1)
    values, fresh = config.form == "fitted_value", config.form == "fitted_q" and config.transitions > 0
    fixed = places(config.env, kind, size, config.features != "linear") if discrete else None
    rows = config.transitions or size * actions
    sizes = {"size": size, "inputs": size if fixed is None else fixed.shape[1], "outputs": 1 if values else actions}
    spec = Spec(extra={"env": config.env, "rows": rows, **sizes})
    afford_all(config, rows, size, sizes["inputs"], sizes["outputs"])
    run.describe(spec)
    model: Any = build(config, spec)["model"]
    body, best = model.body, None if world is None else optimal_q(world, config.gamma)
    box = Box(history=[], iterations=0, last={}, env_steps=0)
    run.track(model=model, box=box)
    if config.features == "mlp":
        run.place(model)
        optimizer = Adam(model.parameters(), lr=config.learning_rate)
        run.track(optimizer=optimizer)
        gradient = body.phi.grad = torch.zeros_like(body.phi)
        layers, slopes = body.layers(body.phi.detach()), body.layers(gradient)

    def draw(step: int) -> Data:
        if not config.transitions:
            return known(world, values)
        seed = fold(run.seed, step if fresh else 0, 0, "data")
        found = collect(kind, config.transitions, seed, config.uniform_share, policy_of(config, model, world))
        return known(world, True, found[0].argmax(1)) if values else observed(found, discrete)

    def score(purpose: str) -> float:
        limit, policy = kind.limit(config.max_episode_steps) if kind else 1, policy_of(config, model, world)
        if world is not None:
            return expected_return(world, policy(np.eye(size, dtype=np.float32)), limit)
        return float(play(kind, policy, config.evaluation_episodes, run.seed, purpose, limit).mean())

    data: Data | None = None
    leaves: NDArray[np.int32] | None = None
    for step in run.steps(config.iterations):  # line 2
        if data is None or fresh:  # lines 1 and 3
            data = draw(step)
            if step == 0:
                scale, shift = (fixed, np.zeros(fixed.shape[1])) if fixed is not None else standardised(data.points)
                model.scale.copy_(torch.from_numpy(scale))
                model.shift.copy_(torch.from_numpy(shift))
            z, column = model.inputs(data.points)[torch.from_numpy(data.here)], torch.from_numpy(data.action)[:, None]
            value, leaves = model.of(data.points).max(1), None
            if step == 0 and config.features == "mlp":
                value = np.zeros(len(value))
            if isinstance(body, Linear):
                solve = solvers(body.features(z).numpy(), data.action, sizes["outputs"], config.l2)
        y = targets(data, value, config.gamma)  # line 4
        if isinstance(body, Linear):  # line 5
            for output, (chosen, matrix) in enumerate(solve):
                body.weight[:, output] = torch.from_numpy(matrix @ y[chosen])
        elif isinstance(body, Trees):
            if step < config.freeze:
                body.fit(z.numpy(), data.action, y, config.leaf, fold(run.seed, step, 0, "trees"))
            else:
                leaves = body.leaves(model.inputs(data.points).numpy()) if leaves is None else leaves
                body.refresh(leaves[:, data.here, data.action], y)
        else:
            x, goal, column = z, torch.from_numpy(y).to(z)[:, None], column.to(run.device)
            index = torch.randint(len(y), (config.updates, config.batch), generator=run.generator("minibatches", step))
            for batch in index.to(run.device):
                kept = activations(layers, x[batch])
                error = kept[-1].gather(1, column[batch]) - goal[batch]
                delta = torch.zeros_like(kept[-1]).scatter_(1, column[batch], error / config.batch)
                backward(layers, kept, delta, slopes)
                if run.world > 1:
                    run.average(model)
                run.average(gradient_norm=torch.linalg.vector_norm(gradient))
                optimizer.step()
        before, q = value, model.of(data.points) if leaves is None else body.at(leaves)
        value = q.max(1)
        if not np.abs(q).max() < MOST:  # not a number is none either
            raise RunError(f"the values have grown beyond {MOST:g} after {step + 1:,} iterations: it diverges")
        fitted, change = q[data.here, data.action], float(np.abs(value - before).max())  # line 6
        row = {"largest_value": float(np.abs(value).max()), "change": change}
        if step:
            row["contraction"] = change / box.last["change"] if box.last["change"] else 0.0
        row["fit_error"] = float(np.sqrt(np.mean((fitted - y) ** 2)))
        if best is not None:
            truth = best.max(1)[data.here] if values else best[data.here, data.action]
            row["value_error"] = float(np.abs(fitted - truth).max())
        if len(box.history) < 10_000:
            box.history = [*box.history, [row.get(name, np.nan) for name in HISTORY]]
        box.last, box.iterations, box.env_steps = row, step + 1, (step + 1 if fresh else 1) * config.transitions
        run.log(**row)
        rests = change <= config.tolerance and not fresh
        if kind and (rests or run.every(config.evaluate_every)):
            run.log(greedy_return=score("evaluation"))
        if rests:
            break

    policy = policy_of(config, model, world)
    pictures(run, config, kind, model, policy, np.array(box.history), best)
    if world is not None:
        start = float(world.start @ model.of(np.eye(size, dtype=np.float32)).max(1))
    else:
        first = Worlds.make(kind, config.evaluation_episodes, run.seed, "final evaluation").observation
        start = float(model.of(first).max(1).mean())
    acted = {"greedy_return": score("final evaluation")} if kind else {}
    drawn = {"env_steps": float(box.env_steps)} if config.transitions else {}
    return {**acted, "start_value": start, **box.last, "iterations": float(box.iterations), **drawn}


MOST = 1e30
"""A value at which iterating is given up."""
HISTORY = ("largest_value", "change", "fit_error", "value_error")


def afford_all(config: Config, rows: int, size: int, inputs: int, outputs: int) -> None:
    """Raise UserError where the data, or the function that is fitted to them, ask for more memory than there is."""
    afford(f"{rows:,} transitions (--transitions)", 4 * rows * 4 * (size + inputs))
    if config.features == "mlp":
        afford_learning([inputs, *config.widths, outputs], config.updates * config.batch)
    elif config.features == "trees":
        nodes = most_nodes(rows, outputs, config.leaf)
        afford(f"{config.trees:,} trees", config.trees * (24 * nodes + 4 * 2 * rows * outputs))
    else:
        features = math.comb(inputs + config.degree, config.degree) if config.features == "linear" else inputs
        afford(f"{features:,} features of {rows:,} states", 8 * 3 * features * max(rows, features))


def pictures(
    run: Run, config: Config, kind: Environment | None, model: Fitted, policy: Policy, history: NDArray, best: Any
) -> None:
    """The film, the values on the grid or over two observed numbers, and how the iterations went."""
    count = np.arange(1, len(history) + 1)
    if kind is None:
        growth = {
            "2 (6γ/5)^k": (count, 2 * (1.2 * config.gamma) ** count),
            "a table, γ^k": (count, config.gamma**count),
        }
        growth["these features"] = (count, history[:, 0])
        run.artifact(
            "divergence", curves(growth, "iteration", "largest |V|", log=True), "What each fit makes of no reward."
        )
        return
    show(run, kind, policy, config.max_episode_steps)
    size = len(model.scale)
    if best is not None and (cells := grid(kind, size)):
        every = np.eye(size, dtype=np.float32)
        signs = [cells[1][action] for action in policy(every)] if cells[1] else None
        run.artifact(
            "values", value_map(model.of(every).max(1), cells[0], signs), "V of each cell, and what is done there."
        )
    elif best is None and size > 1 and len(model.shift) == size:
        deviation = 1 / np.diag(model.scale.double().cpu().numpy())
        mean = -model.shift.double().cpu().numpy() * deviation
        run.artifact("values", landscape(model.of, mean, deviation), "Slices through the mean of the data.")
    lines = {HISTORY[i].replace("_", " "): (count, np.maximum(history[:, i], 1e-17)) for i in (1, 2, 3)}
    lines = {name: line for name, line in lines.items() if (line[1] > 1e-17).any()}  # not what is unknown, nor all 0
    run.artifact(
        "progress", curves(lines, "iteration", "", log=True), "Change of a value, what the fit left, and the error."
    )


@dataclass(frozen=True)
class Sample:
    """Settings of `etude sample`."""

    count: Copies = 1
    """Episodes to show."""
    seed: Whole = 0
    """Seed of the worlds."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Greedy episodes as films, or their returns where the world cannot be drawn."""
    config = loaded.config
    if config.env == "two_states":
        return "values of the two states: " + ", ".join(
            f"{v:g}" for v in loaded.model.of(np.eye(2, dtype=np.float32))[:, 0]
        )
    kind = environment(config.env)
    return films(
        kind, policy_of(config, loaded.model, tables(kind, declared=True)), options.count, options.seed, folder
    )
