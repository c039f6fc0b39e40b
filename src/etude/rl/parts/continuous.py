"""What learns to act in a box from a replay buffer: actors, critics, and targets that follow slowly.

Actions are u ∈ [−1, 1]^A inside (networks, buffer, noise) and a = middle + half · u in the world: `Bounds` converts.

    DeterministicActor   u = tanh(f_θ(s))
    SquashedGaussian     u = tanh(x), x ~ N(mean_θ(s), diag σ_θ(s)²)
    Critics              n action values Q_φ(s, u)

Their gradients are written out: `act` or `follow` keeps the activations, `learn` turns a slope into every .grad.

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
from etude.rl.parts.mlp import activations, backward, input_slope
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


class MLP(nn.Module):
    """Linear layers of these widths with ReLU between them; its gradient is written out (`etude.rl.parts.mlp`)."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in pairwise((inputs, *widths, outputs))]
        self.layers = nn.ModuleList(layers)
        self.pairs: list[tuple[Tensor, Tensor]] = [(layer.weight, layer.bias) for layer in layers]

    def out(self, x: Tensor) -> Tensor:
        """(N, inputs) → (N, outputs)."""
        return self.follow(x)[-1]

    def follow(self, x: Tensor) -> list[Tensor]:
        """Input, hidden layers and output: (N, width) each."""
        return activations(self.pairs, x)

    def backward(self, kept: list[Tensor], delta: Tensor) -> None:
        """Write ∂L/∂θ into every .grad, which must be there, given ∂L/∂output `delta` (N, outputs)."""
        backward(self.pairs, kept, delta, [(w.grad, b.grad) for w, b in self.pairs])  # pyright: ignore[reportArgumentType]


class DeterministicActor(MLP):
    """u = tanh(f_θ(s))."""

    def __init__(self, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__(size, widths, actions)
        self.actions = actions

    def forward(self, state: Tensor) -> Tensor:
        """u (N, A) of states (N, D)."""
        return self.out(state).tanh()

    best = forward

    def act(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """u (N, A) of states (N, D), and what `learn` needs."""
        kept = self.follow(state)
        kept[-1].tanh_()
        return kept[-1], kept

    def learn(self, kept: list[Tensor], slope: Tensor) -> None:
        """Write ∂L/∂θ into .grad, given ∂L/∂u `slope` (N, A)."""
        self.backward(kept, torch.ops.aten.tanh_backward(slope, kept[-1]))


class SquashedGaussian(MLP):
    """u = tanh(x), x ~ N(mean_θ(s), diag σ_θ(s)²): a density on the open box."""

    def __init__(self, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__(size, widths, 2 * actions)
        self.actions = actions

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """mean and log σ of x, (N, A) each, of states (N, D)."""
        mean, log_std = self.out(state).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def draw(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, A) and its log density (N,), for states (N, D) and standard normal noise (N, A)."""
        mean, log_std = self(state)
        x = mean + log_std.exp() * noise
        return x.tanh(), squashed_log_prob(x, mean, log_std)

    def act(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The same as `draw`, and what `learn` needs."""
        kept = self.follow(state)
        mean, free = kept[-1].chunk(2, -1)
        log_std = free.clamp(*LOG_STD)
        spread = log_std.exp() * noise
        x = mean + spread
        u = x.tanh()
        return u, squashed_log_prob(x, mean, log_std), [*kept, u, spread]

    def learn(self, kept: list[Tensor], slope: Tensor, entropy: Tensor | float) -> None:
        """Write ∂L/∂θ into .grad, given ∂L/∂u `slope` (N, A) and ∂L/∂log π `entropy` (one number for all rows).

        With x = mean + σ ε: ∂log π/∂x = 2u by tanh alone (x − mean stays σ ε), and ∂log π/∂log σ = 2u σ ε − 1.
        """
        *kept, u, spread = kept
        by_x = torch.ops.aten.tanh_backward(slope, u) + 2 * entropy * u
        free = kept[-1][:, u.shape[1] :]
        inside = (free >= LOG_STD[0]) & (free <= LOG_STD[1])
        self.backward(kept, torch.cat([by_x, (by_x * spread - entropy) * inside], 1))

    def best(self, state: Tensor) -> Tensor:
        """tanh(mean) (N, A)."""
        return self(state)[0].tanh()


class Critics(nn.Module):
    """n action values Q_i(s, u), each an MLP of its own weights."""

    def __init__(self, count: int, size: int, actions: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.each = [MLP(size + actions, widths, 1) for _ in range(count)]
        self.nets = nn.ModuleList(self.each)
        self.size = size

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Q (n, N) of states (N, D) and u (N, A)."""
        return self.follow(state, action)[0]

    def follow(self, state: Tensor, action: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Q (n, N), and what `learn` needs."""
        x = torch.cat([state, action], -1)
        kept = [net.follow(x) for net in self.each]
        return torch.stack([layers[-1][:, 0] for layers in kept]), kept

    def learn(self, kept: list[list[Tensor]], delta: Tensor) -> None:
        """Write ∂L/∂φ into .grad, given ∂L/∂Q `delta` (n, N)."""
        for net, layers, d in zip(self.each, kept, delta):
            net.backward(layers, d[:, None])

    def slope(self, state: Tensor, action: Tensor) -> Tensor:
        """∂Q_1/∂u (N, A)."""
        net = self.each[0]
        kept = net.follow(torch.cat([state, action], -1))
        return input_slope(net.pairs, kept, torch.ones_like(kept[-1]))[:, self.size :]

    def least_slope(self, state: Tensor, action: Tensor) -> Tensor:
        """∂/∂u of min_i Q_i (N, A), that of the smaller one in each row."""
        q, kept = self.follow(state, action)
        least = q.argmin(0)
        slopes = [
            input_slope(net.pairs, layers, (least == i).to(q.dtype)[:, None])
            for i, (net, layers) in enumerate(zip(self.each, kept))
        ]
        return torch.stack(slopes).sum(0)[:, self.size :]


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
