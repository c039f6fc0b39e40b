"""Five policies that are learned from what an expert observed and did, behind one module that knows the units.

    Markov          π(a | o): logits of discrete actions, or one action (squared error)
    History         π(a_t | o_1 … o_t): the same behind an LSTM, whose state begins at 0 with every episode
    Mixture         π(a | o) = Σ_k w_k N(a; μ_k, diag σ_k²), w a softmax (Bishop, 1994; E77)
    Latent          π(a | o) = ∫ N(a; μ(o, z), diag σ²) N(z; 0, I) dz, trained by the bound of a conditional VAE
    Autoregressive  π(a | o) = Π_d softmax(f_d(o, a_<d)) over the bins of each number of an action (Metz et al., 2017)

Each has `losses(seen (B, L, S), action (B, L) or (B, L, A), dice) → (B, L)` and `act(seen (n, S), memory, dice) → (action,
memory)`, in units in which observations and continuous actions have mean 0 and deviation 1. `Cloned` holds one of them with
these units. S numbers seen, A numbers in an action (or actions, discrete); everything in the dtype of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from etude.blocks.acting.recording import Policy, Recording

Kind = Literal["markov", "history", "mixture", "latent", "autoregressive"]
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers of these widths with tanh between them: (*, inputs) → (*, outputs)."""
    layers = [part for a, b in pairwise((inputs, *widths, outputs)) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# --------------------------------------------------------------------------------------------------- pure functions


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, diag σ²) summed over the last axis: (*, A) → (*,)."""
    scaled = (action - mean) * (-log_std).exp()
    return -(0.5 * scaled * scaled + log_std + HALF_LOG_TWO_PI).sum(-1)


def mixture_log_prob(logits: Tensor, mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log Σ_k softmax(logits)_k N(a; μ_k, diag σ_k²): logits (*, K), mean and log_std (*, K, A), action (*, A) → (*,).

    Summed as logarithms, so it stays finite where every density is 0 in floating point.
    """
    return (logits.log_softmax(-1) + gaussian_log_prob(mean, log_std, action[..., None, :])).logsumexp(-1)


def above(log_std: Tensor, least: float) -> Tensor:
    """log(σ + least): never below log `least`, with a slope everywhere (a clamp would have none below)."""
    return torch.logaddexp(log_std, torch.full_like(log_std, math.log(least)))


def kl_to_standard(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(μ, diag σ²) ‖ N(0, I)) in nats: (*, Z) → (*,)."""
    return (0.5 * (mean * mean + (2 * log_std).exp() - 1) - log_std).sum(-1)


def to_bins(action: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The number of the bin (*, A) in which each number of an action (*, A) lies; what is outside goes to the end bin."""
    return ((action - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)


def centres(index: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The middle of each bin: at most half a bin away from what lay in it."""
    return low + (index + 0.5) * (high - low) / bins


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values (B, L) where the mask is true: padding is neither in the sum nor in its denominator."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def windows(index: Tensor, ends: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The steps from each `index` (B,) on: numbers (B, L) and a mask, false behind the end of the episode.

    `ends` (N,) as in `Recording.ends`. What is masked repeats the episode's last step.
    """
    number = index[:, None] + torch.arange(length)
    end = ends[index][:, None]
    return torch.minimum(number, end - 1), number < end


# --------------------------------------------------------------------------------------------------------- policies


def _fit(output: Tensor, action: Tensor) -> Tensor:
    """Cross-entropy (*,) of discrete actions (*,), or ½‖a − output‖² of continuous ones (*, A)."""
    if action.dtype == torch.int64:
        return F.cross_entropy(output.flatten(0, -2), action.flatten(), reduction="none").view(action.shape)
    return 0.5 * (action - output).square().sum(-1)


class Markov(nn.Module):
    """One answer to what is seen now: the most probable action, or the mean."""

    def __init__(self, size: int, actions: int, discrete: bool, widths: Sequence[int]) -> None:
        super().__init__()
        self.discrete = discrete
        self.net = mlp(size, widths, actions)

    def losses(self, seen: Tensor, action: Tensor, dice: Generator) -> Tensor:
        return _fit(self.net(seen), action)

    def act(self, seen: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        output = self.net(seen)
        return output.argmax(-1) if self.discrete else output, None


class History(nn.Module):
    """The same of all that was seen since the window, or the episode, began."""

    def __init__(self, size: int, actions: int, discrete: bool, width: int) -> None:
        super().__init__()
        self.discrete = discrete
        self.lstm = nn.LSTM(size, width, batch_first=True)
        self.head = nn.Linear(width, actions)

    def losses(self, seen: Tensor, action: Tensor, dice: Generator) -> Tensor:
        return _fit(self.head(self.lstm(seen)[0]), action)

    def act(self, seen: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        after, memory = self.lstm(seen[:, None], memory)
        output = self.head(after[:, 0])
        return output.argmax(-1) if self.discrete else output, memory


class Mixture(nn.Module):
    """K Gaussians, each with its weight, mean and deviations."""

    def __init__(self, size: int, actions: int, widths: Sequence[int], components: int, least: float) -> None:
        super().__init__()
        self.components, self.actions, self.least = components, actions, least
        self.net = mlp(size, widths, components * (1 + 2 * actions))

    def parts(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the weights (*, K), means and log σ (*, K, A)."""
        k, a = self.components, self.actions
        logits, mean, log_std = self.net(seen).split([k, k * a, k * a], -1)
        return logits, mean.unflatten(-1, (k, a)), above(log_std.unflatten(-1, (k, a)), self.least)

    def losses(self, seen: Tensor, action: Tensor, dice: Generator) -> Tensor:
        return -mixture_log_prob(*self.parts(seen), action)

    def act(self, seen: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        logits, mean, log_std = self.parts(seen)
        uniform = torch.rand(len(seen), 1, generator=dice).to(seen)
        chosen = (uniform >= logits.softmax(-1).cumsum(-1)).sum(-1).clamp(max=self.components - 1)
        row = torch.arange(len(seen), device=seen.device)
        noise = torch.randn(mean[:, 0].shape, generator=dice).to(seen)
        return mean[row, chosen] + log_std[row, chosen].exp() * noise, None


class Latent(nn.Module):
    """A conditional VAE: q(z | o, a) is needed for learning only."""

    def __init__(self, size: int, actions: int, widths: Sequence[int], latent: int, least: float) -> None:
        super().__init__()
        self.latent, self.least = latent, least
        self.encoder = mlp(size + actions, widths, 2 * latent)
        self.decoder = mlp(size + latent, widths, actions)
        self.log_std = nn.Parameter(torch.full((actions,), -1.0))

    def losses(self, seen: Tensor, action: Tensor, dice: Generator) -> Tensor:
        """−E_q[log p(a | o, z)] + KL(q ‖ p), one draw of z: at least −log π(a | o) on average."""
        mean, log_std = self.encoder(torch.cat([seen, action], -1)).chunk(2, -1)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=dice).to(mean)
        made = gaussian_log_prob(self.decoder(torch.cat([seen, z], -1)), above(self.log_std, self.least), action)
        return kl_to_standard(mean, log_std) - made

    def act(self, seen: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        z = torch.randn(len(seen), self.latent, generator=dice).to(seen)
        mean = self.decoder(torch.cat([seen, z], -1))
        noise = torch.randn(mean.shape, generator=dice).to(mean)
        return mean + above(self.log_std, self.least).exp() * noise, None


class Autoregressive(nn.Module):
    """One network a number of the action; it sees the numbers before, as the middles of their bins."""

    low: Tensor
    high: Tensor

    def __init__(self, size: int, actions: int, widths: Sequence[int], bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.nets = nn.ModuleList(mlp(size + d, widths, bins) for d in range(actions))
        self.register_buffer("low", torch.full((actions,), -1.0))
        self.register_buffer("high", torch.full((actions,), 1.0))

    def losses(self, seen: Tensor, action: Tensor, dice: Generator) -> Tensor:
        """−Σ_d log p(bin of a_d | o, bins before it), in nats."""
        index = to_bins(action, self.low, self.high, self.bins)
        before = centres(index, self.low, self.high, self.bins)
        logs = [net(torch.cat([seen, before[..., :d]], -1)).log_softmax(-1) for d, net in enumerate(self.nets)]
        return -sum(log.gather(-1, index[..., d, None])[..., 0] for d, log in enumerate(logs))  # type: ignore[return-value]

    def act(self, seen: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        made = seen[:, :0]
        uniform = torch.rand(len(seen), len(self.nets), generator=dice).to(seen)
        for d, net in enumerate(self.nets):
            rising = net(torch.cat([seen, made], -1)).softmax(-1).cumsum(-1)
            index = (uniform[:, d, None] >= rising).sum(-1, keepdim=True).clamp(max=self.bins - 1)
            made = torch.cat([made, centres(index, self.low[d], self.high[d], self.bins)], -1)
        return made, None


# ------------------------------------------------------------------------------------------------------------- units


class Cloned(nn.Module):
    """A policy with the columns of an observation that it may see and the units of both sides, learnt from the expert."""

    head: Any
    kept: Tensor
    centre: Tensor
    spread: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, head: nn.Module, size: int, actions: int, discrete: bool, masked: Sequence[int] = ()) -> None:
        super().__init__()
        self.head, self.discrete = head, discrete
        kept = [column for column in range(size) if column not in masked]
        numbers = 0 if discrete else actions
        self.register_buffer("kept", torch.tensor(kept))
        self.register_buffer("centre", torch.zeros(len(kept)))
        self.register_buffer("spread", torch.ones(len(kept)))
        self.register_buffer("shift", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))

    def measure(self, recording: Recording) -> None:
        """Take the units (and the range of the bins) from a *training* recording; a constant column keeps its own."""
        seen = torch.from_numpy(recording.observations).to(self.centre)[:, self.kept]
        self.centre.copy_(seen.mean(0))
        self.spread.copy_(_deviation(seen))
        if not self.discrete:
            action = torch.from_numpy(recording.actions).to(self.shift)
            self.shift.copy_(action.mean(0))
            self.scale.copy_(_deviation(action))
            if isinstance(self.head, Autoregressive):
                low, high = ((action - self.shift) / self.scale).aminmax(dim=0)
                self.head.low.copy_(low)
                self.head.high.copy_(torch.maximum(high, low + 1e-3))

    def see(self, observations: Tensor) -> Tensor:
        """(*, D) → (*, S) in the policy's units."""
        return (observations[..., self.kept] - self.centre) / self.spread

    def losses(self, observations: Tensor, action: Tensor, dice: Generator) -> Tensor:
        """(B, L) of observations (B, L, D) and actions (B, L) or (B, L, A), all in the world's units.

        Where the policy has a density this is that of the world's units: −log π(a | o), or its bound (latent).
        """
        if self.discrete:
            return self.head.losses(self.see(observations), action, dice)
        found = self.head.losses(self.see(observations), (action - self.shift) / self.scale, dice)
        return found + self.scale.log().sum() if isinstance(self.head, (Mixture, Latent)) else found

    @torch.no_grad()
    def act(self, observations: Tensor, memory: Any, dice: Generator) -> tuple[Tensor, Any]:
        """Actions (n,) int64 or (n, A) for observations (n, D), and what is remembered (None at an episode's start)."""
        action, memory = self.head.act(self.see(observations), memory, dice)
        return (action if self.discrete else action * self.scale + self.shift), memory


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each column of (N, C), 1 where a column is constant."""
    deviation = x.std(0, correction=0)
    return torch.where(deviation > 1e-6 * (1 + x.abs().amax(0)), deviation, torch.ones_like(deviation))


def actor(model: Cloned, dice: Generator) -> Policy:
    """The policy for one set of episodes, all of which begin with the first call: what it remembers stays in here."""
    memory: Any = None
    device = model.centre.device

    def act(observations: NDArray[np.float32]) -> NDArray[Any]:
        nonlocal memory
        action, memory = model.act(torch.from_numpy(observations).to(device), memory, dice)
        return action.cpu().numpy()

    return act
