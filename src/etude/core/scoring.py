"""Loss and accuracy of a classifier over a whole split, on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.core.run import Run


@torch.no_grad()
def accuracy(run: Run, model: nn.Module, inputs: Tensor, targets: Tensor, batch: int = 1000) -> dict[str, float]:
    """Mean cross-entropy (nats) and accuracy over a whole split, in eval mode; over ranks each item is used once.

    The model stays in eval mode.

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
