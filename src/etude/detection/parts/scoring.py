"""What a detector is worth: its detections in a split, their mean average precision, and pictures of them"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from etude.data.batches import Stream
from etude.detection.parts import average_precision
from etude.detection.parts.scenes import Scene, Scenes, flipped
from etude.detection.parts.showing import boxes_drawn, precision_curves

if TYPE_CHECKING:
    from etude.core.run import Run

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes (N, K, 4) in pixels, scores (N, K), classes (N, K): highest score first, class −1 for an empty place."""
Answer = Callable[[Tensor], Found]
"""From pictures, uint8 (N, C, S, S), to what is found in them."""


def batches(run: Run, part: Scene, batch: int, flip: bool) -> Callable[[int], Scene]:
    """The mini-batch of a step, on the run's device, where all pictures lie; mirrored at random with `flip`."""
    stream, placed = Stream(len(part), batch, run.seed, run.rank, run.world), part.to(run.device)

    def at(step: int) -> Scene:
        scene = placed.at(stream.indices(step).to(run.device))
        return flipped(scene, run.generator("mirror", step)) if flip else scene

    return at


@torch.no_grad()
def detections(answer: Answer, x: Tensor, device: torch.device | str = "cpu", batch: int = 128) -> Found:
    """The detections in all pictures, on the CPU, in batches of at most `batch`."""
    parts = [answer(rows.to(device)) for rows in x.split(batch)]
    boxes, scores, classes = (torch.cat([part[n].cpu() for part in parts]) for n in range(3))
    return boxes, scores, classes


def evaluate(
    run: Run, model: nn.Module, answer: Answer, data: Scenes, split: Literal["validation", "test"]
) -> dict[str, float]:
    """`<split>_map`, `<split>_map_75` and `<split>_recall`, in eval mode; the model's mode stays as it was."""
    part, training = {"validation": data.validation, "test": data.test}[split], model.training
    model.eval()
    found = detections(answer, part.x, run.device)
    model.train(training)
    return worth(found, part, split)


def worth(found: Found, part: Scene, split: str) -> dict[str, float]:
    """The numbers of `evaluate` for detections that are already there."""
    loose = average_precision.voc(found, part.boxes, part.labels, part.difficult)
    tight = average_precision.voc(found, part.boxes, part.labels, part.difficult, threshold=0.75)
    recall = sum(loose.recall.values()) / max(1, len(loose.recall))
    return {f"{split}_map": loose.mean, f"{split}_map_75": tight.mean, f"{split}_recall": recall}


def pictures(run: Run, model: nn.Module, answer: Answer, data: Scenes) -> None:
    """Test pictures with their objects and what was found, and the curves of precision over recall."""
    part, training = data.test, model.training
    model.eval()
    few = part.at(torch.arange(min(12, len(part))))
    found = detections(answer, few.x, run.device)
    caption = "test pictures: what was found (class and score) over the objects that are there (pale)"
    run.artifact("detections", boxes_drawn(few, found, data.spec.classes), caption=caption)
    found = detections(answer, part.x, run.device)
    run.artifact(
        "precision_recall",
        precision_curves(found, part, data.spec.classes),
        caption="precision over recall at IoU 0.5, one line a class",
    )
    model.train(training)
