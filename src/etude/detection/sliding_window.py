"""Sliding windows: a classifier looks at every place, in every size and shape

Paper: Viola, Jones, Rapid Object Detection using a Boosted Cascade of Simple Features, 2001; as the baseline in Sermanet et al.,
OverFeat, 2013, arXiv:1312.6229. The classifier has the plan of LeNet (LeCun et al., 1998).

Equation: with w(r) the pixels of window r, brought to `side` × `side`, the chance of each of C classes and of background is
    p(r) = softmax(f(w(r))),   trained by −log p_u(r),  u the class of the object with IoU(r, object) ≥ `positive`, or background
                               where no object has IoU ≥ `negative`;
along an edge of n pixels a window that moves by d has ⌊(n − side)/d⌋ + 1 places, in each scale and aspect.

Algorithm:
1. windows ← all places in the picture resized for every scale and aspect
2. of a picture's windows 32, half at objects at most: descend −log p_u
3. to detect: p of every window; boxes with p_k above a threshold, then non-maximum suppression within each class
4. to localise: the window and class of the greatest p

Differences:
- The notes score windows of the picture; here the picture is resized and the window stays, which gives the same crops.
- E34: the notes' "correct" compares with "dataset predictions". A localisation is right if its class is that of an object *label*
  and its box has IoU ≥ 0.5 with that object's (top-left and bottom-right corners).
- Viola and Jones reject most windows early by a cascade of boosted features; here one small convolutional network sees all.
- No box is moved: a window is as good as the grid of scales and aspects is fine. OverFeat adds a regression.

Expect: one core, a minute: 0.963 to 0.972 of the pictures of digits on a canvas localised (seeds 0 to 2); 0.924 mAP at
    IoU 0.5, 0.17 at IoU 0.75 (seed 0, another processor).
Command: `etude run detection/sliding_window`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Fraction, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.detection.parts import scoring, windows
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.boxes import clip, iou
from etude.detection.parts.regions import widened
from etude.detection.parts.scenes import Scene, scenes
from etude.detection.parts.suppression import pick
from etude.optim import set_lr
from etude.optim.clipping import clip_norm_


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Labelled images to scatter over canvases (digits, mnist, …), bccd, or a folder in VOC, COCO or YOLO form."""
    size: Count = 64
    """Side of the pictures in pixels; others are warped to it."""
    examples: Count | None = None
    """Training pictures; None takes all (3,000 canvases)."""
    objects: Count = 3
    """Most objects on a canvas."""
    flip: bool = False
    """Mirror training pictures at random; not for digits or letters."""
    side: Count = 20
    """Pixels a side of what the classifier sees: 14, 20, 26, 32, …"""
    stride: Count = 4
    """Pixels that the window moves by, in the resized picture."""
    scales: tuple[Positive, ...] = (0.21, 0.27, 0.34, 0.42)
    """Sides of windows (root of the area), as shares of the picture's."""
    aspects: tuple[Positive, ...] = (1.1, 1.8)
    """Height over width of windows."""
    positive: Probability = 0.6
    """A window with this IoU is at the object."""
    negative: Probability = 0.45
    """A window with less IoU with all objects is background."""
    windows: Count = 32
    """Windows of each picture that a mini-batch looks at; half of them at objects at most."""
    width: Count = 16
    """Channels of the first layer; the second has twice as many."""
    head_width: Count = 64
    """Width of the hidden layer."""
    steps: Count = 600
    """Number of parameter updates."""
    batch: Count = 16
    """Pictures in a mini-batch (of each rank)."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of the one-cycle schedule."""
    weight_decay: NonNegative = 5e-4
    """Decoupled weight decay."""
    clip_norm: Positive | None = 5.0
    """Longest gradient; None clips nothing."""
    least_score: Fraction = 0.05
    """Detections have a score above this."""
    overlap: Probability = 0.3
    """Suppress a box whose IoU with a better one of its class is greater."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(
        size=32, examples=40, side=14, scales=(0.35,), aspects=(1.3,), windows=8, width=4, head_width=8, steps=6, batch=8
    ),
    "default": Config(evaluate_every=300),
    "bccd": Config(
        data="bccd", size=224, flip=True, stride=5, scales=(0.09, 0.13, 0.18, 0.25, 0.35), aspects=(0.75, 1.33), windows=64,
        steps=1500, batch=8, evaluate_every=500,
    ),
}  # fmt: skip

METRICS = {
    "map": "mean over classes of VOC average precision (area under the curve) at IoU 0.5",
    "map_75": "the same at IoU 0.75, where a box must fit closely",
    "recall": "mean over classes of the share of objects that were found with IoU 0.5 at all",
    "localisation": "share of the pictures whose best window has the class of an object that it overlaps by IoU 0.5",
    "proposal_recall": "share of the objects that some window overlaps with IoU 0.5",
}

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "size": 40,
    "positive": {"positive": 0.3, "negative": 0.2},
    "side": 20,
    "scales": (0.3,),
    "aspects": (1.0,),
    "clip_norm": 0.05,
    "examples": 32,
    "flip": True,
    "overlap": 0.01,
    "least_score": 0.2,
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_localisation",
        bar=0.9625,
        published="none: the baseline that OverFeat replaces (Sermanet 2013, §2)",
        controls=(Control("an untrained classifier", {"steps": 1, "learning_rate": 1e-9}),),
    ),
)


def all_windows(config: Config) -> windows.Grid:
    """The windows of a picture (line 1)."""
    return windows.grid(config.size, config.side, config.stride, config.scales, config.aspects)


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (lines 1 and 3): boxes, scores and classes as `scoring.Found`."""
    grid = all_windows(config)
    boxes = clip(grid.boxes().to(x.device), config.size, config.size)
    chance = windows_scored(model, x, grid).softmax(-1)[..., :-1]
    return pick(boxes.expand(len(x), -1, 4), chance, config.least_score, config.overlap)


@torch.no_grad()
def windows_scored(model: nn.Module, x: Tensor, grid: windows.Grid, most: int = 1024) -> Tensor:
    """Logits of every window: pictures uint8 (N, C, S, S) → (N, W, C + 1), `most` windows at a time."""
    parts = []
    for level in grid.levels:
        crops = windows.unfolded(windows.resized(x, level), grid.side, grid.stride)  # a view
        each = max(1, most // (crops.shape[1] * crops.shape[2]))
        said = [widened(model(rows.flatten(0, 2))).unflatten(0, (len(rows), -1)) for rows in crops.split(each)]
        parts.append(torch.cat(said))
    return torch.cat(parts, 1)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The classifier of windows. Raises UserError for sides and scales that do not fit, and for limits that collide."""
    windows.fitting(config.side)
    all_windows(config)
    if config.negative > config.positive:
        raise UserError(f"--negative {config.negative} exceeds --positive {config.positive}: a window would be both")
    return {"model": windows.WindowNet(spec, config.side, config.width, config.head_width)}


@method("detection/sliding_window", paper="doi:10.1109/CVPR.2001.990517", section="5.2.1.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = optim.make("adamw", model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule("one_cycle", config.learning_rate, config.steps)
    grid = all_windows(config)  # line 1
    boxes = grid.boxes().to(run.device)
    batch = scoring.batches(run, data.train, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    kinds = len(data.spec.classes)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        dice = run.generator("windows", step)
        overlap = iou(boxes[None], scene.boxes)
        seen = windows.drawn(overlap, scene, config.positive, config.negative, config.windows, kinds, dice)
        with run.autocast():
            logits = model(windows.cut(scene.x, grid, seen.numbers).flatten(0, 1))  # line 2
        loss = F.cross_entropy(widened(logits), seen.kinds.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**worth(config, run, model, data.validation, "validation"))
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    covered = recall_of(
        clip(boxes.cpu(), config.size, config.size).expand(len(data.test), -1, 4), data.test.boxes, data.test.labels
    )
    return {**worth(config, run, model, data.test, "test"), "test_proposal_recall": covered}


@torch.no_grad()
def worth(config: Config, run: Run, model: nn.Module, part: Scene, split: str) -> dict[str, float]:
    """Average precision, recall and localisation (line 4) of a split, in eval mode; the mode stays as it was."""
    training = model.training
    model.eval()
    found = scoring.detections(lambda x: detect(config, model, x), part.x, run.device)
    model.train(training)
    return {**scoring.worth(found, part, split), f"{split}_localisation": windows.localised(found, part)}
