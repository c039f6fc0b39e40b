"""Learning rates as pure functions of the step: nothing to save, so a resumed run continues exactly

Paper: Goyal et al., Accurate, Large Minibatch SGD, 2017, arXiv:1706.02677 (linear warm-up); Loshchilov & Hutter, SGDR,
2016, arXiv:1608.03983, equation 5 (cosine); Smith & Topin, Super-Convergence, 2017, arXiv:1708.07120 (one cycle);
Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, equation 3 (inverse root); Huang et al., Snapshot
Ensembles, 2017, arXiv:1704.00109, equation 2 (cyclic).

Equation: `step` is 0 for the first update; `peak` is the largest rate, `total` the number of updates, and
    warm-up        peak (step + 1) / warm                                         while step < warm
    cosine         floor + ½ (peak − floor)(1 + cos(π t / T)),                    t = step − warm, T = total − warm
    inverse root   peak min((step+1)/warm, √(warm/(step+1)))                      Vaswani: peak = (d_model warm)^−½
    snapshots      ½ peak (1 + cos(π (step mod C) / C)),                          C = ⌈total / cycles⌉

Use: `set_lr(optimizer, cosine(step, peak=0.1, total=1000, warm=50))` before each update. Every function is defined for
all step ≥ 0: past `total` it stays at its last value (`snapshots` goes on cycling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from etude.core.errors import UserError, nearest


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every parameter group the rate `lr`; returns it, ready to be logged."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


Schedule = Literal["constant", "linear", "cosine", "one_cycle", "cyclic"]
"""What a `--schedule` flag may say; cyclic is `snapshots`."""


def schedule(name: Schedule, peak: float, total: int, warm: int = 0, cycles: int = 5) -> Callable[[int], float]:
    """The rate as a function of the step alone, for a `--schedule` flag.

    `warm` steps of warm-up come first where the schedule has none of its own (cyclic begins at its peak, so it takes
    none); `cycles` is the number of restarts of cyclic.
    """
    rates: dict[str, Callable[[int], float]] = {
        "constant": lambda step: constant(step, peak, warm),
        "linear": lambda step: linear(step, peak, total, warm),
        "cosine": lambda step: cosine(step, peak, total, warm),
        "one_cycle": lambda step: one_cycle(step, peak, total),
        "cyclic": lambda step: snapshots(step, peak, total, cycles),
    }
    if name not in rates:
        raise UserError(f"unknown schedule {name!r}, choose from {', '.join(rates)}{nearest(name, rates)}")
    return rates[name]


def constant(step: int, peak: float, warm: int = 0) -> float:
    """`peak`, after `warm` steps of linear warm-up."""
    return peak * _rise(step, warm)


def linear(step: int, peak: float, total: int, warm: int = 0, floor: float = 0.0) -> float:
    """Warm up, then fall in a straight line to `floor` at `total`."""
    if step < warm:
        return peak * _rise(step, warm)
    return peak + (floor - peak) * _progress(step, total, warm)


def cosine(step: int, peak: float, total: int, warm: int = 0, floor: float = 0.0) -> float:
    """Warm up, then fall along half a cosine to `floor` at `total`."""
    if step < warm:
        return peak * _rise(step, warm)
    return _half_cosine(peak, floor, _progress(step, total, warm))


def one_cycle(
    step: int, peak: float, total: int, rise: float = 0.3, start_factor: float = 25.0, end_factor: float = 1e4
) -> float:
    """Half a cosine from peak/`start_factor` up to `peak` at `rise` of the way, half a cosine down.

    Ends at peak / (start_factor · end_factor) with step total − 1; the equal of torch's `OneCycleLR`.
    Raises ValueError unless 0 < rise < 1.
    """
    if not 0 < rise < 1:
        raise ValueError(f"rise must be between 0 and 1, got {rise}")
    start = peak / start_factor
    top = rise * total - 1
    if step <= top:
        return _half_cosine(start, peak, step / top if top > 0 else 1.0)
    return _half_cosine(peak, start / end_factor, min(1.0, (step - top) / (total - 1 - top)))


def step_decay(step: int, peak: float, milestones: Sequence[int], factor: float = 0.1, warm: int = 0) -> float:
    """`peak` times `factor` for every milestone reached: the staircase of ResNet's recipe."""
    return peak * _rise(step, warm) * factor ** sum(step >= milestone for milestone in milestones)


def inverse_root(step: int, peak: float, warm: int) -> float:
    """Warm up linearly for `warm` ≥ 1 steps, then fall like 1/√step; both meet at `peak`."""
    _at_least_one("warm", warm)
    return peak * min((step + 1) / warm, math.sqrt(warm / (step + 1)))


def snapshots(step: int, peak: float, total: int, cycles: int) -> float:
    """`cycles` equal cosines that each restart at `peak`; take a snapshot after every step in `snapshot_steps`."""
    cycle = _cycle(total, cycles)
    return _half_cosine(peak, 0.0, step % cycle / cycle)


def snapshot_steps(total: int, cycles: int) -> list[int]:
    """The last step of each cycle within `total`: where the rate is lowest and the model is kept."""
    cycle = _cycle(total, cycles)
    return [min(start + cycle, total) - 1 for start in range(0, total, cycle)]


def _cycle(total: int, cycles: int) -> int:
    _at_least_one("total", total)
    _at_least_one("cycles", cycles)
    return -(-total // cycles)


def _rise(step: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) if warm > 0 else 1.0


def _progress(step: int, total: int, warm: int) -> float:
    """0 at the end of the warm-up, 1 from `total` on."""
    if total <= warm:
        raise ValueError(f"total must be greater than warm, got total={total}, warm={warm}")
    return min(1.0, (step - warm) / (total - warm))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
