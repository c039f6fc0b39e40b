"""OverFeat: all windows in one convolution, and a box from every place

Paper: Sermanet, Eigen, Zhang, Mathieu, Fergus, LeCun, OverFeat: Integrated Recognition, Localization and Detection using
Convolutional Networks, 2013, arXiv:1312.6229.

Equation: a dense layer on k × k cells of F channels is a k × k convolution of the same weights, the next one a 1 × 1 convolution,
    dense(window at (y, x)) = (w ∗ features)(y, x)  for every window at once,
so p = softmax(scores) and t (`parts.boxes`' code of the object's box relative to the window) come from one pass a scale. Pooling
3 × 3 cells leaves every third place; with all offsets Δy, Δx ∈ {0, 1, 2} *before* it the 9 maps interleave to the fine grid.
    L = −log p_u + λ [u is a class] Σ smooth_L1(t_i − v_i)

Algorithm:
1. of a picture's square windows 32, half at objects at most: u by IoU with the square around the object
2. scores ← dense layers on the window's pooled features; codes ← layers of their own on the same features, held fixed
3. descend L
4. to detect: in each scale one convolution, offset pooling, dense layers as convolutions; a box for every place with p_k above a
   threshold; boxes of a class merge greedily while they match (`parts.merging`)
5. to localise: the merged box of the greatest sum of confidences

Differences:
- E35: the notes average the boxes, weighted by probability. Boxes merge pair by pair, coordinates are averaged and confidences
  added up; and the offsets come before the pooling, which gives the fine grid.
- A window is at an object if it fits the square around it, whatever the object's shape: there is no aspect to slide over. The
  paper has IoU ≥ 0.5 with the box itself, on objects that are less narrow than a digit 1.
- The regression learns while the classifier does, from features that its gradient does not reach; the paper trains it afterwards,
  by ℓ2 and from fixed features, and has one layer of its outputs for each class. Here all classes share it.
- Background is a class; in the paper negatives are mined while it trains.
- Network: two convolutions with batch normalisation, pooled by 2 and by 3 (the paper: five, pooled by 36), from scratch.

Expect: one core, under a minute: 0.967 to 0.975 of the pictures of digits on a canvas localised (seeds 0 to 2); 0.944 mAP at
    IoU 0.5, 0.36 at IoU 0.75 (seed 0).
Command: `etude run detection/overfeat`
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
from etude.detection.parts import boxes as box
from etude.detection.parts import scoring, windows
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.heads import smooth_l1
from etude.detection.parts.merging import merged
from etude.detection.parts.regions import widened
from etude.detection.parts.scenes import Scene, scenes
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
    offsets: bool = True
    """Pool at all nine offsets: a window every 2 pixels of the resized picture, not every 6."""
    scales: tuple[Positive, ...] = (0.27, 0.36, 0.48)
    """Sides of the square windows, as shares of the picture's."""
    positive: Probability = 0.5
    """A window with this IoU with the square around an object is at it."""
    negative: Probability = 0.4
    """A window with less IoU with all objects' squares is background."""
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
    box_weight: NonNegative = 1.0
    """λ: weight of the boxes' places."""
    least_score: Fraction = 0.3
    """Places with a chance above this say a box."""
    match: Positive = 1.0
    """Boxes of a class merge while 1 − IoU plus their distance, in sides, is at most this."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(size=32, examples=40, side=14, scales=(0.45,), windows=8, width=4, head_width=8, steps=6, batch=8),
    "default": Config(evaluate_every=300),
    "bccd": Config(
        data="bccd", size=224, flip=True, scales=(0.1, 0.15, 0.21, 0.29, 0.4), windows=64, steps=1500, batch=8, evaluate_every=500
    ),
}  # fmt: skip

METRICS = {
    "map": "mean over classes of VOC average precision (area under the curve) at IoU 0.5",
    "map_75": "the same at IoU 0.75, where a box must fit closely",
    "recall": "mean over classes of the share of objects that were found with IoU 0.5 at all",
    "localisation": "share of the pictures whose best merged box has the class of an object that it overlaps by IoU 0.5",
    "proposal_recall": "share of the objects that some place's box overlaps with IoU 0.5, whatever its score",
}

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "size": 40,
    "positive": {"positive": 0.3, "negative": 0.2},
    "side": 20,
    "offsets": False,
    "scales": (0.3,),
    "clip_norm": 0.05,
    "examples": 32,
    "flip": True,
    "match": {"match": 0.1, "least_score": 0.02, "steps": 40},
    "least_score": 0.1,
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_localisation",
        bar=0.965,
        published="ILSVRC 2013: 29.9 % localisation error (Sermanet 2013, table 4), other data and a much larger network",
        controls=(Control("no box is regressed", {"box_weight": 0.0}),),
    ),
)


class OverFeat(windows.WindowNet):
    """The classifier of windows, and a regression of boxes on the same features."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__(spec, config.side, config.width, config.head_width)
        self.moves, self.codes = nn.Linear(self.hidden.in_features, config.head_width), nn.Linear(config.head_width, 4)
        nn.init.normal_(self.codes.weight, std=0.01)
        nn.init.zeros_(self.codes.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Windows (K, C, side, side) → logits (K, C + 1), background last, and codes (K, 4) (line 2)."""
        pooled = self.pooled(x)
        return self.scores(self.hidden(pooled).relu()), self.codes(self.moves(pooled.detach()).relu())

    def maps(self, x: Tensor, offsets: bool) -> tuple[Tensor, Tensor]:
        """Pictures (N, C, H, W) → logits (N, rows, columns, C + 1) and codes (N, rows, columns, 4) of all their windows (line 4).

        With `offsets` the windows are 2 pixels apart, without 6. Offset pooling and interleaving are one maximum at every cell
        and convolutions that skip as the pooling does (dilation 3).
        """
        features = self.features(self.standardise(x))
        skip = windows.POOL if offsets else 1
        pooled = F.max_pool2d(features, windows.POOL, windows.POOL // skip)
        shape = (-1, pooled.shape[1], self.cells, self.cells)
        out = []
        for first, last in ((self.hidden, self.scores), (self.moves, self.codes)):
            inner = F.conv2d(pooled, first.weight.view(shape), first.bias, dilation=skip).relu()
            out.append(F.conv2d(inner, last.weight[:, :, None, None], last.bias).permute(0, 2, 3, 1))
        return out[0], out[1]


def all_windows(config: Config) -> windows.Grid:
    """The windows of a picture: those that the offsets give, or every third of them."""
    stride = windows.FINE * (1 if config.offsets else windows.POOL)
    return windows.grid(config.size, config.side, stride, config.scales)


def squares(boxes: Tensor) -> Tensor:
    """The squares around boxes (…, 4): same centre, the longer side."""
    middle = box.centred(boxes)
    return box.cornered(
        torch.cat([middle[..., :2], middle[..., 2:].amax(-1, keepdim=True).expand_as(middle[..., 2:])], -1)
    )


def objective(scores: Tensor, codes: Tensor, kind: Tensor, code: Tensor, weight: float) -> Tensor:
    """L, mean over the windows that count: scores (K, C + 1), codes (K, 4), kind (K,), −1 for none, code (K, 4) → 0-dim."""
    counted = kind >= 0
    each = F.cross_entropy(scores, kind.clamp(min=0), reduction="none") * counted
    at = counted & (kind < scores.shape[1] - 1)
    return (each + weight * smooth_l1(codes - code).sum(-1) * at).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def said(config: Config, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every window of pictures uint8 (N, C, size, size): its box (N, W, 4) and logits (N, W, C + 1)."""
    grid = all_windows(config)
    maps = [model.maps(windows.resized(x, level), config.offsets) for level in grid.levels]  # type: ignore[operator]
    scores, codes = (torch.cat([widened(part[n]).flatten(1, 2) for part in maps], 1) for n in (0, 1))
    return box.clip(box.decode(codes, grid.boxes().to(codes)[None]), config.size, config.size), scores


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (line 4): boxes, scores and classes as `scoring.Found`."""
    places, scores = said(config, model, x)
    return merged(places, scores.softmax(-1)[..., :-1], config.least_score, config.match)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of windows. Raises UserError for sides and scales that do not fit, and for limits that exclude each other."""
    windows.fitting(config.side)
    all_windows(config)
    if config.negative > config.positive:
        raise UserError(f"--negative {config.negative} exceeds --positive {config.positive}: a window would be both")
    return {"model": OverFeat(spec, config)}


@method("detection/overfeat", paper="arXiv:1312.6229", section="5.2.1.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = optim.make("adamw", model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule("one_cycle", config.learning_rate, config.steps)
    grid = all_windows(config)
    boxes = grid.boxes().to(run.device)
    batch = scoring.batches(run, data.train, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    kinds = len(data.spec.classes)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        dice = run.generator("windows", step)
        overlap = box.iou(boxes[None], squares(scene.boxes))
        seen = windows.drawn(overlap, scene, config.positive, config.negative, config.windows, kinds, dice)  # line 1
        with run.autocast():
            scores, codes = model(windows.cut(scene.x, grid, seen.numbers).flatten(0, 1))  # line 2
        near, at = boxes[seen.numbers], ((seen.kinds >= 0) & (seen.kinds < kinds))[..., None]
        target = scene.boxes.gather(1, seen.owner[..., None].expand(-1, -1, 4))
        code = box.encode(torch.where(at, target, near), near).flatten(0, 1)
        loss = objective(widened(scores), widened(codes), seen.kinds.flatten(), code, config.box_weight)
        optimizer.zero_grad()
        loss.backward()  # line 3
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**worth(config, run, model, data.validation, "validation"))
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    return {
        **worth(config, run, model, data.test, "test"),
        "test_proposal_recall": covered(config, run, model, data.test),
    }


@torch.no_grad()
def worth(config: Config, run: Run, model: nn.Module, part: Scene, split: str) -> dict[str, float]:
    """Average precision, recall and localisation (line 5) of a split, in eval mode; the mode stays as it was."""
    training = model.training
    model.eval()
    found = scoring.detections(lambda x: detect(config, model, x), part.x, run.device)
    model.train(training)
    return {**scoring.worth(found, part, split), f"{split}_localisation": windows.localised(found, part)}


def covered(config: Config, run: Run, model: nn.Module, part: Scene) -> float:
    """Share of a split's objects that the box of some place overlaps with IoU 0.5, in eval mode."""
    model.eval()
    made = [said(config, model, x.to(run.device))[0].cpu() for x in part.x.split(32)]
    model.train()
    return recall_of(torch.cat(made), part.boxes, part.labels)
