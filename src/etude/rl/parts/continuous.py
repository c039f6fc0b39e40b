"""What learns to act in a box from a replay buffer: actors, critics, and targets that follow slowly.

Actions are u ∈ [−1, 1]^A inside (networks, buffer, noise) and a = middle + half · u in the world: `Bounds` converts.

    DeterministicActor   u = tanh(f_θ(s))
    SquashedGaussian     u = tanh(x), x ~ N(mean_θ(s), diag σ_θ(s)²)
    Critics              n action values Q_φ(s, u) side by side, one batched product a layer

Shapes: N states of D numbers, A numbers in an action. Everything computes in the dtype of the parameters. Weights begin as in
`torch.nn.Linear`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.episodes import Policy, play
from etude.blocks.acting.replay import Replay
from etude.blocks.acting.worlds import Worlds
from etude.core.checkpoint import Box
from etude.core.config import Count, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.rl.parts.films import films
from etude.rl.parts.policies import HALF_LOG_TWO_PI

Module = TypeVar("Module", bound=nn.Module)
LOG_STD = (-20.0, 2.0)
"""Between these log σ is kept."""


class Bounds:
    """a = middle + half · u, between the bounds low, high (A,) of a world's actions."""

    def __init__(self, low: ArrayLike, high: ArrayLike) -> None:
        ends = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.middle, self.half = ((ends[1] + sign * ends[0]) / 2 for sign in (1, -1))

    def world(self, unit: NDArray[Any]) -> NDArray[np.float32]:
        """Actions of the world (*, A) for u (*, A)."""
        return (self.middle + self.half * unit).astype(np.float32)


# ------------------------------------------------------------------------------------------------- pure functions


def squashed_log_prob(x: Tensor, mean: Tensor, log_std: Tensor, half: Tensor | float = 1.0) -> Tensor:
    """log density (*,) of half · tanh(x) where x ~ N(mean, σ²), all (*, A); `half` > 0, a number or (A,).

    log N(x; mean, σ) − Σ log (half (1 − tanh² x)), with log(1 − tanh² x) = 2 (log 2 − x − softplus(−2x)): finite for any x.
    """
    scaled = (x - mean) * (-log_std).exp()
    normal = -0.5 * scaled * scaled - log_std - HALF_LOG_TWO_PI
    slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
    return (normal - slope - torch.as_tensor(half, dtype=x.dtype, device=x.device).log()).sum(-1)


@torch.no_grad()
def follow_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """φ' ← φ' + τ (φ − φ') for all parameters, in place; τ = 1 copies."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def frozen(module: Module) -> Module:
    """A copy that gets no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- networks


def relu_mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them: (N, inputs) → (N, outputs)."""
    parts: list[nn.Module] = []
    for a, b in pairwise((inputs, *widths, outputs)):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class DeterministicActor(nn.Module):
    """u = tanh(f_θ(s))."""

    def __init__(self, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.actions = actions
        self.net = relu_mlp(size, widths, actions)

    def forward(self, state: Tensor) -> Tensor:
        """u (N, A) of states (N, D)."""
        return self.net(state).tanh()

    best = forward


class SquashedGaussian(nn.Module):
    """u = tanh(x), x ~ N(mean_θ(s), diag σ_θ(s)²): a density on the open box."""

    def __init__(self, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.actions = actions
        self.net = relu_mlp(size, widths, 2 * actions)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """mean and log σ of x, (N, A) each, of states (N, D)."""
        mean, log_std = self.net(state).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def draw(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, A) and its log density (N,) with their graph, for states (N, D) and standard normal noise (N, A)."""
        mean, log_std = self(state)
        x = mean + log_std.exp() * noise
        return x.tanh(), squashed_log_prob(x, mean, log_std)

    def best(self, state: Tensor) -> Tensor:
        """tanh(mean) (N, A)."""
        return self(state)[0].tanh()


class Critics(nn.Module):
    """n action values Q_i(s, u), each an MLP with ReLU of its own weights."""

    def __init__(self, count: int, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.count = count
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise((size + actions, *widths, 1)):
            drawn = [nn.Linear(a, b) for _ in range(count)]
            self.weights.append(torch.stack([layer.weight.detach().t() for layer in drawn]))
            self.biases.append(torch.stack([layer.bias.detach()[None] for layer in drawn]))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Q (n, N) of states (N, D) and u (N, A)."""
        x = torch.cat([state, action], -1).expand(self.count, -1, -1)
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            if index < last:
                x = x.relu()
        return x[..., 0]


# --------------------------------------------------------------------------------------------------------- acting


def about(env: str, worlds: Worlds) -> dict[str, Any]:
    """What `build` and `filmed` need to know, for ``Spec.extra``."""
    ends = {"low": worlds.low.tolist(), "high": worlds.high.tolist()}
    return {"env": env, "size": worlds.size, "actions": worlds.actions, **ends}


def replay_of(worlds: Worlds, capacity: int) -> Replay:
    """An empty buffer for the transitions of these worlds; actions are u."""
    return Replay(
        capacity, state=np.zeros(worlds.size, np.float32), action=np.zeros(worlds.actions, np.float32),
        reward=np.float32(0), next_state=np.zeros(worlds.size, np.float32), terminated=False,
    )  # fmt: skip


def gather(worlds: Worlds, replay: Replay, reached: int, act: Callable[[NDArray[np.float32]], NDArray[Any]]) -> None:
    """Act until the worlds have taken `reached` steps, adding every transition; `act` maps states (n, D) to u (n, A)."""
    bounds = Bounds(worlds.low, worlds.high)
    while worlds.steps < reached:
        unit = act(worlds.observation).clip(-1, 1).astype(np.float32)
        row = worlds.step(bounds.world(unit))
        replay.add(
            state=row.state, action=unit[row.world], reward=row.reward, next_state=row.next_state,
            terminated=row.terminated,
        )  # fmt: skip


def acting(actor: DeterministicActor | SquashedGaussian, bounds: Bounds) -> Policy:
    """The best action as a function of states: (N, D) → actions of the world (N, A)."""
    device = next(actor.parameters()).device

    @torch.no_grad()
    def act(state: NDArray[np.float32]) -> NDArray[np.float32]:
        return bounds.world(actor.best(torch.from_numpy(state).to(device)).cpu().numpy())

    return act


def room(config: Any) -> int:
    """Transitions that the buffer can come to hold, for the `steps`, `worlds`, `collect` and `buffer` of a Config.

    Raises UserError where a round's transitions would not fit.
    """
    if config.worlds > config.collect or config.collect > config.buffer:
        raise UserError("--worlds, --collect and --buffer must not fall: worlds <= collect <= buffer")
    rounds = -(-config.steps // config.collect)
    return min(config.buffer, rounds * config.collect + config.worlds)


def sentences(run: Run, config: Any, env: Environment, worlds: Worlds, parameters: int) -> None:
    """Say what is learned, and what a reader of this run must know."""
    run.say(f"{env.name}: {worlds.size} numbers observed, {worlds.actions} in an action; {parameters:,} parameters")
    notes, most = {"restarted_worlds": worlds.note, "environment": env.note}, -(-config.steps // config.collect)
    most *= config.collect
    if not config.updates or most <= config.learning_starts:
        why = f"--learning-starts is {config.learning_starts:,} and the run takes {most:,} environment steps"
        why = why if config.updates else "--updates is 0"
        notes["no_updates"] = f"no update will be made, for {why}; the scores are those of an untrained network"
    for name, note in notes.items():
        if note:
            run.say(note)
            run.artifact(name, note)


def ending(
    run: Run,
    env: Environment,
    config: Any,
    box: Box,
    steps: int,
    policy: Policy,
    value: Callable[[NDArray[np.float32]], NDArray[Any]],
) -> dict[str, float]:
    """What a run returns: fresh episodes by `policy`, and how far `value` (states (N, D) → (N,)) overestimates them."""
    fresh = (config.final_episodes, run.seed, "final evaluation")
    returns, discounted = play(env, policy, *fresh), play(env, policy, *fresh, gamma=config.gamma)
    begun = Worlds.make(env, *fresh, box=True)
    promised = value(begun.observation)
    begun.close()
    return {
        "greedy_return": float(returns.mean()),
        "greedy_return_low": float(returns.min()),
        "overestimation": float((promised - discounted).mean()),
        **({"training_return": float(np.mean(box.recent))} if box.recent else {}),  # no episode may have ended
        "env_steps": float(steps),
        "updates": float(box.updates),
    }


@dataclass(frozen=True)
class Sample:
    count: Count = 1
    """Episodes to play."""
    seed: Whole = 0
    """Seed of the worlds."""


def filmed(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play by the best actions, write each episode as a GIF where it can be drawn, and return the scores."""
    model, extra = loaded.model, loaded.spec.extra
    assert isinstance(model, (DeterministicActor, SquashedGaussian))
    policy = acting(model, Bounds(extra["low"], extra["high"]))
    return films(environment(loaded.config.env), policy, options.count, options.seed, folder)
