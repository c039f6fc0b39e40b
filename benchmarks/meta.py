"""MAML against learn2learn: the same meta-step (second order, adaptation and meta-gradient), at 2 threads.

learn2learn's package pulls in gym, torchvision and compiled data readers; the algorithm itself is two plain Python files, so
only those are imported (`pip install --no-deps learn2learn`). Its loop is the one of its own examples: for each task clone
the learner, adapt on the support, sum the query losses, one backward.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from etude.meta.maml import Convolutional, Regressor, Task, answer, episodes, meta_loss, plain, sinusoids
from race import race, report


def _learn2learn() -> Any:
    """The class `learn2learn.algorithms.maml.MAML`, without the rest of its package."""
    found = importlib.util.find_spec("learn2learn")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("learn2learn is not installed; run: pip install --no-deps learn2learn==0.2.0")
    root = found.submodule_search_locations[0]
    for name, path in (("learn2learn", root), ("learn2learn.algorithms", f"{root}/algorithms")):
        shell = types.ModuleType(name)
        shell.__path__ = [path]
        sys.modules[name] = shell
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def _steps(model: nn.Module, task: Task, loss: Any, rate: float, steps: int, maml: Any) -> tuple[Any, Any]:
    """(our meta-step, theirs) on the same network, tasks and loss; each leaves its gradients in the model."""
    images = task.support_x.ndim > 3
    predict = answer(model, "transductive") if images else plain(model)

    def ours() -> None:
        model.zero_grad()
        meta_loss(model, loss, task, rate, steps, "second", predict).backward()

    def theirs() -> None:
        model.zero_grad()
        learner = maml(model, lr=rate, first_order=False)
        total = torch.zeros(())
        for sx, sy, qx, qy in zip(*task):
            clone = learner.clone()
            for _ in range(steps):
                clone.adapt(loss(clone(sx), sy))
            total = total + loss(clone(qx), qy)
        (total / len(task.support_x)).backward()

    return ours, theirs


def rows() -> list[dict[str, object]]:
    maml = _learn2learn()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dice = torch.Generator().manual_seed(0)
    drawings = torch.randint(0, 256, (64, 20, 28, 28), generator=dice, dtype=torch.uint8)
    problems = (
        ("sinusoid, 25 tasks, 1 inner step", Regressor(40), sinusoids(25, 10, 10, dice)[0], F.mse_loss, 0.01, 1, 20),
        ("sinusoid, 25 tasks, 5 inner steps", Regressor(40), sinusoids(25, 10, 10, dice)[0], F.mse_loss, 0.01, 5, 8),
        ("conv4, 8 tasks 5-way 1-shot, 1 inner step", Convolutional(5, 32), episodes(drawings, 8, 5, 1, 5, dice, False),
         F.cross_entropy, 0.4, 1, 2),
    )  # fmt: skip
    table = []
    for name, model, task, loss, rate, steps, repeat in problems:
        ours, theirs = _steps(model, task, loss, rate, steps, maml)
        ours()
        mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        theirs()
        other = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        scale = max(float(g.abs().max()) for g in other)
        gap = max(float((a - b).abs().max()) for a, b in zip(mine, other)) / scale

        def times(work: Any, repeat: int = repeat) -> Any:
            return lambda: [work() for _ in range(repeat)] and None

        equal = f"meta-gradients differ by {gap:.1e} of the largest"
        table.append(race(name, times(ours), times(theirs), "learn2learn", "0.2.0", 1.3, equal))
        if gap > 1e-5:
            raise SystemExit(f"{name}: the meta-gradients differ by {gap:.1e}, so there is nothing to race")
    return table


if __name__ == "__main__":
    report("meta", rows())
