"""Faster R-CNN: the network proposes its own regions, from features it has anyway

Paper: Ren, He, Girshick, Sun, Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, 2015,
arXiv:1506.01497.

Equation: at every place of the feature map, k anchors (scales × aspects); of anchor i the network says the chance pᵢ that it
has an object, and the code tᵢ of that object's box relative to it. With p*ᵢ = 1 for an anchor at an object and v its code,
    L_RPN = 1/N Σᵢ [−log pᵢ or −log(1 − pᵢ)] + λ/N Σᵢ p*ᵢ smooth_L1(tᵢ − vᵢ)
    L = L_RPN + L_Fast (classes and boxes of the proposed regions, as in Fast R-CNN)

Algorithm:
1. features ← trunk(x); objectness and codes of all anchors ← a 3 × 3 convolution, then two of 1 × 1
2. anchors with IoU ≥ 0.7 with an object, and the best one of each object, are at it; those below 0.3 are background
3. of 256 anchors a picture, half at objects at most: L_RPN
4. proposals: decode, cut at the picture's edge, the best by objectness, non-maximum suppression at IoU 0.7
5. of the proposals and the objects themselves, 128 a picture, a quarter at objects (IoU ≥ 0.5): pool, two heads, L_Fast
6. descend L; no gradient goes through the proposals' places
7. to detect: 4, the heads on every proposal, then suppression within each class

Differences:
- E40: the notes' network says "if there is an object and its extents". It says k chances and k codes at each place, relative to
  anchors, which objects are given to by IoU; many anchors find one object, so suppression has to follow.
- E39: the regions of Fast R-CNN come from outside; only here do they come from the convolutional map.
- Both losses descend together (the paper's "approximate joint training"), not in four alternating stages.
- An anchor that several objects claim as their best goes to the one it overlaps most; torchvision leaves it with whatever
  object it overlaps most of all, and the claim has no anchor.
- Anchors that cross the picture's edge take part; the paper leaves them out in training. On small pictures most of them cross.
- Trunk: five or six convolutions with batch normalisation, from scratch; the paper's is VGG-16, pretrained on ImageNet.
- The objectness is one logit an anchor; the paper's softmax over two says the same.

Expect: one core, two minutes: 0.92 to 0.94 mAP at IoU 0.5 on digits on a canvas (seeds 0 to 2; another processor 0.946).
    Blood cells, preset `bccd`, eight minutes: 0.80 mAP at IoU 0.5, 0.49 at 0.75; 0.965 of them in 100 proposals (seed 0).
Command: `etude run detection/faster_rcnn --preset bccd`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
from etude.detection.parts import heads, matching, scoring
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.regions import roi_align, roi_pool, widened
from etude.detection.parts.scenes import Scene, scenes
from etude.detection.parts.suppression import pick
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
    stride: Literal[8, 16, 32] = 8
    """Pixels a cell of the feature map."""
    scales: tuple[Positive, ...] = (0.2, 0.35, 0.5)
    """Sides of the square anchors, as shares of the picture's."""
    aspects: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    proposals: Count = 50
    """Regions that go through the heads, of each picture."""
    anchors: Count = 128
    """Anchors of each picture that L_RPN looks at; half of them at objects at most."""
    regions: Count = 48
    """Proposals of each picture that L_Fast looks at; a quarter of them at objects at most."""
    pooling: Literal["align", "max"] = "align"
    """Features of a region: RoIAlign (Mask R-CNN), or max pooling of rounded bins (the paper)."""
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
    """λ of both losses."""
    least_score: Fraction = 0.02
    """Detections have a score above this."""
    overlap: Probability = 0.5
    """Suppress a box whose IoU with a better one of its class is greater."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(
        size=32, examples=48, width=8, head_width=16, bins=3, proposals=12, anchors=32, regions=8, steps=6, batch=8
    ),
    "default": Config(evaluate_every=350),
    "bccd": Config(
        data="bccd", size=224, flip=True, stride=16, scales=(0.1, 0.2, 0.35), proposals=100, anchors=256, regions=64,
        steps=1500, batch=8, evaluate_every=500,
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
    "scales": (0.3,),
    "aspects": (1.0,),
    "clip_norm": 0.05,
    "examples": 40,
    "flip": True,
    "overlap": {"overlap": 0.01, "steps": 80},
    "least_score": {"least_score": 0.3, "steps": 80},
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_map",
        bar=0.925,
        published="VOC 2007: 0.732 mAP with VGG-16 (Ren 2015, table 6), other data and a pretrained network",
        controls=(Control("proposals of other pictures", swap={"propose": "etude.detection.parts.nulls.proposals_of_others"}),),
    ),
    Experiment(
        "blood cells",
        preset="bccd",
        metric="test_map",
        bar=0.77,
        seeds=(0,),
        notes="BCCD, 205 pictures of blood to learn from, three kinds of cells, 72 test pictures",
        controls=(Control("an untrained network", {"steps": 1}),),
    ),
)  # fmt: skip


class Said(NamedTuple):
    """What the region proposal network says of all anchors."""

    objectness: Tensor
    """Logits (N, A)."""
    codes: Tensor
    """(N, A, 4)."""


class FasterRCNN(nn.Module):
    """Trunk, region proposal network, and the two heads of Fast R-CNN on features of one size."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        each = len(config.scales) * len(config.aspects)
        self.trunk = Trunk(spec, config.width, config.stride)
        channels = self.trunk.channels
        self.slide = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness, self.codes = nn.Conv2d(channels, each, 1), nn.Conv2d(channels, 4 * each, 1)
        self.heads = heads.Heads(channels * config.bins**2, config.head_width, len(spec.classes))
        for layer in (self.slide, self.objectness, self.codes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("anchors", anchors(config.size, config.stride, config.scales, config.aspects), False)

    def forward(self, x: Tensor) -> tuple[Tensor, Said]:
        """Pictures (N, C, size, size), uint8 or float in [0, 1] → features (N, F, H, W), and what is said (line 1)."""
        features = self.trunk(x)
        slid = self.slide(features).relu()
        objectness, codes = self.objectness(slid).permute(0, 2, 3, 1), self.codes(slid).permute(0, 2, 3, 1)
        return features, Said(objectness.flatten(1), codes.flatten(1).unflatten(1, (-1, 4)))


def anchors(size: int, stride: int, scales: tuple[float, ...], aspects: tuple[float, ...]) -> Tensor:
    """Anchors (H·W·k, 4) in pixels, centred on the cells, row by row, at each place all aspects of the first scale first.

    An anchor of scale s and aspect a has the area (s · size)² and height / width = a.
    """
    cells = size // stride
    centre = (torch.arange(cells) + 0.5) * stride
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    side = torch.tensor(scales)[:, None] * size
    root = torch.tensor(aspects)[None].sqrt()
    wide, high = (side / root).flatten(), (side * root).flatten()  # (k,)
    half = torch.stack([-wide, -high, wide, high], -1) / 2
    place = torch.stack([x, y, x, y], -1)
    return (place[:, :, None] + half).flatten(0, 2)


def rpn_objective(said: Said, anchors: Tensor, scene: Scene, count: int, weight: float, generator: Any) -> Tensor:
    """L_RPN (lines 2 and 3): 0-dim, mean over the anchors drawn."""
    overlap = box.iou(anchors[None], scene.boxes)
    assigned = matching.assign(overlap, scene.labels, 0.7, 0.3, rescue=True, difficult=scene.difficult)
    index, valid = matching.sample(assigned, count, 0.5, generator)
    owner = assigned.gather(1, index)
    at = (owner >= 0) & valid
    logit = said.objectness.gather(1, index)
    each = F.binary_cross_entropy_with_logits(logit, at.to(logit), reduction="none") * valid
    near = anchors[index]
    target = scene.boxes.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    code = box.encode(torch.where(at[..., None], target, near), near)
    moved = said.codes.gather(1, index[..., None].expand(-1, -1, 4))
    places = heads.smooth_l1(moved - code, 1 / 9).sum(-1) * at
    return (each + weight * places).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def propose(said: Said, anchors: Tensor, size: float, count: int) -> Tensor:
    """The proposals of each picture (line 4): (N, count, 4), best first; empty places are boxes without an area."""
    places = box.clip(box.decode(widened(said.codes), anchors[None]), size, size)
    chance = widened(said.objectness).sigmoid()
    chance = chance.masked_fill(((places[..., 2:] - places[..., :2]) < 1).any(-1), 0.0)  # less than a pixel
    best = chance.topk(min(chance.shape[1], 6 * count), dim=1).indices
    near, score = places.gather(1, best[..., None].expand(-1, -1, 4)), chance.gather(1, best)
    return pick(near, score[..., None], 0.0, 0.7, near.shape[1])[0][:, :count]


def pooled(config: Config, features: Tensor, regions: Tensor) -> Tensor:
    """Features of the regions, (N, F, H, W), (N, R, 4) in pixels → (N·R, F·bins²)."""
    pool = roi_align if config.pooling == "align" else roi_pool
    return pool(features, regions, config.bins, 1 / config.stride).flatten(2).flatten(0, 1)


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (line 7): boxes, scores and classes as `scoring.Found`."""
    features, said = model(x)
    regions = propose(said, model.anchors, config.size, config.proposals)  # type: ignore[arg-type]
    scores, codes = (part.unflatten(0, (len(x), -1)) for part in model.heads(pooled(config, features, regions)))  # type: ignore[operator]
    return heads.answers(scores, codes, regions, config.size, config.least_score, config.overlap)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these classes and anchors. Raises UserError for a size that is no multiple of the stride."""
    if config.size % config.stride:
        raise UserError(f"--size {config.size} is no multiple of --stride {config.stride}, so cells would be cut")
    return {"model": FasterRCNN(spec, config)}


@method("detection/faster_rcnn", paper="arXiv:1506.01497", section="5.2.2.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = optim.make("adamw", model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule("one_cycle", config.learning_rate, config.steps)
    batch = scoring.batches(run, data.train, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    kinds = len(data.spec.classes)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        with run.autocast():
            features, said = model(scene.x)  # line 1
        said = Said(*(widened(part) for part in said))
        dice = run.generator("regions", step)
        rpn = rpn_objective(said, model.anchors, scene, config.anchors, config.box_weight, dice)  # lines 2 and 3
        regions = propose(said, model.anchors, config.size, config.proposals)  # line 4
        regions = torch.cat([regions, scene.boxes], 1)
        chosen = heads.chosen_regions(regions, scene, config.regions, 0.25, 0.0, kinds, dice)  # line 5
        scores, codes = model.heads(pooled(config, features, chosen.boxes))
        fast = heads.objective(scores, codes, chosen.kinds.flatten(), chosen.codes.flatten(0, 1), config.box_weight)
        loss = rpn + fast
        optimizer.zero_grad()
        loss.backward()  # line 6
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss, rpn_loss=rpn)
        if run.every(config.evaluate_every):
            run.log(**scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "validation"))
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    found = scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "test")
    return {**found, "test_proposal_recall": proposal_recall(config, run, model, data.test)}


@torch.no_grad()
def proposal_recall(config: Config, run: Run, model: nn.Module, part: Scene) -> float:
    """Share of a split's objects that some proposal overlaps with IoU 0.5, in eval mode."""
    model.eval()
    made = [
        propose(model(x.to(run.device))[1], model.anchors, config.size, config.proposals) for x in part.x.split(128)
    ]  # type: ignore[arg-type]
    model.train()
    return recall_of(torch.cat(made).cpu(), part.boxes, part.labels)
