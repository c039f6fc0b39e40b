"""A tiny piece for the tests of the core: a noisy line is fitted by a network with dropout

Paper: none.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from etude.catalog import method
from etude.core.checkpoint import Box
from etude.core.config import Count, Probability, Whole
from etude.core.run import Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    steps: Count = 60
    """Number of parameter updates."""
    batch: Count = 8
    """Examples of each rank in a step."""
    dropout: Probability = 0.2
    """Probability of dropping a hidden unit."""
    widths: tuple[Count, ...] = (8,)
    """Hidden units."""
    data: str = "line"
    """Unused name."""
    at: Whole = 30
    """The step at which `fault` strikes."""
    fault: Literal["none", "nan_loss", "nan_gradient", "nan_log", "nan_result", "error", "stop", "wait", "wait_end"] = (
        "none"
    )
    """What goes wrong, or `stop` for a `break`, or where to wait for a signal."""
    pause: Whole = 0
    """Milliseconds to sleep in a step."""


PRESETS = {"tiny": Config(steps=20), "default": Config()}


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    widths = (4, *config.widths)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh(), nn.Dropout(config.dropout))]
    return {"model": nn.Sequential(*hidden, nn.Linear(widths[-1], 1))}


def wait(run: Run) -> None:
    """Say that the process is ready for a signal and wait for it (PIECE=go: not at all, PIECE=deaf: beyond it)."""
    if os.environ.get("PIECE") != "go":
        print("waiting", flush=True)
        end = time.monotonic() + 300
        while time.monotonic() < end and (os.environ.get("PIECE") == "deaf" or not run._signal):
            time.sleep(0.002)


@method("tests/piece", paper="none", section="0", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    run.describe(Spec(shape=(4,), extra={"pid": 0}))
    model = run.place(build(config, Spec())["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    box = Box(ema=np.float32(0), seen=np.zeros(2, np.int64), history=[], keyed={(1, 2): 0.5})
    run.track(model=model, optimizer=optimizer, box=box)
    run.log(before=1.0)
    for step in run.steps(config.steps):
        # the global batch is a function of (seed, step); each rank takes its slice
        x = torch.randn(config.batch * run.world, 4, generator=torch.Generator().manual_seed(run.seed * 10_000 + step))
        x = x[run.rank * config.batch : (run.rank + 1) * config.batch]
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        if config.fault == "nan_loss" and step == config.at:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        if config.fault == "nan_gradient" and step == config.at:
            next(model.parameters()).grad[0, 0] = float("inf")
        run.average(model, loss=loss)
        optimizer.step()
        box.ema = box.ema * np.float32(0.9) + np.float32(loss.item()) * np.float32(0.1)
        box.seen += run.world * config.batch
        box.history.append(step)
        run.log(loss=loss, ema=float(box.ema), noise=torch.rand(()))
        time.sleep(config.pause / 1000)
        if step == config.at:
            if config.fault == "error":
                raise ZeroDivisionError("the method divided by zero")
            if config.fault == "nan_log":
                run.log(odd=float("nan"))
            if config.fault == "wait":
                wait(run)
            if config.fault == "stop":
                run.log(stopped=1.0)
                break
    if config.fault == "wait_end":
        wait(run)
    run.artifact("history", {"steps": box.history}, caption="steps taken")
    model.eval()
    with torch.no_grad():
        test = F.mse_loss(model(torch.ones(1, 4)), torch.full((1, 1), 4.0))
    run.log(after=float(torch.rand(())))
    if config.fault == "nan_result":
        return {"test_loss": float("nan")}
    return {"test_loss": float(test), "ema": float(box.ema), "seen": float(box.seen[0]), "draw": float(torch.rand(()))}
