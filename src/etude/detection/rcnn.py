"""R-CNN: every proposed region through a network, judged by linear classifiers

Paper: Girshick, Donahue, Darrell, Malik, Rich feature hierarchies for accurate object detection and semantic segmentation, 2013,
arXiv:1311.2524.

Equation: with φ(r) the features of the warped region r, a linear support vector machine for each class k,
    min_{w_k, b_k} ½ (‖w_k‖² + b_k²) + c Σ_r max(0, 1 − y_rk (w_k·φ(r) + b_k))²,   y_rk = ±1,
and for each class a ridge regression of the code t (`parts.boxes`) of the object's box relative to the region,
    min_{V_k} Σ_r ‖t_r − V_k φ(r)‖² + λ ‖V_k‖².

Algorithm:
1. regions ← selective search in every picture; with a margin of context, warped to `side` × `side` pixels
2. the network learns to say which of C classes or background a region has (IoU ≥ 0.5 is the object's), a quarter at objects
3. φ of all training regions, and of the objects themselves, from the finished network
4. support vector machines: objects' own boxes are positive, regions with IoU < 0.3 with the class's objects negative, others no
   part of it; ridge regressions on regions with IoU ≥ 0.6
5. to detect: scores of all regions, the class's code, non-maximum suppression within each class

Differences:
- E39: the notes say "classification". After the network is trained its own softmax is left away: support vector machines
  score the regions, and regressions move them.
- All negatives take part at once (a picture of ours has some fifty regions); the paper mines hard ones, having two million.
- The machines are solved by Newton's method on the squared hinge (scikit-learn's LinearSVC to nine digits); the paper's hinge
  is not squared. The constant is part of the norm, as in liblinear.
- The network is small and from scratch; the paper's is AlexNet, pretrained on ImageNet. φ is its last hidden layer for both
  (the paper regresses from pool5). A region is warped by interpolation at two points a pixel and direction.
- A score s is reported as 1/(1 + e^(−2s)), so that thresholds mean the same as in the other detectors; the order is kept.

Expect: one core, a minute: 0.954 to 0.965 mAP at IoU 0.5 on digits on a canvas (seeds 0 to 2), by features of an
    untrained network 0.73 to 0.74.
    Blood cells, preset `bccd`: 0.77 mAP at IoU 0.5, 0.38 at 0.75; 0.93 of them in 1,000 proposals (seed 0).
Command: `etude run detection/rcnn --preset bccd`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
from etude.detection.parts import heads, scoring
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.linear import ridge, support_vectors
from etude.detection.parts.regions import roi_align, widened
from etude.detection.parts.scenes import Scene, scenes
from etude.detection.parts.selective_search import proposed, selective_search
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
    proposals: Count = 50
    """Regions of each picture, by selective search."""
    search: Literal["single", "fast"] = "single"
    """Colours that it looks at: the picture's own, or HSV and Lab, which finds more and takes twice as long."""
    side: Count = 32
    """Pixels a side of a warped region; a multiple of 8."""
    context: NonNegative = 0.1
    """Margin around a region, as a share of its sides."""
    regions: Count = 8
    """Regions of each picture that a mini-batch looks at; a quarter of them at objects at most."""
    width: Count = 16
    """Channels of the first layer; every halving of the picture doubles them."""
    head_width: Count = 128
    """Width of the last hidden layer: the features φ."""
    steps: Count = 500
    """Number of parameter updates of the network."""
    batch: Count = 16
    """Pictures in a mini-batch (of each rank)."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of the one-cycle schedule."""
    weight_decay: NonNegative = 5e-4
    """Decoupled weight decay."""
    clip_norm: Positive | None = 5.0
    """Longest gradient; None clips nothing."""
    slack: Positive = 1e-3
    """c: weight of the hinge in the support vector machines."""
    shrink: Positive = 10.0
    """λ of the ridge regressions."""
    least_score: Fraction = 0.05
    """Detections have a score above this."""
    overlap: Probability = 0.3
    """Suppress a box whose IoU with a better one of its class is greater."""
    evaluate_every: Whole = 0
    """Steps between looks at the network's accuracy on validation regions (0: only at the end)."""


PRESETS = {
    "tiny": Config(size=32, examples=40, side=16, width=8, head_width=16, proposals=12, regions=4, steps=6, batch=8),
    "default": Config(evaluate_every=250),
    "bccd": Config(
        data="bccd", size=224, flip=True, proposals=1000, search="fast", side=48, regions=32, steps=1500,
        batch=8, evaluate_every=500,
    ),
}  # fmt: skip

METRICS = {
    "map": "mean over classes of VOC average precision (area under the curve) at IoU 0.5",
    "map_75": "the same at IoU 0.75, where a box must fit closely",
    "recall": "mean over classes of the share of objects that were found with IoU 0.5 at all",
    "proposal_recall": "share of the objects that some proposal overlaps with IoU 0.5",
    "region_accuracy": "share of the regions of a picture whose class (or background) the network's softmax says",
}

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "size": 40,
    "side": 24,
    "clip_norm": 0.05,
    "examples": 32,
    "flip": True,
    "overlap": 0.01,
    "least_score": 0.4,
    "proposals": 5,
    "search": "fast",
    "evaluate_every": 2,
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_map",
        bar=0.95,
        published="VOC 2010: 0.537 mAP with AlexNet (Girshick 2013, table 1), other data and a pretrained network",
        controls=(Control("an untrained network", {"steps": 1, "learning_rate": 1e-9}),),
    ),
)


class RCNN(nn.Module):
    """The network of regions, and the linear classifiers and regressions on its features."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        classes = len(spec.classes)
        self.trunk = Trunk(spec, config.width, 8)
        self.hidden = nn.Linear(self.trunk.channels * (config.side // 8) ** 2, config.head_width)
        self.softmax = nn.Linear(config.head_width, classes + 1)
        self.machines, self.codes = nn.Linear(config.head_width, classes), nn.Linear(config.head_width, 4 * classes)
        for layer in (self.machines, self.codes):  # solved for, not descended
            layer.requires_grad_(False)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def features(self, crops: Tensor) -> Tensor:
        """φ of warped regions (K, C, side, side) in [0, 1] → (K, head_width)."""
        return self.hidden(self.trunk(crops).flatten(1)).relu()

    def forward(self, crops: Tensor) -> Tensor:
        """Warped regions → logits of the classes and, last, background: (K, C + 1)."""
        return self.softmax(self.features(crops))


def warp(x: Tensor, regions: Tensor, side: int, context: float) -> Tensor:
    """Regions (N, R, 4) of pictures uint8 (N, C, S, S) → (N·R, C, side, side) in [0, 1] (line 1)."""
    middle, half = (regions[..., :2] + regions[..., 2:]) / 2, (regions[..., 2:] - regions[..., :2]) / 2
    wider = torch.cat([middle - half * (1 + context), middle + half * (1 + context)], -1)
    return roi_align(x.to(torch.get_default_dtype()) / 255, wider, side, 1.0).flatten(0, 1)


@torch.no_grad()
def described(config: Config, model: nn.Module, x: Tensor, regions: Tensor, batch: int = 32) -> Tensor:
    """φ of every region: pictures (N, C, S, S), regions (N, R, 4) → (N, R, head_width), in eval mode."""
    parts = [
        model.features(warp(a, b, config.side, config.context)).unflatten(0, b.shape[:2])  # type: ignore[operator]
        for a, b in zip(x.split(batch), regions.split(batch))
    ]
    return torch.cat(parts)


def solve(config: Config, model: Any, part: Scene) -> None:
    """Lines 3 and 4: features of all regions and objects, then the machines' and the regressions' weights."""
    classes = model.machines.out_features
    regions = torch.cat([part.proposals, part.boxes], 1)  # type: ignore[list-item]
    phi = described(config, model, part.x, regions).double()
    real = torch.cat([(part.proposals[..., 2:] > part.proposals[..., :2]).all(-1), part.labels >= 0], 1)  # type: ignore[index]
    own = torch.zeros_like(real)
    own[:, len(part.proposals[0]) :] = True  # type: ignore[index]
    kinds = torch.cat([torch.full_like(real[:, : -part.labels.shape[1]], -1, dtype=torch.int64), part.labels], 1)
    overlap = box.iou(regions, part.boxes)
    for k in range(classes):
        near = overlap.masked_fill((part.labels != k)[:, None], 0.0)
        best, owner = near.max(-1)
        positive, negative = own & (kinds == k), real & (best < 0.3)
        used = positive | negative
        sign = torch.where(positive, 1.0, -1.0).double()
        model.machines.weight[k], model.machines.bias[k] = support_vectors(phi[used], sign[used], config.slack)
        close = real & (best >= 0.6)
        target = part.boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        code = box.encode(target[close], regions[close]).double()
        weight, bias = ridge(phi[close], code, config.shrink)
        model.codes.weight[4 * k : 4 * k + 4], model.codes.bias[4 * k : 4 * k + 4] = weight, bias


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (lines 1 and 5): as `scoring.Found`."""
    regions = selective_search(x.cpu(), config.proposals, config.search)[0].to(x.device)
    flat = (regions[..., 2:] <= regions[..., :2]).any(-1, keepdim=True)
    phi = described(config, model, x, regions)
    chance = (2 * model.machines(phi)).sigmoid().masked_fill(flat, 0.0)  # type: ignore[operator]
    codes = model.codes(phi).unflatten(-1, (-1, 4))  # type: ignore[operator]
    anchors = torch.where(flat, regions.new_tensor([0.0, 0.0, 1.0, 1.0]), regions)
    found = box.decode(codes, anchors[:, :, None])
    return pick(box.clip(found, config.size, config.size), chance, config.least_score, config.overlap)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these classes. Raises UserError for a side that is no multiple of 8."""
    if config.side % 8:
        raise UserError(f"--side {config.side} is no multiple of 8, by which the network divides a region")
    return {"model": RCNN(spec, config)}


@method("detection/rcnn", paper="arXiv:1311.2524", section="5.2.2.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.make("adamw", learning, config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule("one_cycle", config.learning_rate, config.steps)
    training = proposed(run, data.train, config.proposals, config.search)  # line 1
    held = proposed(run, data.validation, config.proposals, config.search)
    batch = scoring.batches(run, training, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    kinds = len(data.spec.classes)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        regions = torch.cat([scene.proposals, scene.boxes], 1)
        chosen = heads.chosen_regions(regions, scene, config.regions, 0.25, 0.0, kinds, run.generator("regions", step))
        with run.autocast():
            logits = model(warp(scene.x, chosen.boxes, config.side, config.context))  # line 2
        kind = chosen.kinds.flatten()
        loss = F.cross_entropy(widened(logits), kind, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(learning, config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(validation_region_accuracy=region_accuracy(config, run, model, held, kinds))
        if step + 1 == config.steps:
            model.eval()
            with torch.no_grad():
                solve(config, model, training.to(run.device))  # lines 3 and 4
            model.train()
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    found = scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "test")
    tested = proposed(run, data.test, config.proposals, config.search)
    recall = recall_of(tested.proposals, data.test.boxes, data.test.labels)  # type: ignore[arg-type]
    accuracy = region_accuracy(config, run, model, tested, kinds)
    return {**found, "test_proposal_recall": recall, "test_region_accuracy": accuracy}


@torch.no_grad()
def region_accuracy(config: Config, run: Run, model: nn.Module, part: Scene, classes: int) -> float:
    """Share of a split's regions (16 a picture, drawn) whose class the softmax says, in eval mode; the mode stays as it was."""
    training = model.training
    model.eval()
    dice = run.generator("held regions", 0)
    chosen = heads.chosen_regions(part.proposals, part, 16, 0.5, 0.0, classes, dice)  # type: ignore[arg-type]
    phi = described(config, model, part.x.to(run.device), chosen.boxes.to(run.device))
    said = model.softmax(phi).argmax(-1).cpu()  # type: ignore[operator]
    model.train(training)
    return float((said == chosen.kinds)[chosen.kinds >= 0].double().mean())
