"""Faults that the bars of the GAN files must catch: each stands in for a function of a method while a control runs."""

from __future__ import annotations

from torch import Tensor


def never_falls(sigma: float, step: int, until: float) -> float:
    """For `gan.anneal`: instance noise that stays as it was at the start."""
    return sigma


def descending(real: Tensor, fake: Tensor) -> Tensor:
    """For `wgan.gap`: the sign turned, so that the critic descends what it should ascend (E119)."""
    return fake.mean() - real.mean()


def at_the_data(real: Tensor, fake: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """For `wgan_gp.interpolates`: the penalty is taken at the data, as the notes print it (E120)."""
    return real
