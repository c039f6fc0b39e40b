"""A policy and a value, as two networks or as one trunk with two heads (notes 7.4.4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude.rl.parts.mlp import backed, followed
from etude.rl.parts.pixels import convolutions, flat_size
from etude.rl.parts.policies import (
    categorical_draw,
    categorical_entropy,
    categorical_gradient,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_gradient,
    gaussian_log_prob,
    mlp,
)


class ActorCritic(nn.Module):
    """π over A actions and V: `shared` hidden layers with a head for each, or hidden layers of their own (tanh).

    `size` is of a state: D, or (C, H, W) of images, which go through convolutions first (`pixels`; ReLU there and behind).

    Orthogonal initial weights: gain √2 in hidden layers, 0.01 for the policy's last layer (near the uniform policy), 1 for the
    value's; biases 0. It answers what `policies.CategoricalPolicy` answers, and `value`.
    """

    def __init__(self, size: int | Sequence[int], actions: int, widths: Sequence[int], shared: bool = False) -> None:
        super().__init__()
        self.actions, self.shared = actions, shared
        if not isinstance(size, int):
            seen = widths[-1] if widths else flat_size(size)
            self.trunk = convolutions(size, widths) if shared else nn.Identity()
            heads = (mlp(seen, (), outputs, gain) for outputs, gain in ((actions, 0.01), (1, 1.0)))
            self.policy, self.critic = (
                head if shared else nn.Sequential(convolutions(size, widths), head) for head in heads
            )
        elif shared:
            self.trunk = nn.Sequential(mlp(size, widths[:-1], widths[-1], 2**0.5), nn.Tanh())
            self.policy, self.critic = (
                mlp(widths[-1], (), outputs, gain) for outputs, gain in ((actions, 0.01), (1, 1.0))
            )
        else:
            self.trunk = nn.Identity()
            self.policy, self.critic = mlp(size, widths, actions, 0.01), mlp(size, widths, 1, 1.0)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, A) and values (N,) of states (N, D)."""
        seen = self.trunk(state)
        return self.policy(seen), self.critic(seen)[..., 0]

    def value(self, state: Tensor) -> Tensor:
        """Values (N,) of states (N, D)."""
        return self.critic(self.trunk(state))[..., 0]

    def logits(self, state: Tensor) -> Tensor:
        """Logits (N, A) of states (N, D)."""
        return self.policy(self.trunk(state))

    def judge(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a | s), the entropy of π(· | s) and V(s), (N,) each, of states (N, D) and actions (N,) int64."""
        logits, value = self(state)
        return categorical_log_prob(logits, action), categorical_entropy(logits), value

    @torch.no_grad()
    def follow(self, state: Tensor) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """What `forward` says, and all activations of trunk, policy and critic, for `backward`; no graph is recorded."""
        trunk = followed(self.trunk, state)
        policy, critic = followed(self.policy, trunk[-1]), followed(self.critic, trunk[-1])
        return policy[-1], critic[-1][:, 0], [trunk, policy, critic]

    @torch.no_grad()
    def backward(self, kept: list[list[Tensor]], by_logits: Tensor, by_value: Tensor) -> None:
        """Write the gradient of a loss into every parameter's .grad, from its derivatives by logits (N, A) and values (N,)."""
        delta = backed(self.policy, kept[1], by_logits, self.shared)
        other = backed(self.critic, kept[2], by_value[:, None], self.shared)
        if self.shared:
            backed(self.trunk, kept[0], delta + other, False)

    def log_prob(self, said: Tensor, action: Tensor) -> Tensor:
        """log π(a | s) (N,) of what `follow` says of the policy and actions."""
        return categorical_log_prob(said, action)

    def entropy(self, said: Tensor) -> Tensor:
        """H of π(· | s) (N,)."""
        return categorical_entropy(said)

    def slopes(self, said: Tensor, action: Tensor, slope: Tensor, bonus: float) -> Tensor:
        """∂/∂said (N, A) of Σ slope log π(a | s) + bonus Σ H, for slope (N,)."""
        return categorical_gradient(said, action, slope, bonus)

    def noise(self, generator: torch.Generator, count: int) -> Tensor:
        """Uniform numbers in [0, 1), (count,) float64 on the CPU."""
        return torch.rand(count, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def act(self, state: Tensor, noise: Tensor) -> Tensor:
        """Actions (N,) int64 of states (N, D), noise (N,)."""
        return categorical_draw(self._logits(state), noise.to(state.device))

    @torch.no_grad()
    def best(self, state: Tensor) -> Tensor:
        """The most probable actions (N,) of states (N, D)."""
        return self._logits(state).argmax(-1)

    def _logits(self, state: Tensor) -> Tensor:
        return followed(self.policy, followed(self.trunk, state)[-1])[-1]


class GaussianActorCritic(ActorCritic):
    """The same for actions of A numbers: π(a | s) = N(a; mean of s, diag σ²), log σ learned and equal in every state.

    Bounds are the worlds' business: an action is as it was drawn wherever its density is meant.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        actions: int,
        widths: Sequence[int],
        shared: bool = False,
        log_std: float = 0.0,
    ) -> None:
        super().__init__(size, actions, widths, shared)
        self.log_std = nn.Parameter(torch.full((actions,), float(log_std)))

    def judge(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a | s), the entropy of π(· | s) and V(s), (N,) each, of states (N, …) and actions (N, A)."""
        mean, value = self(state)
        entropy = gaussian_entropy(self.log_std).expand(len(state))
        return gaussian_log_prob(mean, self.log_std, action), entropy, value

    @torch.no_grad()
    def log_prob(self, said: Tensor, action: Tensor) -> Tensor:
        """log of the density at a (N,); no graph is recorded."""
        return gaussian_log_prob(said, self.log_std, action)

    @torch.no_grad()
    def entropy(self, said: Tensor) -> Tensor:
        """H of π(· | s) (N,); no graph is recorded."""
        return gaussian_entropy(self.log_std).expand(len(said))

    @torch.no_grad()
    def slopes(self, said: Tensor, action: Tensor, slope: Tensor, bonus: float) -> Tensor:
        """∂/∂mean (N, A) of Σ slope log π(a | s) + bonus Σ H; ∂/∂log σ goes into its .grad."""
        by_mean, by_log_std = gaussian_gradient(said, self.log_std, action, slope, bonus)
        self.log_std.grad.copy_(by_log_std)  # pyright: ignore[reportOptionalMemberAccess]
        return by_mean

    def noise(self, generator: torch.Generator, count: int) -> Tensor:
        """Standard normal numbers (count, A) float32 on the CPU."""
        return torch.randn(count, self.actions, generator=generator)

    @torch.no_grad()
    def act(self, state: Tensor, noise: Tensor) -> Tensor:
        """Actions (N, A) = mean + σ noise of states (N, …), noise (N, A); not clipped to any bounds."""
        mean = self._logits(state)
        return mean + self.log_std.exp() * noise.to(mean)

    @torch.no_grad()
    def best(self, state: Tensor) -> Tensor:
        """Means (N, A) of states (N, …)."""
        return self._logits(state)
