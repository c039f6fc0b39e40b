"""The one plain supervised loop that classifiers, taggers and segmenters share, and the evaluation beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.core.errors import RunError
from etude.core.run import Run

Batch = tuple[Tensor, Tensor]


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], Batch],
    steps: int,
    *,
    rate: Callable[[int], float] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    clip: Callable[[], object] | None = None,
    after: Callable[[int], object] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> dict[str, float]:
    """Train `model` for `steps` updates and return the last evaluation.

    `batch(step)` gives inputs and targets of a step as a function of the step number; `rate(step)` the learning
    rate; `loss(outputs, targets)` a 0-dim tensor, or one loss a member of an ensemble, (M,): their sum is descended,
    their mean is logged; `clip()` is called between backward and update, `after(step)` behind the update; `evaluate()`
    is called every `evaluate_every` steps and at the end. Tracks ``model`` and ``optimizer``, so it resumes exactly.
    An optimizer with `takes_loss` (Newton) differentiates by itself.
    """
    run.track(model=model, optimizer=optimizer)
    scores: dict[str, float] = {}
    model.train()
    for step in run.steps(steps):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        inputs, targets = batch(step)
        if getattr(optimizer, "takes_loss", False):
            value = _solve(run, optimizer, lambda x=inputs, y=targets: loss(model(x), y))
        else:
            with run.autocast():
                value = loss(model(inputs), targets)
            optimizer.zero_grad()
            if value.ndim:
                value.sum().backward()
                value = value.detach().mean()
            else:
                value.backward()
            run.average(model, loss=value)
            if clip is not None:
                clip()
            optimizer.step()
        if after is not None:
            after(step)
        run.log(loss=value)
        if evaluate is not None and run.every(evaluate_every):
            scores = evaluate()
            model.train()
            run.log(**scores)
    if evaluate is not None and not scores:  # resumed after the last step
        scores = evaluate()
    return scores


def _solve(run: Run, optimizer: Any, loss: Callable[[], Tensor]) -> Tensor:
    """A step of an optimizer that differentiates the loss itself; returns the loss before it."""
    try:
        value = optimizer.step(loss)
    except RuntimeError as error:
        raise RunError(f"the update of step {run.step} was not made: {error}") from error
    run.average(loss=value)
    return value


@torch.no_grad()
def accuracy(run: Run, model: nn.Module, inputs: Tensor, targets: Tensor, batch: int = 1000) -> dict[str, float]:
    """Mean cross-entropy (nats) and accuracy over a whole split, in eval mode; over ranks each item is used once.

    Args:
        inputs: (N, …), targets: (N,) int64, both on the CPU; batches of `batch` go to the run's device.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    # every rank takes equally many turns, so sharded forward passes stay in step; a short rank ends with empty ones
    longest = -(-len(inputs) // run.world)
    for start in range(0, longest, batch):
        index = slice(run.rank + start * run.world, min((start + batch) * run.world, len(inputs)), run.world)
        x, y = inputs[index].to(run.device), targets[index].to(run.device)
        with run.autocast():
            logits = model(x)
        total[0] += float(F.cross_entropy(logits.float(), y, reduction="sum"))
        total[1] += int((logits.argmax(1) == y).sum())
    if run.world > 1:
        torch.distributed.all_reduce(total)
    loss, right = (total / len(inputs)).tolist()
    return {"loss": loss, "accuracy": right}
