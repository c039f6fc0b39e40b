"""Ensembles of classifiers: who the members are, and how their answers become one

Paper: Breiman, Bagging Predictors, 1996 (bootstrap, vote); Lakshminarayanan, Pritzel & Blundell, Simple and Scalable
Predictive Uncertainty Estimation using Deep Ensembles, 2016, arXiv:1612.01474 (initialisations, mean probability); Lee
et al., Why M Heads are Better than One, 2015, arXiv:1511.06314 (shared trunk); Huang et al., Snapshot Ensembles, 2017,
arXiv:1704.00109; Izmailov et al., Averaging Weights Leads to Wider Optima, 2018, arXiv:1803.05407 (weight average).

Equation: with p_j = softmax of member j's logits,
    probability   p(y | x) = (1/M) Σ_j p_j(y | x)        by Jensen −log p(y|x) ≤ (1/M) Σ_j −log p_j(y|x), for every x
    vote          the class that most members put first
    weights       θ̄ = (1/M) Σ_j θ_j, then batch-norm statistics estimated again with θ̄
    the mean of M equally distributed errors of variance σ² and correlation ρ has variance ρσ² + (1 − ρ)σ²/M

Members: `seeds` differ by initial weights and order of the data; `bagging` also by a bootstrap sample; `heads` share a
trunk, which receives the sum of the heads' gradients; `snapshots` are one network at M moments of its training.

Differences:
- E22: M members, drawn *with* replacement from N examples (63.2 % of them occur); they are models, not policies; their
  correlation bounds what averaging can gain.
- E23: snapshots of a decaying rate are all alike, so it must be cyclic or constant; and an average of weights never saw
  the data, so its batch-norm statistics are estimated again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.optim.schedules import snapshot_steps

Kind = Literal["none", "seeds", "bagging", "heads", "snapshots"]
"""What an `--ensemble` flag may say."""
Combine = Literal["probability", "vote", "weights"]
"""What a `--combine` flag may say."""
MEMBERS = 5  # where an ensemble is asked for and no number is given


# -------------------------------------------------------------------------------------------------- combining answers


def mean_log_probability(logits: Tensor) -> Tensor:
    """log (1/M) Σ_j softmax(logits_j), (M, N, C) → (N, C): finite for finite logits, however far apart.

    exp of a row sums to 1, so cross-entropy of it is the ensemble's negative log-likelihood.
    """
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def vote_log_share(logits: Tensor) -> Tensor:
    """log of (votes + 1)/(M + C), (M, N, C) → (N, C): each member votes for its first class.

    Ties, within a member and between classes, go to the lowest class index when the result is read with argmax (the
    rule of scikit-learn's hard `VotingClassifier`). The one added vote (rule of succession) keeps a class without votes
    finite. A vote has no gradient.
    """
    votes = torch.zeros_like(logits[0]).scatter_add_(
        1, logits.argmax(-1).T, torch.ones_like(logits[0, :, :1]).expand(-1, len(logits))
    )
    return ((votes + 1) / (len(logits) + logits.shape[-1])).log()


def combine(logits: Tensor, how: Combine = "probability") -> Tensor:
    """The ensemble's log-probabilities (N, C) of members' logits (M, N, C); averaged weights are no way to combine."""
    if how == "weights":
        raise ValueError("weights are averaged before the forward pass, not combined behind it")
    return vote_log_share(logits) if how == "vote" else mean_log_probability(logits)


class Ensemble(nn.Module):
    """M classifiers as one: images → log-probabilities (N, C), by mean probability or vote.

    `members` are modules with logits (N, C); with a `trunk` they are heads that read its output. Each may have its own
    architecture. `forward(x)` combines; `forward([x_1, …, x_M])` gives each member its own input and returns the raw
    logits (M, N, C), the form in which members are trained (with a trunk: one input for all). Raises ValueError for no
    members or a wrong number of inputs.
    """

    how: Combine
    trunk: nn.Module | None

    def __init__(self, members: Iterable[nn.Module], how: Combine = "probability", trunk: nn.Module | None = None):
        super().__init__()
        self.members, self.trunk, self.how = nn.ModuleList(members), trunk, how
        if not len(self.members):
            raise ValueError("an ensemble needs at least one member")
        if how == "weights":
            raise ValueError("an ensemble combines by probability or vote; Snapshots averages weights")

    def __len__(self) -> int:
        return len(self.members)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return combine(self.each(x), self.how)
        if len(x) != (1 if self.trunk is not None else len(self)):
            raise ValueError(f"{len(x)} inputs for {len(self)} members {'on one trunk' if self.trunk else 'apart'}")
        if self.trunk is not None:
            return self.each(x[0])
        return torch.stack([member(part) for member, part in zip(self.members, x)])

    def each(self, x: Tensor) -> Tensor:
        """Logits of every member for the same images: (N, …) → (M, N, C)."""
        features = x if self.trunk is None else self.trunk(x)
        return torch.stack([member(features) for member in self.members])

    def networks(self) -> list[nn.Module]:
        """Every member as a classifier of images of its own (sharing the trunk, where there is one)."""
        return [member if self.trunk is None else nn.Sequential(self.trunk, member) for member in self.members]

    def extra_repr(self) -> str:
        return f"{len(self)} members, by {self.how}"


def apart(model: nn.Module) -> TypeGuard[Ensemble]:
    """Whether it is an ensemble whose members share nothing, so that each has batches and clipping of its own."""
    return isinstance(model, Ensemble) and model.trunk is None


# ------------------------------------------------------------------------------------------------------ shared trunk


class Cut(NamedTuple):
    """A network in two: images → features → logits."""

    trunk: nn.Module
    head: nn.Module


def split(network: nn.Module, at: str | None = None) -> Cut:
    """Cut a classifier (which is used up) into a trunk and a head, so that head(trunk(x)) is what it computed.

    Without `at` the head is the last linear layer, which must be what the forward pass ends with: true of every
    classifier here. `at` names a child of an `nn.Sequential` that ends the forward pass (``layers.3``): the head is that
    child and those behind it. Raises UserError when there is no such layer, or nothing before it to share.
    """
    if at is None:
        linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        if not linear or not linear[-1]:
            raise UserError(f"{type(network).__name__} does not end in a linear layer that heads could replace")
        home, _, key = linear[-1].rpartition(".")
        parent = network.get_submodule(home)
        head = parent.get_submodule(key)
        setattr(parent, key, nn.Identity())
        return _some(Cut(network, head), linear[-1])
    home, _, key = at.rpartition(".")
    try:
        parent, head = network.get_submodule(home), network.get_submodule(at)
    except AttributeError as error:
        raise UserError(f"{type(network).__name__} has no part '{at}' to split at ({error})") from error
    if not isinstance(parent, nn.Sequential) or not key:
        chains = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Sequential)]
        places = [f"{name}.{child}" for name, part in chains for child, _ in part.named_children()]
        raise UserError(f"'{at}' is not in a Sequential; split at one of {', '.join(places) or 'none'}")
    index = [name for name, _ in parent.named_children()].index(key)
    head = nn.Sequential(*list(parent)[index:])
    del parent[index:]
    return _some(Cut(network, head), at)


def _some(cut: Cut, at: str) -> Cut:
    if not any(True for _ in cut.head.parameters()):
        raise UserError(f"behind '{at}' there is nothing to learn, so heads there would all be one")
    if not any(True for _ in cut.trunk.parameters()):
        raise UserError(f"before '{at}' there is nothing to learn, so heads would share nothing; take --ensemble seeds")
    return cut


def shared_trunk(networks: Sequence[nn.Module], how: Combine = "probability", at: str | None = None) -> Ensemble:
    """The trunk of the first network under the heads of all of them (which are used up): TreeNets."""
    cuts = [split(network, at) for network in networks]
    return Ensemble([cut.head for cut in cuts], how, cuts[0].trunk)


# --------------------------------------------------------------------------------------------------------- bootstrap


def bootstrap(n: int, seed: int, member: int) -> Tensor:
    """The training examples of one member: n draws with replacement from 0 … n−1, int64 (n,), by (seed, member)."""
    return torch.randint(n, (n,), generator=generator(seed, member, 0, "bootstrap"))


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's own streams: the run's for member 0, which is therefore the single network exactly."""
    return fold(seed, member, 0, "member") if member else seed


# ---------------------------------------------------------------------------------------- snapshots, averaged weights


class Snapshots(nn.Module):
    """One network in training; in evaluation the ensemble (or the average) of the snapshots taken of it so far.

    With `how` = ``weights`` it keeps the running mean θ̄ ← θ̄ + (θ − θ̄)/(k + 1) of the parameters, for anything else
    a copy of the network a snapshot, up to `count`. Before the first `take`, evaluation is the network itself.
    """

    taken: Tensor
    how: Combine

    def __init__(self, network: nn.Module, count: int, how: Combine = "probability") -> None:
        super().__init__()
        copies = [copy.deepcopy(network).requires_grad_(False) for _ in range(1 if how == "weights" else count)]
        self.live, self.kept, self.how, self.count = network, nn.ModuleList(copies), how, count
        self.register_buffer("taken", torch.tensor(0))

    @torch.no_grad()
    def take(self) -> None:
        """Keep the network as it is now. Raises ValueError after `count` snapshots."""
        taken = int(self.taken)
        if taken == self.count:
            raise ValueError(f"all {self.count} snapshots are taken")
        if self.how == "weights" and taken:
            for kept, now in zip(self.kept[0].parameters(), self.live.parameters()):
                kept.lerp_(now, 1 / (taken + 1))
            for kept, now in zip(self.kept[0].buffers(), self.live.buffers()):
                kept.copy_(now)
        else:
            self.kept[0 if self.how == "weights" else taken].load_state_dict(self.live.state_dict())
        self.taken += 1

    def networks(self) -> list[nn.Module]:
        """The snapshots so far (their average alone, for ``weights``); the network itself before the first."""
        taken = int(self.taken)
        return list(self.kept)[: 1 if self.how == "weights" else taken] if taken else [self.live]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not int(self.taken):
            return self.live(x)
        if self.how == "weights":
            return self.kept[0](x)
        return combine(torch.stack([network(x) for network in self.networks()]), self.how)

    def extra_repr(self) -> str:
        return f"{self.count} snapshots, by {self.how}"


def snapshot_moments(schedule: str, steps: int, members: int) -> list[int]:
    """The steps after which `members` snapshots are taken.

    cyclic: the last step of every cycle. constant: evenly over the second half, one of them at the end. Raises UserError
    for another schedule, or when there are fewer moments than members.
    """
    if schedule == "cyclic":
        found = snapshot_steps(steps, members)
    elif schedule == "constant":
        gap = max(1, steps // (2 * members))
        found = [step for k in reversed(range(members)) if (step := steps - 1 - k * gap) >= 0]
    else:
        raise UserError(
            f"snapshots of a {schedule} schedule would all be alike; take --schedule cyclic (or constant) with "
            "--ensemble snapshots"
        )
    if len(found) != members:
        raise UserError(f"--steps {steps} has no room for {members} snapshots; take more steps or fewer --members")
    return found


@torch.no_grad()
def average_parameters(networks: Sequence[nn.Module]) -> nn.Module:
    """A new network whose parameters are the mean of the networks' (of one architecture); buffers are the last one's.

    Behind it the batch-norm statistics are wrong: `reestimate` them. Raises ValueError when the shapes differ.
    """
    average = copy.deepcopy(networks[-1])
    for name, parameter in average.named_parameters():
        parts: list[Tensor] = [network.get_parameter(name) for network in networks]
        if any(part.shape != parameter.shape for part in parts):
            raise ValueError(f"{name} has several shapes, so there is no average")
        parameter.copy_(torch.stack(parts).mean(0))
    return average


@torch.no_grad()
def reestimate(network: nn.Module, batches: Callable[[], Iterable[Tensor]], through: nn.Module | None = None) -> bool:
    """Batch-norm statistics of the weights as they now are: one pass in training mode, plain average over the batches.

    Batches count equally, as in `torch.optim.swa_utils.update_bn` (which passes over layers that are not torch's own;
    here both kinds are found), but dropout stays off. `through` is a module around it that is called in its place (and
    in evaluation calls it). Returns whether there was any batch normalisation; without, `batches` is not called.
    """
    layers = [part for part in network.modules() if _has_statistics(part)]
    if not layers:
        return False
    outer = network if through is None else through
    modes = {part: part.training for part in outer.modules()}
    momenta = [layer.momentum for layer in layers]
    outer.eval()
    for layer in layers:
        layer.reset_running_stats()  # pyright: ignore[reportCallIssue]
        layer.momentum = None  # pyright: ignore[reportArgumentType]  # plain average over the batches
        layer.train()
    try:
        for x in batches():
            outer(x)
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for part, training in modes.items():
            part.training = training
    return True


def _has_statistics(part: nn.Module) -> bool:
    return hasattr(part, "reset_running_stats") and getattr(part, "running_mean", None) is not None


# ---------------------------------------------------------------------------------------------------- for the methods


def assemble(
    make: Callable[[], nn.Module], kind: Kind, members: int = 1, how: Combine = "probability", at: str | None = None
) -> nn.Module:
    """The module for an `--ensemble` flag: `make()` is called once a member, in order (once for ``none`` and snapshots).

    The first call sees the random stream as it is, so member 0 starts as the single network does.
    """
    if kind == "none":
        return make()
    if kind == "snapshots":
        return Snapshots(make(), members, how)
    networks = [make() for _ in range(members)]
    return shared_trunk(networks, how, at) if kind == "heads" else Ensemble(networks, how)


def member_networks(model: nn.Module) -> list[nn.Module]:
    """The classifiers inside an ensemble; any other module is its own only member."""
    return model.networks() if isinstance(model, (Ensemble, Snapshots)) else [model]


def first_network(model: nn.Module) -> nn.Module:
    """What holds the first layer: the trunk, else the first member, else the network itself."""
    if isinstance(model, Snapshots):
        return model.live
    if isinstance(model, Ensemble):
        return model.members[0] if model.trunk is None else model.trunk
    return model


# --------------------------------------------------------------------------------------- what an ensemble is worth


class Spread(NamedTuple):
    """The variance formula on data: variance over examples of the error 1 − p(y | x), of one member and of their mean."""

    variance: float
    """σ²: a member's variance, mean over the members."""
    correlation: float
    """ρ: mean covariance of two members over σ² (1 for a single member)."""
    formula: float
    """ρσ² + (1 − ρ)σ²/M."""
    measured: float
    """Variance of the mean error; equal to the formula, whatever the errors are."""


def spread(logits: Tensor, targets: Tensor) -> Spread:
    """How much of the members' errors is their own. logits (M, N, C), targets (N,) int64, N ≥ 2."""
    count = len(logits)
    truth = targets.expand(count, -1)[..., None]
    errors = 1 - logits.double().softmax(-1).gather(-1, truth)[..., 0]  # (M, N)
    covariance = errors.cov(correction=0).reshape(count, count)
    variance = covariance.diagonal().mean()
    pairs = (covariance.sum() - covariance.trace()) / max(count * (count - 1), 1)
    rho = pairs / variance if count > 1 and float(variance) > 0 else torch.ones((), dtype=torch.float64)
    formula = rho * variance + (1 - rho) * variance / count
    return Spread(float(variance), float(rho), float(formula), float(errors.mean(0).var(correction=0)))


def disagreement(logits: Tensor) -> float:
    """Share of examples on which two members differ in their first class, mean over pairs; 0 for one member."""
    taken = logits.argmax(-1)
    count = len(taken)
    if count < 2:
        return 0.0
    differ = sum(float((taken[i] != taken[j]).double().mean()) for i in range(count) for j in range(i))
    return differ / (count * (count - 1) / 2)
