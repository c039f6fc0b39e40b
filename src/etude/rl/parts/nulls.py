"""Faults that the experiments of this room put in place of a part of a method: each must miss its bar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unmasked_target(reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """The notes' y = r + γ V(s') (E93): a value stands behind the end of the task too. For `returns.td_target`."""
    return torch.add(reward, next_value, alpha=gamma).detach()


def past_returns(reward: Tensor, gamma: float = 1.0, to_go: bool = True) -> Tensor:
    """Σ_{t' < t} r_t', what an action cannot change any more (7.3.4.1 the wrong way round). For `whole_episodes.returns`."""
    return reward.cumsum(-1) - reward


def unmasked_operator(world: Any, gamma: float) -> Any:
    """r + γ P V, which goes on behind a termination (E93). For `dynamic_programming.operator`."""
    from scipy import sparse

    states, actions, outcomes = world.next_state.shape
    leads, ends = (gamma * world.probability).ravel(), [outcomes * row for row in range(states * actions + 1)]
    matrix = sparse.csr_array((leads, world.next_state.ravel(), ends), (states * actions, states))
    return (world.probability * world.reward).sum(2).ravel(), matrix


def rested(rests: bool, change: float, exact: bool, tolerance: float) -> bool:
    """The policy is the same as before, wherever its values are (E91). For `dynamic_programming.settled`."""
    return rests


def drawn_advantages(segment: Any, value: Any, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages whose signs are drawn, so that they say nothing of the action. For `rollouts.advantages`."""
    from etude.rl.parts.rollouts import advantages

    found, returns = advantages(segment, value, gamma, lam)
    return found.abs() * torch.where(torch.rand_like(found) < 0.5, -1.0, 1.0), returns


def drawn_signs(rows: Any, gamma: float, lam: float) -> Any:
    """The same for `remembered.advantages`."""
    from etude.rl.parts.remembered import advantages

    found, returns = advantages(rows, gamma, lam)
    return abs(found) * torch.where(torch.rand(found.shape) < 0.5, -1.0, 1.0).numpy(), returns


def unmasked_td_targets(reward: Any, terminated: Any, behind: Any, gamma: float) -> Any:
    """y = r + γ V(s') behind a termination too (E93). For `evaluation.td_targets`."""
    return reward + gamma * behind


def deathless(world: Any, gamma: float) -> Any:
    """The world as it was. For `evaluation.with_death`."""
    return world


def unmasked_expected(reward: Any, terminated: Any, probability: Any, behind: Any, gamma: float) -> Any:
    """E[r + γ V(s')] behind a termination too (E93). For `fitted.expected`."""
    return (probability * (reward + gamma * behind)).sum(1)


def best_of_all(data: Any, value: Any, gamma: float) -> Any:
    """y_i is the largest target of any row that has the state s_i, whatever its action (E92). For `fitted.targets`."""
    import numpy as np

    from etude.rl.fitted import expected

    each = expected(data.reward, data.terminated, data.probability, value[data.there], gamma)
    most = np.full(len(data.points), -np.inf)
    np.maximum.at(most, data.here, each)
    return most[data.here]
