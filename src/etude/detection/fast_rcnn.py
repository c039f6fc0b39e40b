"""Fast R-CNN: one pass over the picture, two heads on the features of every region

Paper: Girshick, Fast R-CNN, 2015, arXiv:1504.08083.

Equation: a region proposed on the picture is projected on the feature map and max-pooled to P × P bins; two heads say p, a
softmax over C classes and background, and the code t^k of the object's box relative to the region, for each class k. For a
region of class u, whose object has the code v,
    L = −log p_u + λ [u is a class] Σ smooth_L1(t^u_i − v_i).

Algorithm:
1. regions ← selective search in every picture, once
2. features ← trunk(x)
3. of a picture's regions 32, a quarter at objects (IoU ≥ 0.5), the others with IoU in [0.1, 0.5) as background
4. pool each one's features; two heads; descend L
5. to detect: the heads on every region, the class's code, non-maximum suppression within each class

Differences:
- E39: the notes take regions "from a convolutional response map" a paragraph after naming selective search. They come from
  the picture and are projected on the map, which is what is pooled.
- Regions and objects both do as regions in training, as in the authors' code.
- Trunk: a few convolutions with batch normalisation, from scratch; the paper's is VGG-16, pretrained on ImageNet. Optimizer:
  AdamW under a one-cycle rate; the paper descends with momentum.
- `--pooling align` reads the map by interpolation (Mask R-CNN's RoIAlign) instead of rounding to whole cells.
- Background is whatever overlaps no object by half, from IoU 0 (`--background-from`); the paper begins at 0.1, which leaves out
  the many regions that touch none.

Expect: one core: 0.845 to 0.848 mAP at IoU 0.5 on digits on a canvas (seeds 0 to 2).
Command: `etude run detection/fast_rcnn --preset bccd`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude import optim
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Fraction, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.detection.parts import heads, scoring
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.regions import roi_align, roi_pool
from etude.detection.parts.scenes import scenes
from etude.detection.parts.selective_search import proposed, selective_search
from etude.detection.parts.trunk import Trunk
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
    proposals: Count = 50
    """Regions of each picture, by selective search."""
    search: Literal["single", "fast"] = "single"
    """Colours that it looks at: the picture's own, or HSV and Lab, which finds more and takes twice as long."""
    stride: Literal[8, 16, 32] = 8
    """Pixels a cell of the feature map."""
    regions: Count = 48
    """Regions of each picture that a mini-batch looks at; a quarter of them at objects at most."""
    background_from: Probability = 0.0
    """Background has at least this IoU with an object (the paper: 0.1)."""
    pooling: Literal["align", "max"] = "max"
    """Features of a region: max pooling of rounded bins (the paper), or RoIAlign (Mask R-CNN)."""
    bins: Count = 5
    """Bins a side of a region's features."""
    width: Count = 16
    """Channels of the first layer; every halving of the picture doubles them."""
    head_width: Count = 128
    """Width of the heads' two hidden layers."""
    steps: Count = 700
    """Number of parameter updates."""
    batch: Count = 16
    """Pictures in a mini-batch (of each rank)."""
    learning_rate: Positive = 5e-3
    """Peak learning rate of the one-cycle schedule."""
    weight_decay: NonNegative = 5e-4
    """Decoupled weight decay."""
    clip_norm: Positive | None = 5.0
    """Longest gradient; None clips nothing."""
    box_weight: NonNegative = 1.0
    """λ: weight of the boxes' places."""
    least_score: Fraction = 0.02
    """Detections have a score above this."""
    overlap: Probability = 0.5
    """Suppress a box whose IoU with a better one of its class is greater."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(size=32, examples=40, width=8, head_width=16, bins=3, proposals=12, regions=8, steps=6, batch=8),
    "default": Config(evaluate_every=350),
    "bccd": Config(
        data="bccd", size=224, flip=True, stride=16, proposals=1000, search="fast", regions=64, steps=1500,
        batch=8, evaluate_every=500,
    ),
}  # fmt: skip

METRICS = {
    "map": "mean over classes of VOC average precision (area under the curve) at IoU 0.5",
    "map_75": "the same at IoU 0.75, where a box must fit closely",
    "recall": "mean over classes of the share of objects that were found with IoU 0.5 at all",
    "proposal_recall": "share of the objects that some proposal overlaps with IoU 0.5",
}

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "size": 40,
    "stride": {"stride": 16},
    "clip_norm": 0.05,
    "examples": 32,
    "flip": True,
    "overlap": 0.01,
    "least_score": 0.2,
    "background_from": 0.3,
    "proposals": 5,
    "search": "fast",
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_map",
        bar=0.82,
        published="VOC 2007: 0.669 mAP with VGG-16 (Girshick 2015, table 1), other data and a pretrained network",
        controls=(
            Control("no region is regressed", {"box_weight": 0.0}),
            Control("proposals of other pictures", swap={"pooled": "etude.detection.parts.nulls.pooled_elsewhere"}),
        ),
    ),
)


class FastRCNN(nn.Module):
    """A trunk, and the two heads on the pooled features of regions."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.trunk = Trunk(spec, config.width, config.stride)
        self.heads = heads.Heads(self.trunk.channels * config.bins**2, config.head_width, len(spec.classes))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (N, C, size, size), uint8 or float in [0, 1] → features (N, F, H, W) (line 2)."""
        return self.trunk(x)


def pooled(config: Config, features: Tensor, regions: Tensor) -> Tensor:
    """Features of the regions: (N, F, H, W), (N, R, 4) in pixels → (N·R, F·bins²) (line 4)."""
    pool = roi_align if config.pooling == "align" else roi_pool
    return pool(features, regions, config.bins, 1 / config.stride).flatten(2).flatten(0, 1)


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (lines 1, 2 and 5): as `scoring.Found`."""
    regions = selective_search(x.cpu(), config.proposals, config.search)[0].to(x.device)
    scores, codes = model.heads(pooled(config, model(x), regions))  # type: ignore[operator]
    scores, codes = (part.unflatten(0, regions.shape[:2]) for part in (scores, codes))
    return heads.answers(scores, codes, regions, config.size, config.least_score, config.overlap)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these classes. Raises UserError for a size that is no multiple of the stride."""
    if config.size % config.stride:
        raise UserError(f"--size {config.size} is no multiple of --stride {config.stride}, so cells would be cut")
    return {"model": FastRCNN(spec, config)}


@method("detection/fast_rcnn", paper="arXiv:1504.08083", section="5.2.2.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = optim.make("adamw", model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule("one_cycle", config.learning_rate, config.steps)
    training = proposed(run, data.train, config.proposals, config.search)  # line 1
    batch = scoring.batches(run, training, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    kinds = len(data.spec.classes)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        with run.autocast():
            features = model(scene.x)  # line 2
        regions = torch.cat([scene.proposals, scene.boxes], 1)
        dice = run.generator("regions", step)
        chosen = heads.chosen_regions(
            regions, scene, config.regions, 0.25, config.background_from, kinds, dice
        )  # line 3
        scores, codes = model.heads(pooled(config, features, chosen.boxes))  # line 4
        loss = heads.objective(scores, codes, chosen.kinds.flatten(), chosen.codes.flatten(0, 1), config.box_weight)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "validation"))
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    found = scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "test")
    regions = selective_search(data.test.x, config.proposals, config.search)[0]
    return {**found, "test_proposal_recall": recall_of(regions, data.test.boxes, data.test.labels)}
