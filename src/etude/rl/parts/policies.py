"""Policies and a value as small networks over vectors: tanh between the layers, and noise that is given, not drawn.

    CategoricalPolicy   π(a | s) = softmax(f_θ(s))_a                       actions (N,) int64
    GaussianPolicy      π(a | s) = N(a; f_θ(s), diag σ²), log σ learned    actions (N, A) float, not bounded
    ValueNetwork        V(s) = f_φ(s)

Both policies answer the same questions, so a method need not know which one it has:

    noise = policy.noise(generator, count)     what `act` needs; a function of the generator's key alone
    action = policy.act(state, noise)          a draw of π(· | s); no graph is recorded
    action = policy.best(state)                the most probable action
    log_prob, entropy = policy.judge(state, action)    (N,) each, with their graph

Shapes: N states of D numbers, A actions (categorical) or A numbers in an action (Gaussian). Everything computes in the
dtype of the parameters. `head_gain` None leaves torch's initial weights; a number draws orthogonal ones, √2 for hidden layers
and this gain for the last (0.01 begins near the uniform policy), with biases at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from etude.blocks.nn.init import orthogonal

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def mlp(inputs: int, widths: Sequence[int], outputs: int, head_gain: float | None = None) -> nn.Sequential:
    """Linear layers of these widths with tanh between them: (N, inputs) → (N, outputs)."""
    parts: list[nn.Module] = []
    sizes = (inputs, *widths, outputs)
    for index, (a, b) in enumerate(pairwise(sizes)):
        layer = nn.Linear(a, b)
        if head_gain is not None:
            orthogonal(layer.weight.data, head_gain if index == len(widths) else math.sqrt(2.0))
            nn.init.zeros_(layer.bias)
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts[:-1])


# ------------------------------------------------------------------------------------------------- pure functions


def categorical_draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Actions (*,) int64 with π = softmax(logits) (*, A), for uniform numbers in [0, 1) (*,): the inverse of the CDF.

    Computed in float64. An action of probability 0 (logit −∞) is not drawn.
    """
    rising = logits.double().softmax(-1).cumsum(-1)
    drawn = (uniform.double()[..., None] * rising[..., -1:] >= rising).sum(-1)
    return drawn.clamp_(max=logits.shape[-1] - 1)


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """log π(a | s) (*,) of actions (*,) for logits (*, A); π may be too small for its dtype, its logarithm is not."""
    return logits.log_softmax(-1).gather(-1, action[..., None])[..., 0]


def categorical_entropy(logits: Tensor) -> Tensor:
    """H = −Σ_a π log π (*,) in nats, between 0 and log A; a logit of −∞ adds nothing."""
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi.clamp(min=torch.finfo(log_pi.dtype).min)).sum(-1)


def categorical_gradient(logits: Tensor, action: Tensor, slope: Tensor, bonus: float) -> Tensor:
    """∂/∂logits (N, A) of Σ slope log π(a | s) + bonus Σ H: slope (1_a − π) − bonus π (log π + H), for slope (N,)."""
    log_pi = logits.log_softmax(-1)
    pi = log_pi.exp()
    found = (-slope[:, None] * pi).scatter_add_(1, action[:, None], slope[:, None])
    if bonus:
        log_pi = log_pi.clamp(min=torch.finfo(log_pi.dtype).min)
        found -= bonus * pi * (log_pi - (pi * log_pi).sum(-1, keepdim=True))
    return found


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; mean, diag σ²) summed over the A numbers of an action: (*, A) → (*,); `log_std` broadcasts."""
    scaled = (action - mean) * (-log_std).exp()
    return -(0.5 * scaled * scaled + log_std + HALF_LOG_TWO_PI).sum(-1)


def gaussian_gradient(
    mean: Tensor, log_std: Tensor, action: Tensor, slope: Tensor, bonus: float
) -> tuple[Tensor, Tensor]:
    """∂/∂mean (N, A) and ∂/∂log σ (A,) of Σ slope log π(a | s) + bonus Σ H, for slope (N,): with z = (a − mean)/σ,
    slope z/σ, and Σ slope (z² − 1) + bonus N."""
    inverse = (-log_std).exp()
    scaled = (action - mean) * inverse
    by_mean = slope[:, None] * scaled * inverse
    return by_mean, (slope[:, None] * (scaled * scaled - 1)).sum(0) + bonus * len(mean)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """H = Σ (log σ + ½ log 2πe) (*,) in nats; a density's entropy may be negative."""
    return (log_std + HALF_LOG_TWO_PI + 0.5).sum(-1)


# ------------------------------------------------------------------------------------------------------- networks


class CategoricalPolicy(nn.Module):
    """π over A actions, counted from 0."""

    def __init__(self, size: int, actions: int, widths: Sequence[int], head_gain: float | None = None) -> None:
        super().__init__()
        self.actions = actions
        self.net = mlp(size, widths, actions, head_gain)

    def forward(self, state: Tensor) -> Tensor:
        """Logits (N, A) of states (N, D)."""
        return self.net(state)

    def noise(self, generator: torch.Generator, count: int) -> Tensor:
        """Uniform numbers in [0, 1), (count,) float64 on the CPU."""
        return torch.rand(count, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def act(self, state: Tensor, noise: Tensor) -> Tensor:
        """Actions (N,) int64 of states (N, D), noise (N,)."""
        return categorical_draw(self(state), noise.to(state.device))

    @torch.no_grad()
    def best(self, state: Tensor) -> Tensor:
        """The most probable actions (N,) of states (N, D); the first of equal ones."""
        return self(state).argmax(-1)

    def judge(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a | s) and the entropy of π(· | s), (N,) each, of states (N, D) and actions (N,) int64."""
        logits = self(state)
        return categorical_log_prob(logits, action), categorical_entropy(logits)


class GaussianPolicy(nn.Module):
    """A mean for each of the A numbers of an action, and one log σ for each, the same in every state."""

    def __init__(
        self,
        size: int,
        actions: int,
        widths: Sequence[int],
        head_gain: float | None = None,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.actions = actions
        self.net = mlp(size, widths, actions, head_gain)
        self.log_std = nn.Parameter(torch.full((actions,), float(log_std)))

    def forward(self, state: Tensor) -> Tensor:
        """Means (N, A) of states (N, D)."""
        return self.net(state)

    def noise(self, generator: torch.Generator, count: int) -> Tensor:
        """Standard normal numbers (count, A) float32 on the CPU."""
        return torch.randn(count, self.actions, generator=generator)

    @torch.no_grad()
    def act(self, state: Tensor, noise: Tensor) -> Tensor:
        """Actions (N, A) = mean + σ noise of states (N, D), noise (N, A); not clipped to any bounds."""
        mean = self(state)
        return mean + self.log_std.exp() * noise.to(mean)

    @torch.no_grad()
    def best(self, state: Tensor) -> Tensor:
        """Means (N, A) of states (N, D)."""
        return self(state)

    def judge(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a | s) (a density) and the entropy of π(· | s), (N,) each, of states (N, D) and actions (N, A)."""
        entropy = gaussian_entropy(self.log_std)
        return gaussian_log_prob(self(state), self.log_std, action), entropy.expand(len(state))


class ValueNetwork(nn.Module):
    """V(s): one number for each state."""

    def __init__(self, size: int, widths: Sequence[int], head_gain: float | None = None) -> None:
        super().__init__()
        self.net = mlp(size, widths, 1, head_gain)

    def forward(self, state: Tensor) -> Tensor:
        """Values (N,) of states (N, D)."""
        return self.net(state)[..., 0]
