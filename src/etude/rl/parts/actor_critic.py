"""A policy and a value, as two networks or as one trunk with two heads (notes 7.4.4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude.rl.parts.mlp import backed, followed
from etude.rl.parts.policies import categorical_draw, categorical_entropy, categorical_log_prob, mlp


class ActorCritic(nn.Module):
    """π over A actions and V: `shared` hidden layers with a head for each, or hidden layers of their own (tanh).

    Orthogonal initial weights: gain √2 in hidden layers, 0.01 for the policy's last layer (near the uniform policy), 1 for the
    value's; biases 0. It answers what `policies.CategoricalPolicy` answers, and `value`.
    """

    def __init__(self, size: int, actions: int, widths: Sequence[int], shared: bool = False) -> None:
        super().__init__()
        self.actions, self.shared = actions, shared
        if shared:
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
