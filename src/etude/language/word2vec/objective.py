"""The two objectives and their gradients, as sums over the pairs of a batch.

Legend: v (V, D) vectors of centres, u (V, D) vectors of contexts; B centres in a batch, P pairs, K noise words of a pair.
Gradients point uphill (∂ of the log-likelihood). The log-likelihood itself is returned with them.
`negatives`, `spread` and `add` say what `kernels` computes in machine code on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add", "negatives", "shared_noise_terms", "softmax_terms", "spread", "terms"]


def terms(v: Tensor, u: Tensor, centre: Tensor, targets: Tensor, logistic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The terms that belong to single pairs; column 0 of the targets is the context, the others are noise.

    Args:
        v: (B, D) vectors of the centres of a batch; u: (V, D); centre: (P,) rows of v; targets: (P, 1 + K) rows of u.
        logistic: log σ(u_o·v_c) + Σ_k log σ(−u_k·v_c), negative sampling; else u_o·v_c, the softmax's numerator (K = 0).

    Returns:
        the log-likelihood (0-dim, float64), its derivative by each score u·v, (P, 1 + K), and by v, (B, D).
    """
    seen = u[targets.long()]  # (P, 1 + K, D)
    score = (seen @ v[centre.long()].unsqueeze(-1)).squeeze(-1)
    if logistic:
        score = torch.cat([score[:, :1], -score[:, 1:]], 1)
        value = F.logsigmoid(score).double().sum()
        slope = torch.sigmoid(-score)  # 1 − σ(s)
        slope = torch.cat([slope[:, :1], -slope[:, 1:]], 1)
    else:
        value, slope = score.double().sum(), torch.ones_like(score)
    uphill = torch.zeros_like(v).index_add_(0, centre.long(), (slope.unsqueeze(1) @ seen).squeeze(1))
    return value, slope, uphill


def spread(
    into: Tensor, v: Tensor, rows: Tensor, centre: Tensor, targets: Tensor, slope: Tensor, noise: Tensor, by_noise: Tensor,
    rate: Tensor,
) -> None:  # fmt: skip
    """The step of u, in place: into[w] += rate[w] · ∂/∂u_w, which `terms` and `shared_noise_terms` leave to be summed.

    That is slope · v[rows[centre]] for every target w of every pair, and by_noise[m] (B, D) where noise[m] is w; rate (V,).
    """
    place = targets.flatten().long()
    change = slope.unsqueeze(-1) * v[rows[centre.long()].long()].unsqueeze(1)
    into.index_add_(0, place, change.flatten(0, 1) * rate[place].unsqueeze(1))
    add(into, noise, by_noise, rate)


def add(into: Tensor, rows: Tensor, change: Tensor, rate: Tensor) -> None:
    """into[rows[i]] += rate[rows[i]] · change[i], in place; a row may come several times."""
    place = rows.long()
    into.index_add_(0, place, change * rate[place].unsqueeze(1))


def shared_noise_terms(v: Tensor, u: Tensor, noise: Tensor, weight: Tensor, by_v: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over blocks of M centres, these centres i and the block's M noise words m of weight_i·log σ(−u_m·v_i).

    With weight_i = count_i·K/M this is on average what K noise words of their own would give each pair.

    Args:
        v: (B, D) vectors of the centres, block after block; u: (V, D); noise: (B,) rows of u, block after block.
        weight: (B / M, M), of each centre.
        by_v: (B, D), to which the derivative by v is added in place.

    Returns:
        the sum (0-dim), and its derivative by u in the rows that `noise` names (B, D).
    """
    blocks, many = weight.shape
    centres, others = v.view(blocks, many, -1), u[noise.long()].view(blocks, many, -1)
    score, weight = centres @ others.transpose(1, 2), weight.unsqueeze(2)
    value = -(F.softplus(score) * weight).sum()
    slope = torch.sigmoid(score).mul_(-weight)
    by_v.add_((slope @ others).view_as(v))
    return value, (slope.transpose(1, 2) @ centres).view_as(v)


def negatives(
    v: Tensor, u: Tensor, rows: Tensor, centre: Tensor, targets: Tensor, noise: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objective of negative sampling: `terms` of the pairs and, where there are `noise` words, `shared_noise_terms`.

    Args:
        v, u: (V, D); rows: (B,) the centres' words; centre: (P,) places in `rows`, ascending; targets: (P, 1 + K) words;
        noise: (B,) words or (0,); weight: (B / M, M).

    Returns:
        the log-likelihood (0-dim, float64), its derivative by each score of the pairs (P, 1 + K), by v (B, D), and by u in
        the rows that `noise` names, (B, D) or (0, D).
    """
    mine = v[rows.long()]
    value, slope, by_v = terms(mine, u, centre, targets, True)
    if not len(noise):
        return value, slope, by_v, v[:0]
    more, by_noise = shared_noise_terms(mine, u, noise, weight, by_v)
    return value + more, slope, by_v, by_noise


def softmax_terms(v: Tensor, u: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """−Σ over centres of count·log Σ_w exp(u_w·v), the softmax's denominators; the sum runs over the VOCABULARY (E68).

    Args:
        v: (B, D); u: (V, D), all of it; count: (B,) pairs of each centre.

    Returns:
        the sum (0-dim), its derivative by v (B, D) and by u (V, D).
    """
    weight = count.to(v.dtype).unsqueeze(1)
    score = v @ u.t()
    value = -(torch.logsumexp(score, 1, keepdim=True) * weight).sum()
    slope = score.softmax(1).mul_(-weight)
    return value, slope @ u, slope.t() @ v
