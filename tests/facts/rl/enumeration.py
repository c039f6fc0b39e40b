"""A world so small that nothing needs to be sampled: every trajectory is written out, and every expectation is a sum.

Notes 7.1.2 and 7.2 (E76: s_{t+1} depends on s_t and a_t; E79: log p(τ) = log p(s_1) + Σ_t [log π + log p]):

    p_θ(τ) = p(s_1) Π_t π_θ(a_t | s_t) p(s_{t+1} | s_t, a_t),    J(θ) = Σ_τ p_θ(τ) Σ_t γ^(t−1) r(s_t, a_t)

S states, A actions, T steps, M = (S A)^T trajectories, all float64. A test takes it by
``exact = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("enumeration.py"))))``.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch


class World(NamedTuple):
    """A finite world that ends after T steps."""

    start: torch.Tensor  # (S,) p(s_1)
    move: torch.Tensor  # (S, A, S) p(s' | s, a)
    reward: torch.Tensor  # (S, A)
    horizon: int


class Trajectories(NamedTuple):
    """All M of them."""

    state: torch.Tensor  # (M, T) int64
    action: torch.Tensor  # (M, T) int64
    reward: torch.Tensor  # (M, T)
    chance: torch.Tensor  # (M,) the world's part of p(τ): p(s_1) Π_t p(s_{t+1} | s_t, a_t)


def small_world(seed=0, states=2, actions=2, horizon=3):
    """Random probabilities, none of them 0, and random rewards."""
    dice = np.random.default_rng(seed)
    start = dice.dirichlet(np.full(states, 2.0))
    move = dice.dirichlet(np.full(states, 2.0), (states, actions))
    reward = dice.normal(size=(states, actions))
    return World(*(torch.from_numpy(x) for x in (start, move, reward)), horizon)


def small_policy(seed=0, states=2, actions=2):
    """θ (S, A) with a gradient; π(· | s) = softmax(θ_s)."""
    return torch.from_numpy(np.random.default_rng(100 + seed).normal(size=(states, actions))).requires_grad_()


def trajectories(world):
    """Every sequence s_1 a_1 … s_T a_T; their probabilities sum to 1 under any policy."""
    states, actions = world.reward.shape
    pairs = list(itertools.product(range(states), range(actions)))
    every = torch.tensor(list(itertools.product(pairs, repeat=world.horizon)))  # (M, T, 2)
    state, action = every.unbind(-1)
    chance = world.start[state[:, 0]] * world.move[state[:, :-1], action[:, :-1], state[:, 1:]].prod(1)
    return Trajectories(state, action, world.reward[state, action], chance)


def log_probs(theta, every):
    """log π_θ(a_t | s_t) (M, T)."""
    return theta.log_softmax(-1)[every.state, every.action]


def probability(theta, every):
    """p_θ(τ) (M,)."""
    return every.chance * log_probs(theta, every).sum(1).exp()


def objective(world, theta, gamma=1.0):
    """J(θ), 0-dim, with its graph."""
    every = trajectories(world)
    discounts = gamma ** torch.arange(world.horizon, dtype=torch.float64)
    return (probability(theta, every) * (every.reward * discounts).sum(1)).sum()


def gradient(world, theta, gamma=1.0):
    """∇J (S, A) by autograd through the sum over all trajectories."""
    return torch.autograd.grad(objective(world, theta, gamma), theta)[0]


def score(theta, state, action):
    """∇_θ log π_θ(a | s) (*, S, A) of single steps (*,), written out: onehot(s) (onehot(a) − π(· | s))."""
    pi = theta.detach().softmax(-1)
    states, actions = pi.shape
    step = torch.nn.functional.one_hot(action, actions).double() - pi[state]
    return torch.nn.functional.one_hot(state, states).double()[..., None] * step[..., None, :]


def values(world, theta, gamma=1.0):
    """V (T + 1, S) and Q (T, S, A) of π_θ with T − t steps to go, backwards in time; J = Σ_s p(s_1) V_0."""
    pi = theta.detach().softmax(-1)
    value, q = [torch.zeros(len(pi), dtype=torch.float64)], []
    for _ in range(world.horizon):
        q.append(world.reward + gamma * world.move @ value[-1])
        value.append((pi * q[-1]).sum(-1))
    return torch.stack(value[::-1]), torch.stack(q[::-1])


def occupancy(world, theta):
    """p_θ(s_t) (T, S), forwards in time."""
    pi = theta.detach().softmax(-1)
    here = [world.start]
    for _ in range(world.horizon - 1):
        here.append(torch.einsum("s,sa,sab->b", here[-1], pi, world.move))
    return torch.stack(here)


def batches(every, probabilities, count):
    """All M^N batches of N independent trajectories: index (M^N, N) and probability (M^N,)."""
    index = torch.cartesian_prod(*[torch.arange(len(every.chance))] * count).view(-1, count)
    return index, probabilities[index].prod(1)
