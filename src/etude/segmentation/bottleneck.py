"""Bottleneck: down by pooling, up by un-pooling with indices; SegNet and DeconvNet

Paper: Badrinarayanan, Kendall, Cipolla, SegNet, 2015, arXiv:1511.00561; Noh, Hong, Han, Learning Deconvolution Network for
    Semantic Segmentation, 2015, arXiv:1505.04366.

Equation: with pool's values d_l and places i_l, (d_l, i_l) = pool(convs(d_{l−1})), going down to the bottom, and up again
    u_{l−1} = convs(unpool(u_l, i_l)),    unpool(u, i)[i[j]] = u[j], 0 elsewhere,    z = W u_0 + b,
    E = − mean over pixels of w_label log softmax(z)[label] over the mean of w.
    SegNet (`--decoder convolution`): u_L = d_L. DeconvNet (`--decoder transposed`): u_L = deconv(fc(d_L)), and the way up has
    transposed convolutions, y = Uᵀ Wᵀ x where a convolution is y = W U x.
    w_k = median of the classes' shares / share of class k (`--balance median`), or 1.

Algorithm:
1. a crop, turned and bent as asked for
2. z ← network(crop), every maximum's place kept on the way down and given to the un-pooling of its level
3. descend the mean cross-entropy of its pixels, void left out
4. a picture of any size is predicted in overlapping tiles whose answers are those of one pass

Differences:
- E41: the notes let overlaps of a transposed convolution be averaged; they are summed, as its name, adjoint, says.
- E42: the notes save the value at the index; all other positions are zero, too, and a pool and its un-pool must agree in
  shape. A negative value put back would lose the next pooling to a zero beside it; behind a ReLU there is none.
- Small: two levels and two convolutions each (SegNet: VGG-16's thirteen convolutions; DeconvNet: those, twice), and drawn at
  random where the papers begin with VGG-16's weights. `--preset segnet` and `deconvnet` have five levels of VGG's widths.
- One stage of training on crops; DeconvNet's is two, on boxes round objects, and it averages over fifty proposals.
- Adam and a schedule, where the papers have momentum.

Expect: seeds 0-2, one core, digits on canvases. 600 steps, 30 s of CPU time: pixel accuracy 0.991, 0.987, 0.986; trained with
    values put back at a corner 0.987, 0.983, 0.982, so the places take a quarter of the error away on each seed. After 300
    steps mean IoU 0.61 (DeconvNet: 0.50), with corners 0.54 (0.41). ISBI-2012, preset `isbi`: 0.911, with
    corners in the trained network 0.819. Values repeated over their window learn faster than places at first (digits, 300
    steps: 0.81). CamVid, `--preset camvid --width 16 --crop 192 --batch 4 --steps 400`, too few for balanced classes: pixel
    accuracy 0.434, mean IoU 0.174 (U-Net 0.723 and 0.276).
Command: `etude run segmentation/bottleneck`, then `etude predict segmentation/bottleneck FILE`;
    `etude run segmentation/bottleneck --decoder transposed`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.blocks.nn.dropout import Dropout
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.segmentation.parts.crops import Turns, crops
from etude.segmentation.parts.layers import convolutions
from etude.segmentation.parts.looks import pictures
from etude.segmentation.parts.predicting import predict as predict  # for `etude predict`
from etude.segmentation.parts.scenes import read
from etude.segmentation.parts.scores import evaluate, pixel_loss
from etude.segmentation.parts.tiles import PixelNetwork


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """digits, mnist, … (on canvases), isbi2012, camvid, or a folder with images/ and masks/."""
    decoder: Literal["convolution", "transposed"] = "convolution"
    """The way up: SegNet's convolutions, or DeconvNet's fully connected bottom and transposed convolutions."""
    unpooling: Literal["indices", "corner", "repeat"] = "indices"
    """A value goes back to its maximum's place, to its window's first pixel, or to all of the window."""
    width: Count = 16
    """Maps of the first level; they double with every level down."""
    levels: Few = 2
    """How often the sides are halved (the papers: 5)."""
    bottom: Count = 3
    """Side of the bottom's kernel in DeconvNet, odd (the paper's is 7)."""
    normalizer: Literal["none", "batch"] = "batch"
    """Batch normalisation between a convolution and its ReLU, or none."""
    dropout: Fraction = 0.0
    """Probability that a unit of the deepest maps is dropped in training."""
    balance: Literal["none", "median"] = "none"
    """Classes weigh alike for every pixel, or by the median of their shares over their own (SegNet's)."""
    crop: Count = 64
    """Side of a training crop in pixels."""
    turns: Turns = "none"
    """Crops as they are, mirrored left to right, or in one of eight turns and mirrors."""
    elastic: NonNegative = 0.0
    """Standard deviation in pixels of the bending displacements."""
    steps: Count = 400
    """Number of parameter updates."""
    batch: Count = 4
    """Crops in a mini-batch (of each rank)."""
    optimizer: Literal["adam", "adamw", "sgd", "momentum"] = "adam"
    """Update rule."""
    learning_rate: Positive = 1e-2
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 0.0
    """L2 coefficient λ' in the gradient λ'·w (decoupled for adamw)."""
    tile: Whole = 0
    """Side of the tiles in which pictures are scored; 0 takes whole pictures."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(steps=6, batch=2, width=4, crop=32),
    "default": Config(evaluate_every=100),
    "isbi": Config(
        data="isbi2012", levels=3, crop=128, turns="all", elastic=4.0, steps=300, learning_rate=5e-3, evaluate_every=100
    ),
    "camvid": Config(
        data="camvid", width=32, levels=4, balance="median", dropout=0.2, crop=240, turns="mirror", steps=1500, batch=8,
        learning_rate=3e-3, evaluate_every=500,
    ),
    "segnet": Config(
        data="camvid", width=64, levels=5, balance="median", crop=352, turns="mirror", steps=40000, batch=12,
        optimizer="momentum", learning_rate=0.1, schedule="constant", evaluate_every=1000,
    ),
    "deconvnet": Config(
        data="camvid", decoder="transposed", width=64, levels=5, bottom=7, crop=224, turns="mirror", steps=40000,
        batch=64, optimizer="momentum", learning_rate=0.01, weight_decay=5e-4, evaluate_every=1000,
    ),
}  # fmt: skip


METRICS = {
    "pixel_accuracy": "share of the pixels whose class is answered rightly, void left out",
    "mean_iou": "mean over the classes of intersection over union, over all pixels of the split together",
    "rand_error": "one minus the F-score of pairs of pixels in one segment, mean over the pictures",
    "cornered_*": "the same of the test split, every value put back at its window's first pixel, not at its place",
}

SETTINGS = {
    "data": "mnist",
    "unpooling": "corner",
    "levels": 1,
    "bottom": {"bottom": 5, "decoder": "transposed"},
    "dropout": 0.5,
    "crop": 48,
    "elastic": 2.0,
    "optimizer": "sgd",
    "weight_decay": {"weight_decay": 0.1, "optimizer": "adamw"},
    "tile": Idle("tiles give the answer of one pass; only rounding differs"),
}

EXPERIMENTS = (
    Experiment(
        "SegNet", preset="default", metric="test_pixel_accuracy", bar=0.985, flags={"evaluate_every": 0, "steps": 600},
        controls=(
            Control("the same network, un-pooling without its indices", metric="cornered_pixel_accuracy"),
            Control("shuffled masks", swap={"read": "etude.segmentation.parts.nulls.shuffled"}),
        ),
    ),
)  # fmt: skip


class Bottleneck(PixelNetwork):
    """Pictures (N, C, H, W), uint8 or float in [0, 1], H and W multiples of 2^levels → logits (N, K, H, W).

    mean and std per channel, in [0, 1] units.
    """

    def __init__(
        self,
        classes: int,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        width: int = 64,
        levels: int = 5,
        decoder: Literal["convolution", "transposed"] = "convolution",
        unpooling: str = "indices",
        bottom: int = 7,
        normalizer: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        transposed = decoder == "transposed"
        self.unpooling, self.stride = unpooling, 2**levels
        self.reach = reach(levels, bottom if transposed else 1)
        maps = [width << level for level in range(levels)]
        self.standardise = Standardise(mean, std)
        self.down = nn.ModuleList(convolutions(a, b, 2, "same", normalizer) for a, b in zip([len(mean), *maps], maps))
        full: list[nn.Module] = []
        if transposed:  # the fully connected layers, slid over the maps, and back
            middle, pad = 2 * maps[-1], bottom // 2
            for layer in (
                nn.Conv2d(maps[-1], middle, bottom, padding=pad), nn.Conv2d(middle, middle, 1),
                nn.ConvTranspose2d(middle, maps[-1], bottom, padding=pad),
            ):  # fmt: skip
                full += [layer, *([BatchNorm(layer.out_channels)] if normalizer == "batch" else []), nn.ReLU()]
        self.bottom = nn.Sequential(*full, Dropout(dropout))
        up = zip(maps[::-1], [*maps[-2::-1], width])

        def mirrored(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                *convolutions(before, before, 1, "same", normalizer, transposed),
                *convolutions(before, after, 1, "same", normalizer, transposed),
            )

        self.up = nn.ModuleList(mirrored(a, b) for a, b in up)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.standardise(x), []
        for down in self.down:
            x, places = F.max_pool2d(down(x), 2, return_indices=True)
            kept.append(places)
        x = self.bottom(x)
        for up in self.up:
            x = up(unpool(x, kept.pop(), self.unpooling))
        return self.last(x)


def unpool(x: Tensor, places: Tensor, rule: str = "indices") -> Tensor:
    """(N, C, H, W) → (N, C, 2H, 2W): each value at `places`, the number of a pixel (row by row) within its 2×2 window.

    `rule` "corner": at the window's first pixel; "repeat": at all four. Where no value goes there is 0.
    """
    if rule == "repeat":
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
    height, width = x.shape[-2:]
    if rule == "corner":
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        places = (4 * width * rows[:, None] + 2 * columns).expand_as(places)
    return F.max_unpool2d(x, places, [2, 2])


def reach(levels: int, bottom: int) -> int:
    """How far beyond an aligned block of 2^levels answers a pixel is seen: two convolutions a level, up and down.

    An un-pooling sees its place's window as it was before pooling, which the way down sees anyway.
    """
    low, high = 0, 2**levels
    for _ in range(levels):
        low, high = (low - 2) // 2, -(-(high + 2) // 2)
    low, high = low - 2 * (bottom // 2), high + 2 * (bottom // 2)
    for _ in range(levels):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - 2**levels)


def median_frequency(masks: Sequence[Tensor], classes: int) -> Tensor:
    """w_k = median of the shares / share of k: masks uint8 (H, W) each → (classes,) float32, 0 for a class that is nowhere.

    A class's share is that of its pixels in the pictures where it occurs, void left out, and the median is over the classes.
    """
    counts = torch.stack([mask.flatten().bincount(minlength=256)[:classes] for mask in masks]).double()
    held = ((counts > 0) * counts.sum(1, keepdim=True)).sum(0)
    share = counts.sum(0) / held.clamp(min=1)
    return torch.where(
        share > 0, share[share > 0].quantile(0.5) / share.where(share > 0, torch.ones_like(share)), 0.0
    ).float()


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these pictures, weights drawn with variance 2 / inputs (He)."""
    if config.bottom % 2 == 0:
        raise UserError(f"--bottom is {config.bottom}; it must be odd, so that a kernel has a middle")
    net = Bottleneck(
        len(spec.classes), spec.mean, spec.std, config.width, config.levels, config.decoder, config.unpooling,
        config.bottom, config.normalizer, config.dropout,
    )  # fmt: skip
    return {"model": initialise(net, "he")}


@method("segmentation/bottleneck", paper="arXiv:1511.00561", section="5.2.3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = read(config.data)
    run.describe(data.spec, data)
    model = build(config, data.spec)["model"]
    assert isinstance(model, Bottleneck)
    model.check(config.crop)
    run.suit_threads(run.place(model))
    optimizer = optim.make(config.optimizer, model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule(config.schedule, config.learning_rate, config.steps)
    batch = crops(run, data.train, config.batch, config.crop, 0, config.turns, config.elastic)
    balanced = config.balance == "median"
    weight = median_frequency(data.train.y, len(data.spec.classes)).to(run.device) if balanced else None
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        x, y = batch(step)  # line 1
        with run.autocast():
            z = model(x)  # line 2
        loss = pixel_loss(z, y, weight)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()  # line 3
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation", config.tile))
    pictures(run, model, data, config.tile)
    found = evaluate(run, model, data, "test", config.tile)  # line 4
    if config.unpooling == "indices":  # what the places are worth to this network
        model.unpooling = "corner"
        without = evaluate(run, model, data, "test", config.tile)
        model.unpooling = "indices"
        found |= {f"cornered_{name}": without[f"test_{name}"] for name in ("pixel_accuracy", "mean_iou")}
    return found
