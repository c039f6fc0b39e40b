"""A tiny piece for several ranks: it writes down what each rank drew and evaluated

Paper: none.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.classifying.scores import accuracy
from etude.catalog import method
from etude.core.checkpoint import Box
from etude.core.config import Count, Whole
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.batches import Stream

ITEMS = 37  # odd, so that the ranks get unequally many


@dataclass(frozen=True)
class Config:
    steps: Count = 12
    """Number of parameter updates."""
    batch: Count = 8
    """Examples of each rank in a step."""
    at: Whole = 5
    """The step at which `fault` strikes."""
    fault: Literal["none", "nan_loss", "nan_gradient", "terminate"] = "none"
    """What happens on the last rank only."""


PRESETS = {"tiny": Config(), "default": Config()}


class Probe(nn.Module):
    """Pass a batch on and remember its first column."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = [model]  # not a child
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x[:, 0].tolist()
        return self.model[0](x)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    return {"model": nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7, momentum=0.5), nn.Tanh(), nn.Linear(7, 2))}


def everyone(run: Run, value: Any) -> list[Any]:
    """The value of each rank."""
    if run.world == 1:
        return [value]
    values = [None] * run.world
    torch.distributed.all_gather_object(values, value)
    return values


@method("tests/choir", paper="none", section="0", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    draw = torch.Generator().manual_seed(run.seed)
    inputs = torch.randn(ITEMS, 3, generator=draw)
    inputs[:, 0] = torch.arange(ITEMS) / ITEMS
    targets = (inputs.sum(1) > 0).long()
    model = run.place(build(config, Spec())["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    box = Box(drawn=[], array=torch.full((2,), float(run.rank)).numpy())  # each rank's own
    run.track(model=model, optimizer=optimizer, box=box)
    stream = Stream(ITEMS, config.batch, run.seed, run.rank, run.world)
    last = run.rank == run.world - 1
    draws = []
    model[1].eval()  # batch statistics differ between 2 × 8 and 1 × 16 examples
    for step in run.steps(config.steps):
        draws.append(float(F.dropout(torch.linspace(0, 1, 1000), 0.5).sum()))
        box.drawn.append(draws[-1])
        box.array += 1
        index = stream.indices(step)
        loss = F.cross_entropy(model(inputs[index]), targets[index])
        if last and step == config.at and config.fault == "nan_loss":
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        if last and step == config.at and config.fault == "nan_gradient":
            gradient = next(model.parameters()).grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).fill_(float("nan"))
        run.average(model, loss=loss)
        optimizer.step()
        run.log(loss=loss)
        if last and step == config.at and config.fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
    probe = Probe(model)
    scores = accuracy(run, probe, inputs, targets, batch=5)
    statistics = nn.BatchNorm1d(3)  # each rank sees other numbers; the averages must agree
    statistics(torch.randn(16, 3, generator=torch.Generator().manual_seed(run.rank)))
    run.average(statistics)
    means = everyone(run, statistics.running_mean.tolist())
    seen = everyone(run, [round(item * ITEMS) for item in probe.seen])
    kept = everyone(run, [*box.drawn, *box.array.tolist()])
    pids = everyone(run, os.getpid())
    run.artifact("ranks", {"draws": everyone(run, draws), "kept": kept, "seen": seen, "means": means, "pids": pids})
    return scores
