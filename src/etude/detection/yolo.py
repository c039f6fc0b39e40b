"""YOLO: one pass says for each cell of a grid which boxes are there, and what

Paper: Redmon, Divvala, Girshick, Farhadi, You Only Look Once: Unified, Real-Time Object Detection, 2015, arXiv:1506.02640.

Equation: for each cell i of an S × S grid the network says B boxes (x, y in units of the cell, √w, √h of the picture's side,
and a confidence c) and, once a cell, C class probabilities p: S × S × (5B + C) numbers. With 1ᵢ for a cell that holds the
centre of an object and 1ᵢⱼ for that one of its boxes which overlaps the object most,
    L = λ_coord Σ 1ᵢⱼ [(x − x̂)² + (y − ŷ)² + (√w − √ŵ)² + (√h − √ĥ)²]
        + Σ 1ᵢⱼ (c − IoU)² + λ_noobj Σ (1 − 1ᵢⱼ) c² + Σᵢ 1ᵢ Σ_k (p_k − p̂_k)²
    score of class k for box j of cell i = p_k · c.

Algorithm:
1. each object is given to the cell that holds its centre; of several in one cell the first is kept
2. out ← network(x), for every cell B boxes with confidences, and C class probabilities
3. of the cell's B boxes the one of highest IoU with the object is responsible; its confidence is to be that IoU
4. descend L, summed over a picture's cells and averaged over the mini-batch
5. to detect: boxes with p_k · c above a threshold, then non-maximum suppression within each class

Differences:
- E37: the notes give each of the B boxes a class label. Class probabilities are said once a cell (7 × 7 × 30 for B = 2 and 20
  classes, not 7 × 7 × 50); a box's score is Pr(class | object) times its confidence.
- E38: the notes make the cell of highest IoU responsible. It is the cell that holds the object's *centre*; the highest IoU
  decides among the B boxes of that cell. Non-maximum suppression comes after the threshold on scores.
- Network: a small convolutional trunk with batch normalisation and a convolution on top. The paper has 24 layers pretrained on
  ImageNet, two dense layers and dropout; that head ties the network to one grid and has most of its weights.
- As in the authors' code the network says √w and √h themselves, so the gradient at a box of no width is finite, and the loss
  is a plain sum of squares with a target that no gradient flows through (the IoU in line 3).
- Optimizer: AdamW under a one-cycle rate, without pretraining; the paper descends with momentum for 135 epochs of VOC.
  Augmentation: mirroring where the data may be mirrored (`--flip`); the paper also scales, shifts and changes colours.

Expect: one core, 25 s: 0.93 to 0.94 mAP at IoU 0.5 on digits on a canvas, 0.67 to 0.75 at IoU 0.75.
    Blood cells, preset `bccd`, five minutes: 0.63 mAP at IoU 0.5 (seed 0); on an H100 0.61, in 22 s.
Command: `etude run detection/yolo --preset bccd`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from etude import optim
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Fraction, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.detection.parts import scoring
from etude.detection.parts.boxes import cornered, paired_iou
from etude.detection.parts.scenes import scenes
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
    """Pixels of a grid cell: S = size / stride."""
    boxes: Count = 2
    """Boxes that each cell says (B)."""
    width: Count = 16
    """Channels of the first layer; every halving of the picture doubles them."""
    deeper: Whole = 2
    """Layers at the resolution of the grid."""
    steps: Count = 500
    """Number of parameter updates."""
    batch: Count = 32
    """Pictures in a mini-batch (of each rank)."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 5e-4
    """Decoupled weight decay."""
    clip_norm: Positive | None = None
    """Longest gradient; None clips nothing."""
    coordinate_weight: NonNegative = 5.0
    """λ_coord: weight of the boxes' places and sides."""
    no_object_weight: NonNegative = 0.5
    """λ_noobj: weight of the confidences of boxes that are not responsible."""
    least_score: Fraction = 0.01
    """Detections have a score above this."""
    overlap: Probability = 0.5
    """Suppress a box whose IoU with a better one of its class is greater."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(size=32, examples=48, width=8, deeper=1, steps=6, batch=8),  # 1 s
    "default": Config(evaluate_every=250),  # 25 s → 0.93
    "bccd": Config(data="bccd", size=224, flip=True, stride=16, steps=2000, batch=16, evaluate_every=500),
}

METRICS = {
    "map": "mean over classes of VOC average precision (area under the curve) at IoU 0.5",
    "map_75": "the same at IoU 0.75, where a box must fit closely",
    "recall": "mean over classes of the share of objects that were found with IoU 0.5 at all",
}

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "size": 40,
    "stride": {"stride": 16},
    "clip_norm": 0.5,
    "examples": 40,
    "flip": True,
    "overlap": 0.01,
    "least_score": 0.2,
}

EXPERIMENTS = (
    Experiment(
        "digits on a canvas",
        preset="default",
        metric="test_map",
        bar=0.92,
        published="VOC 2007: 0.634 mAP at 45 pictures a second (Redmon 2015), other data and a pretrained network of 24 layers",
        controls=(
            Control("rows and columns of the grid exchanged", swap={"place": "etude.detection.parts.nulls.transposed"}),
        ),
    ),
    Experiment(
        "blood cells",
        preset="bccd",
        metric="test_map",
        bar=0.56,
        seeds=(0,),
        notes="BCCD, 205 pictures of blood to learn from, three kinds of cells, 72 test pictures",
        controls=(Control("an untrained network", {"steps": 1}),),
    ),
)


class Target(NamedTuple):
    """What the grid of one mini-batch should say."""

    present: Tensor
    """bool (N, S, S), rows first: the cell holds an object's centre (1ᵢ)."""
    box: Tensor
    """(N, S, S, 4): centre in units of the cell, width and height as shares of the picture's side."""
    kind: Tensor
    """int64 (N, S, S): its class; 0 where there is none."""


class YOLO(nn.Module):
    """Pictures (N, C, size, size), uint8 or float in [0, 1] → (N, S, S, 5B + C): B boxes (x, y, √w, √h, c), then classes."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.trunk = Trunk(spec, config.width, config.stride, config.deeper)
        self.head = nn.Conv2d(self.trunk.channels, 5 * config.boxes + len(spec.classes), 1)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():  # boxes begin in the middle of their cell, a quarter of the picture wide
            first = self.head.bias.zero_()[: 5 * config.boxes].view(-1, 5)
            first[:, :4] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)).permute(0, 2, 3, 1)


def place(boxes: Tensor, size: float, cells: int) -> Tensor:
    """The cell that holds each box's centre: (…, 4) in pixels → int64 (…), row · S + column."""
    cell = ((boxes[..., :2] + boxes[..., 2:]) / 2 * (cells / size)).long().clamp(0, cells - 1)
    return cell[..., 1] * cells + cell[..., 0]


def target(boxes: Tensor, labels: Tensor, size: float, cells: int) -> Target:
    """Objects (N, M, 4) in pixels with labels (N, M), −1 for none, as the grid of S × S cells should say them (line 1)."""
    count = len(labels)
    real, slot = labels >= 0, place(boxes, size, cells)
    same = (slot[:, :, None] == slot[:, None, :]) & real[:, None, :]
    real = real & ~same.tril(-1).any(2)  # of several in one cell the first is kept
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    corner = torch.stack([slot % cells, slot // cells], -1)
    said = torch.cat([centre * (cells / size) - corner, sides / size], -1)
    slot = torch.where(real, slot, cells * cells)  # the others go where nobody looks
    present = torch.zeros(count, cells * cells + 1, dtype=torch.bool, device=boxes.device).scatter_(1, slot, real)
    grid = boxes.new_zeros(count, cells * cells + 1, 4).scatter_(1, slot[..., None].expand(-1, -1, 4), said)
    kind = torch.zeros_like(present, dtype=torch.int64).scatter_(1, slot, labels)
    shape = (count, cells, cells)
    return Target(present[:, :-1].view(shape), grid[:, :-1].view(*shape, 4), kind[:, :-1].view(shape))


def corners(said: Tensor, size: float) -> Tensor:
    """Boxes as cells say them, (N, S, S, …, 4) of centre in the cell and *sides* as shares → pixels (x1, y1, x2, y2)."""
    cells = said.shape[1]
    step = torch.arange(cells, device=said.device, dtype=said.dtype)
    row, column = (step.view(shape) for shape in ((-1, 1), (1, -1)))
    inner = (1,) * (said.ndim - 4)
    row, column = (part.expand(cells, cells).reshape(1, cells, cells, *inner) for part in (row, column))
    x, y = (said[..., 0] + column) * (size / cells), (said[..., 1] + row) * (size / cells)
    return cornered(torch.stack([x, y, said[..., 2] * size, said[..., 3] * size], -1))


def objective(
    out: Tensor, aim: Target, boxes: int, size: float, coordinate: float = 5.0, no_object: float = 0.5
) -> Tensor:
    """L of the file's docstring (lines 3 and 4): out (N, S, S, 5B + C) → 0-dim, summed over cells, mean over pictures."""
    said = out[..., : 5 * boxes].unflatten(-1, (boxes, 5))
    sides = said[..., 2:4]
    with torch.no_grad():
        guess = corners(torch.cat([said[..., :2], sides**2], -1), size)
        overlap = paired_iou(guess, corners(aim.box, size).unsqueeze(-2)).to(out.dtype)  # (N, S, S, B)
        chosen = overlap.argmax(-1, keepdim=True)  # of equal ones the first
        responsible = torch.zeros_like(overlap).scatter_(-1, chosen, 1.0) * aim.present.unsqueeze(-1)
    wanted = torch.cat([aim.box[..., :2], aim.box[..., 2:].sqrt()], -1).unsqueeze(-2)
    places = (said[..., :4] - wanted).square().sum(-1)
    confidence = said[..., 4]
    classes = out[..., 5 * boxes :]
    kind = torch.zeros_like(classes).scatter_(-1, aim.kind.unsqueeze(-1), 1.0)
    total = (
        coordinate * (responsible * places).sum()
        + (responsible * (confidence - overlap).square()).sum()
        + no_object * ((1 - responsible) * confidence.square()).sum()
        + (aim.present * (classes - kind).square().sum(-1)).sum()
    )
    return total / len(out)


def candidates(out: Tensor, boxes: int, size: float) -> tuple[Tensor, Tensor]:
    """Boxes (N, S·S·B, 4) in pixels, cut at the picture's edge, and scores (N, S·S·B, C) = p_k · c."""
    said = out[..., : 5 * boxes].unflatten(-1, (boxes, 5))
    found = corners(torch.cat([said[..., :2], said[..., 2:4] ** 2], -1), size).clamp(0, size)
    scores = said[..., 4:] * out[..., None, 5 * boxes :].clamp(min=0)
    return found.flatten(1, 3), scores.flatten(1, 3)


def detect(config: Config, model: nn.Module, x: Tensor) -> scoring.Found:
    """What is found in pictures (N, C, size, size), uint8 (line 5): boxes, scores and classes as `scoring.Found`."""
    found, scores = candidates(model(x).float(), config.boxes, config.size)
    return pick(found, scores, config.least_score, config.overlap)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these classes and this grid. Raises UserError for a size that is no multiple of the stride."""
    if config.size % config.stride:
        raise UserError(f"--size {config.size} is no multiple of --stride {config.stride}, so cells would be cut")
    return {"model": YOLO(spec, config)}


@method("detection/yolo", paper="arXiv:1506.02640", section="5.2.2.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = scenes(config.data, config.size, config.examples, config.objects)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = optim.make("adamw", model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule(config.schedule, config.learning_rate, config.steps)
    batch = scoring.batches(run, data.train, config.batch, config.flip)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        scene = batch(step)
        aim = target(scene.boxes, scene.labels, config.size, config.size // config.stride)  # line 1
        with run.autocast():
            out = model(scene.x)  # line 2
        weights = (config.coordinate_weight, config.no_object_weight)
        loss = objective(out.float() if out.dtype == torch.bfloat16 else out, aim, config.boxes, config.size, *weights)
        optimizer.zero_grad()
        loss.backward()  # lines 3 and 4
        run.average(model, loss=loss)
        if config.clip_norm is not None:
            clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "validation"))
    scoring.pictures(run, model, lambda x: detect(config, model, x), data)
    return scoring.evaluate(run, model, lambda x: detect(config, model, x), data, "test")
