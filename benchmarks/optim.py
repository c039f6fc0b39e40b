"""Our optimizers against torch.optim: a large model (the update alone) and a tiny one (a whole training step).

Run `python benchmarks/optim.py`; it writes `results/bench/optim.json`. All times are CPU seconds of one thread
(`time.thread_time`), so the turns of other processes do not count. Every row first checks on fresh copies that both
sides reach the same parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from etude.optim import AdaGrad, Adam, Momentum, RMSProp, flatten
from race import race, report

SHAPES = [(1024, 1024)] * 9 + [(512, 1024)] + [(1024,)] * 10
"""A network of ten layers with 9,971,712 parameters."""

Side = tuple[Callable[[int], float], list[Tensor]]
"""CPU seconds a step as a function of the number of steps to take, and the parameters that these steps change."""


def large(maker: Callable[..., torch.optim.Optimizer], **settings: Any) -> Side:
    """The update alone, of the large model."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer = maker(params, lr=1e-3, **settings)

    def work(steps: int) -> float:
        start = time.thread_time()
        for _ in range(steps):
            optimizer.step()
        return (time.thread_time() - start) / steps

    return work, [parameter.data for parameter in params]


def tiny(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Side:
    """A training step (zero_grad, forward, loss, backward, update) of a 4-64-64-2 MLP on a batch of 32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))
    optimizer = make(model)

    def work(steps: int) -> float:
        start = time.thread_time()
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return (time.thread_time() - start) / steps

    return work, [parameter.data for parameter in model.parameters()]


def contest(
    name: str,
    ours: Callable[[], Side],
    peer: Callable[[], Side],
    peer_name: str,
    bar: float,
    steps: int,
    pairs: int = 25,
) -> dict[str, object]:
    """One row, after 20 steps of both that must agree to 1e-5 (float32)."""
    (run, mine), (peer_run, others) = ours(), peer()
    run(20)
    peer_run(20)
    gap = max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(mine, others, strict=True))
    if gap > 1e-5:
        raise AssertionError(f"{name}: the two sides differ by {gap:.1e} after the same steps")
    equal = f"float32 parameters after 20 steps: largest difference {gap:.1e}"
    return race(
        name, lambda: run(steps), lambda: peer_run(steps), peer_name, torch.__version__, bar, equal, pairs, warmup=2
    )


def rows() -> list[dict[str, object]]:
    """All rows of this room."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        adam = torch.optim.Adam

        def flat() -> Side:
            return tiny(lambda model: Adam([flatten(model)], lr=1e-3))

        def eager(**settings: Any) -> Side:
            return tiny(lambda model: adam(model.parameters(), lr=1e-3, **settings))

        sgd = torch.optim.SGD
        return [
            contest("adam, 10M parameters", lambda: large(Adam), lambda: large(adam, fused=True),
                    "torch.optim.Adam(fused=True)", 0.97, 3, 41),
            contest("momentum, 10M parameters", lambda: large(Momentum), lambda: large(sgd, momentum=0.9, fused=True),
                    "torch.optim.SGD(momentum, fused=True)", 0.97, 3, 41),
            contest("adagrad, 10M parameters", lambda: large(AdaGrad), lambda: large(torch.optim.Adagrad, fused=True),
                    "torch.optim.Adagrad(fused=True)", 0.97, 3, 41),
            contest("rmsprop, 10M parameters", lambda: large(RMSProp), lambda: large(torch.optim.RMSprop),
                    "torch.optim.RMSprop", 1.1, 3, 25),
            contest("adam, training step of a tiny MLP", flat, lambda: eager(foreach=False),
                    "torch.optim.Adam(foreach=False)", 1.8, 200, 41),
            contest("adam, the same against fused", flat, lambda: eager(fused=True),
                    "torch.optim.Adam(fused=True)", 1.2, 200, 41),
        ]  # fmt: skip
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    report("optim", rows())
