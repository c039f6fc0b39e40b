"""Targets and returns: what follows a step, with the end of a task kept apart from the end of a recording.

    terminated  the task is over: nothing follows, the value behind it is 0
    truncated   a time limit (or the end of the data) cut it: the value behind it still counts

Both end the *sum* of an episode; only `terminated` removes the bootstrap. Every function takes the value of the state
truly reached (the last one of the episode, never the first of the next). Notes, sections 7.4-7.6; E93: the notes leave
the terminal mask out of every target. Tensors may have any shape; time is the first axis where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_target(reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """y = r + γ (1 − terminated) V(s'), a constant (no gradient): all shapes (*,), `terminated` boolean."""
    return torch.where(terminated, reward, reward + gamma * next_value).detach()


def lambda_advantages(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    value: Tensor,
    next_value: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantages (T, *): A_t = δ_t + γλ A_{t+1} within an episode, δ_t = y_t − V(s_t).

    Schulman et al., 2015, arXiv:1506.02438, eq. 16. `next_value[t]` is V of the state reached by step t, which at the
    end of an episode is not `value[t + 1]`. λ = 0 gives the one-step error, λ = 1 the return to the end of the episode
    or of the data (with V behind it unless terminated) minus V(s_t). No gradient flows through the result.
    """
    error = td_target(reward, terminated, next_value, gamma) - value.detach()
    goes_on = ~(terminated | truncated)
    advantage = torch.empty_like(error)
    following = torch.zeros_like(error[0])
    for t in range(len(error) - 1, -1, -1):
        following = advantage[t] = error[t] + gamma * lam * (following * goes_on[t])
    return advantage


def discounted_returns(
    reward: Tensor, terminated: Tensor, truncated: Tensor, next_value: Tensor, gamma: float
) -> Tensor:
    """R_t = r_t + γ R_{t+1} (T, *) to the end of the episode; γ V(s') stands in for what was cut off.

    The last row is treated as cut. With next_value = 0 these are the plain Monte Carlo returns.
    """
    cut = truncated.clone()
    cut[-1] = True
    behind = torch.where(cut, next_value, 0.0)  # inside an episode the next return stands there instead
    return lambda_advantages(reward, terminated, truncated, torch.zeros_like(reward), behind, gamma, 1.0)
