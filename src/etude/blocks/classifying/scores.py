"""What a classifier is worth: loss and accuracy on a split, and the pictures of its mistakes"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.pictures.plots import classifier_pictures
from etude.core import checkpoint
from etude.core.run import Run
from etude.data.sets import Images


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


def evaluate(run: Run, model: nn.Module, data: Images, split: Literal["validation", "test"]) -> dict[str, float]:
    """`<split>_loss` (mean cross-entropy, nats) and `<split>_accuracy`, in eval mode; the model's mode stays as it was.

    Validation is for curves and choices; the test split is scored once, after the loop.
    """
    part, training = {"validation": data.validation, "test": data.test}[split], model.training
    found = accuracy(run, model, part.x, part.y)
    model.train(training)
    return {f"{split}_{name}": value for name, value in found.items()}


def pictures(run: Run, model: nn.Module, data: Images, first: Tensor) -> None:
    """Confusion matrix and surest mistakes on the test split, and the filters of a first layer's weight.

    `first` is (O, C, h, w), or (O, C·H·W) of a layer that sees whole images. Of images on the disk the first 5,000 are looked at.
    """
    whole = checkpoint.state_of(first)  # under --shard every rank holds a part of it
    filters = whole if whole.ndim == 4 else whole.view(len(whole), *data.spec.shape)
    x, y = data.test.x, data.test.y
    if not isinstance(x, Tensor):
        x, y = x[:5000], y[:5000]
    classifier_pictures(run, model, x, y, data.spec.classes, filters)
