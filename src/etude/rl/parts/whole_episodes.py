"""Whole episodes under a stochastic policy, and the gradient of each: what Monte Carlo policy gradients learn from.

Arrays are (N, T): N episodes, T steps of the longest. What stands behind the end of an episode is 0 and not alive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import Environment
from etude.blocks.acting.returns import discounted_returns
from etude.blocks.acting.worlds import Worlds
from etude.rl.parts.policies import CategoricalPolicy, GaussianPolicy

Policy = CategoricalPolicy | GaussianPolicy


class Episodes(NamedTuple):
    """N whole episodes."""

    state: Tensor
    """(N, T, D) float32"""
    action: Tensor
    """(N, T) int64, or (N, T, A) float32 where actions are continuous"""
    reward: Tensor
    """(N, T) float32"""
    alive: Tensor
    """(N, T) bool: a step of the episode"""

    @property
    def steps(self) -> int:
        """Environment steps in all."""
        return int(self.alive.sum())

    @property
    def returns(self) -> Tensor:
        """Undiscounted returns (N,) float64."""
        return self.reward.double().sum(1)


def collect(
    env: Environment, policy: Policy, count: int, seed: int, generator: torch.Generator, rank: int = 0
) -> Episodes:
    """Play one episode in each of `count` fresh worlds: a function of (seed, generator's key, rank) and the policy.

    One world an episode: taking the first to finish of fewer worlds would favour short episodes. A world that has
    finished is stepped on with the others, and what happens there is neither kept nor counted. An episode is cut after
    `Environment.limit` steps; as there is no value function, nothing stands for what a time limit cut off.
    """
    worlds = Worlds.make(env, count, seed, "training", rank)
    device = next(policy.parameters()).device
    going = np.ones(count, bool)
    states: list[NDArray[np.float32]] = []
    actions: list[NDArray[Any]] = []
    rewards: list[NDArray[np.float32]] = []
    alive: list[NDArray[np.bool_]] = []
    for _ in range(env.limit()):
        states.append(worlds.observation)
        noise = policy.noise(generator, count)
        actions.append(policy.act(torch.from_numpy(states[-1]).to(device), noise).cpu().numpy())
        row = worlds.step(actions[-1])
        reward = np.zeros(count, np.float32)
        reward[row.world] = row.reward
        rewards.append(np.where(going, reward, np.float32(0)))
        alive.append(going.copy())
        going[row.world[row.terminated | row.truncated]] = False
        if not going.any():
            break
    worlds.close()
    columns: list[list[NDArray[Any]]] = [states, actions, rewards, alive]
    return Episodes(*(torch.from_numpy(np.stack(column, 1)).to(device) for column in columns))


def returns(reward: Tensor, gamma: float = 1.0, to_go: bool = True) -> Tensor:
    """Q̂_t = Σ_{t' ≥ t} γ^(t' − t) r_t' or, not `to_go`, Σ_t' γ^(t' − 1) r_t' at every t: (*, N, T) → (*, N, T).

    Rewards behind the end of an episode are 0.
    """
    time_first = reward.movedim(-1, 0)
    no = torch.zeros_like(time_first, dtype=torch.bool)
    value = discounted_returns(time_first, no, no, torch.zeros_like(time_first), gamma).movedim(0, -1)
    return value if to_go else value[..., :1].expand_as(value)


class Judge(nn.Module):
    """`policy.judge` as a forward pass, for torch.func."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.judge(state, action)


def episode_gradients(
    policy: Policy, state: Tensor, action: Tensor, weight: Tensor, entropy_weight: Tensor | None = None
) -> Tensor:
    """∇_θ Σ_t [w_t log π_θ(a_t | s_t) + c_t H(π_θ(· | s_t))] of each episode by itself: (*, N, P), P all parameters.

    state (*, N, T, D), action (*, N, T, …), weights w and c (*, N, T), constants. The mean over N is the estimate that
    one backward pass over the batch would give; the spread over N is its noise.
    """
    judge = Judge(policy)
    parameters = {name: p.detach() for name, p in judge.named_parameters()}

    def objective(values: dict[str, Tensor], s: Tensor, a: Tensor, w: Tensor, c: Tensor) -> Tensor:
        log_prob, entropy = torch.func.functional_call(judge, values, (s, a))
        return (w * log_prob).sum() + (c * entropy).sum()

    c = torch.zeros_like(weight) if entropy_weight is None else entropy_weight
    each = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0, 0, 0, 0))
    axis, rows = weight.ndim - 1, weight.shape[:-1]
    parts = each(parameters, *(x.reshape(-1, *x.shape[axis:]) for x in (state, action, weight.detach(), c)))
    return torch.cat([parts[name].flatten(1) for name in parameters], 1).unflatten(0, rows)


def put_gradient(policy: nn.Module, vector: Tensor) -> None:
    """Write a vector (P,) into the `.grad` of the parameters, in their order."""
    pieces = vector.split([p.numel() for p in policy.parameters()])
    for parameter, piece in zip(policy.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()
