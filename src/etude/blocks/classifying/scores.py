"""What a classifier is worth: loss and accuracy on a split, and the pictures of its mistakes"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from etude.blocks.plots import classifier_pictures
from etude.core import checkpoint
from etude.core.run import Run
from etude.core.scoring import accuracy
from etude.data.sets import Images


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

    `first` is (O, C, h, w), or (O, C·H·W) of a layer that sees whole images.
    """
    whole = checkpoint.state_of(first)  # under --shard every rank holds a part of it
    filters = whole if whole.ndim == 4 else whole.view(len(whole), *data.spec.shape)
    classifier_pictures(run, model, data.test.x, data.test.y, data.spec.classes, filters)
