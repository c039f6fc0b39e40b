"""FCN: a classifier slid over the picture, its coarse and finer answers added

Paper: Long, Shelhamer, Darrell, Fully Convolutional Networks for Semantic Segmentation, 2015, arXiv:1411.4038.

Equation: with p_l = pool(convs(p_{l−1})) the maps after l halvings and S_l their 1×1 scores, one for each class,
    z_L = S_L(head(p_L)),    z_{l−1} = up₂(z_l) + crop(S_{l−1}(p_{l−1})) down to l − 1 = L − F,    z = up_{2^(L−F)}(z_{L−F})
    E = − mean over pixels of log softmax(z)[label].
    head: a classifier's fully connected layers, the first a k×k convolution, the others 1×1.
    up_f: transposed convolution with stride f and a 2f×2f kernel, weight (1 − |u|/f)(1 − |v|/f) at the distance (u, v) from its
    middle, which is bilinear interpolation.
    F = 0, 1, 2 with L = 5: FCN-32s, FCN-16s, FCN-8s.

Algorithm:
1. a crop, turned and bent as asked for, with the margin that its pixels see
2. z ← FCN(crop)
3. descend the mean cross-entropy of its pixels, void left out
4. a picture of any size is predicted in overlapping tiles whose answers are those of one pass

Differences:
- E41: the notes let overlaps of a transposed convolution be averaged; they are summed. A bilinear kernel's overlaps have
  weights that sum to 1, so that this sum *is* an average, the reason why the paper begins with it.
- The paper begins with VGG-16's weights and pads the first layer with 100 zeros, so that any picture fits; here the network
  is drawn at random, small (`--preset paper` has VGG's sizes but two convolutions a level), and batch-normalised. `--padding
  valid` pads nothing: a coarse score is then exactly what the classifier says of its patch, and the rim is mirrored.
- Scores begin at zero and the last interpolation is never learned, as in the paper; the steps between levels are learned
  (`--upsampling learned`) from their bilinear start. All levels are learned at once, where the paper goes from 32s to 8s.
- Adam and a schedule, where the paper has momentum 0.99 at a rate of 10⁻¹⁰ for a loss summed over pixels.

Expect: seeds 0-2, one core, digits on canvases, 300 steps, 13 s of CPU time: mean IoU 0.73 to 0.78; with the coarse scores
    alone 0.30 to 0.34. ISBI-2012, seed 0, preset `isbi`: pixel accuracy 0.906, Rand error 0.63.
    CamVid (92 pictures to learn from), `--preset camvid --width 16 --crop 192 --batch 4 --steps 400`: 0.723, mean IoU 0.270.
Command: `etude run segmentation/fcn`, then `etude predict segmentation/fcn FILE`;
    `etude run segmentation/fcn --preset isbi`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.blocks.nn.dropout import Dropout
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import Standardise
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.segmentation.parts.crops import Turns, crops
from etude.segmentation.parts.layers import convolutions, cropped
from etude.segmentation.parts.looks import pictures
from etude.segmentation.parts.predicting import predict as predict  # for `etude predict`
from etude.segmentation.parts.scenes import read
from etude.segmentation.parts.scores import evaluate, pixel_loss
from etude.segmentation.parts.tiles import PixelNetwork


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """digits, mnist, … (on canvases), isbi2012, camvid, or a folder with images/ and masks/."""
    width: Count = 16
    """Maps of the first level; they double with every level down."""
    levels: Few = 3
    """How often the sides are halved (the paper: 5)."""
    fused: Whole = 2
    """Finer levels whose scores are added: 0, 1 and 2 of five are FCN-32s, -16s and -8s."""
    head: Count = 3
    """Side of the head's first kernel, odd: the patch of maps that the classifier's first full layer saw."""
    head_width: Count = 128
    """Maps of the head, the units of the classifier's full layers."""
    upsampling: Literal["learned", "fixed"] = "learned"
    """Whether the steps from level to level leave their bilinear start."""
    padding: Literal["same", "valid"] = "same"
    """Convolutions padded with zeros, or not at all."""
    normalizer: Literal["none", "batch"] = "batch"
    """Batch normalisation between a convolution of a level and its ReLU, or none."""
    dropout: Fraction = 0.0
    """Probability that a unit of the head is dropped in training; the paper's is 0.5."""
    crop: Count = 64
    """Side of a training crop's answers in pixels."""
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
    "tiny": Config(steps=6, batch=2, width=4, crop=32, head_width=8),
    "default": Config(evaluate_every=100),
    "isbi": Config(
        data="isbi2012", crop=128, turns="all", elastic=4.0, steps=300, learning_rate=5e-3, evaluate_every=100
    ),
    "camvid": Config(
        data="camvid", width=32, levels=4, fused=2, head_width=256, dropout=0.2, crop=240, turns="mirror", steps=1500,
        batch=8, learning_rate=3e-3, evaluate_every=500,
    ),
    "paper": Config(
        data="camvid", width=64, levels=5, fused=2, head=7, head_width=4096, normalizer="none", dropout=0.5, crop=352,
        turns="mirror", steps=100000, batch=1, optimizer="momentum", learning_rate=1e-3, schedule="constant",
        weight_decay=5e-4, evaluate_every=5000,
    ),
}  # fmt: skip


METRICS = {
    "pixel_accuracy": "share of the pixels whose class is answered rightly, void left out",
    "mean_iou": "mean over the classes of intersection over union, over all pixels of the split together",
    "rand_error": "one minus the F-score of pairs of pixels in one segment, mean over the pictures",
}

SETTINGS = {
    "data": "mnist",
    "levels": {"levels": 2, "fused": 1},
    "fused": 1,
    "head": 5,
    "padding": {"padding": "valid", "levels": 1, "fused": 0, "crop": 32},
    "dropout": 0.5,
    "crop": 48,
    "elastic": 2.0,
    "optimizer": "sgd",
    "weight_decay": {"weight_decay": 0.1, "optimizer": "adamw"},
    "tile": Idle("tiles give the answer of one pass; only rounding differs"),
}

SHUFFLED = Control("shuffled masks", swap={"read": "etude.segmentation.parts.nulls.shuffled"})

EXPERIMENTS = (
    Experiment(
        "digits", preset="default", metric="test_mean_iou", bar=0.68, flags={"evaluate_every": 0, "steps": 300},
        controls=(Control("coarse scores alone", flags={"fused": 0}), SHUFFLED),
    ),
)  # fmt: skip


class FCN(PixelNetwork):
    """Pictures (N, C, H, W), uint8 or float in [0, 1] → logits (N, K, H', W'); mean and std per channel, in [0, 1] units.

    same: H' = H, a multiple of 2^levels. valid: H' = H − 2 margin, and H' − 2^(levels − fused) is a multiple of 2^levels.
    """

    def __init__(
        self,
        classes: int,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        width: int = 64,
        levels: int = 5,
        fused: int = 2,
        head: int = 7,
        head_width: int = 4096,
        upsampling: str = "learned",
        padding: Literal["same", "valid"] = "same",
        normalizer: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride, self.padding = 2**levels, padding
        self.last = 2 ** (levels - fused)
        self.reach = reach(levels, fused, head)
        if padding == "valid":  # the convolutions of all levels, the head, and the rims of the interpolations
            lost = 4 * (self.stride - 1) + self.stride * (head + 1) - self.last
            self.margin, self.residue = lost // 2, self.last % self.stride
        maps = [width << level for level in range(levels)]
        self.standardise = Standardise(mean, std)
        self.down = nn.ModuleList(convolutions(a, b, 2, padding, normalizer) for a, b in zip([len(mean), *maps], maps))
        self.head = nn.Sequential(
            nn.Conv2d(maps[-1], head_width, head, padding=padding), nn.ReLU(), Dropout(dropout),
            nn.Conv2d(head_width, head_width, 1), nn.ReLU(), Dropout(dropout),
        )  # fmt: skip
        scored = [head_width, *maps[-2::-1][:fused]] if fused else [head_width]
        self.scores = nn.ModuleList(nn.Conv2d(m, classes, 1) for m in scored)
        edge = 2 if padding == "valid" else 1
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=edge, bias=False) for _ in range(fused)
        ).requires_grad_(upsampling == "learned")
        self.register_buffer("kernel", bilinear(self.last), persistent=False)

    def coarse(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The scores of the head (N, K, h, w), one for every 2^levels pixels, and the maps after each halving."""
        x, kept = self.standardise(x), []
        for down in self.down:
            x = F.max_pool2d(down(x), 2)
            kept.append(x)
        return self.scores[0](self.head(x)), kept[:-1]

    def forward(self, x: Tensor) -> Tensor:
        z, kept = self.coarse(x)
        for up, score in zip(self.up, [*self.scores][1:]):
            z = up(z)
            z = z + cropped(score(kept.pop()), z)
        edge = self.last if self.padding == "valid" else self.last // 2
        kernel = self.get_buffer("kernel").to(z.dtype).expand(z.shape[1], 1, -1, -1)
        return F.conv_transpose2d(z, kernel, stride=self.last, padding=edge, groups=z.shape[1])


def bilinear(factor: int) -> Tensor:
    """The kernel (2f, 2f) of a transposed convolution with stride f = `factor`, even, that interpolates bilinearly.

    Entry (i, j) is (1 − |u|/f)(1 − |v|/f), u and v the distances of the pixels' middles from the kernel's.
    """
    line = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    return line[:, None] * line


def reach(levels: int, fused: int, head: int) -> int:
    """How far beyond an aligned block of 2^levels answers a pixel is seen, over convolutions that are padded."""
    low, high = -1, 2**fused + 1  # cells under the last interpolation
    for _ in range(fused):
        low, high = (low - 1) // 2, high // 2 + 1
    low, high = low - head // 2, high + head // 2
    for _ in range(levels):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - 2**levels)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these pictures: weights with variance 2 / inputs (He), scores zero, steps up bilinear."""
    if config.fused >= config.levels:
        raise UserError(f"--fused {config.fused} of --levels {config.levels}: at most {config.levels - 1} lie above")
    if config.head % 2 == 0:
        raise UserError(f"--head is {config.head}; it must be odd, so that a kernel has a middle")
    net = FCN(
        len(spec.classes), spec.mean, spec.std, config.width, config.levels, config.fused, config.head, config.head_width,
        config.upsampling, config.padding, config.normalizer, config.dropout,
    )  # fmt: skip
    initialise(net, "he")
    with torch.no_grad():
        for score in net.scores:
            assert isinstance(score, nn.Conv2d)
            score.weight.zero_()
        for up in net.up:
            assert isinstance(up, nn.ConvTranspose2d)
            up.weight.copy_(torch.eye(len(spec.classes))[:, :, None, None] * bilinear(2))
    return {"model": net}


@method("segmentation/fcn", paper="arXiv:1411.4038", section="5.2.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = read(config.data)
    run.describe(data.spec, data)
    model = build(config, data.spec)["model"]
    assert isinstance(model, FCN)
    model.check(config.crop)
    run.suit_threads(run.place(model))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.make(config.optimizer, weights, config.learning_rate, weight_decay=config.weight_decay)
    rate = optim.schedule(config.schedule, config.learning_rate, config.steps)
    batch = crops(run, data.train, config.batch, config.crop, model.margin, config.turns, config.elastic)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step))
        x, y = batch(step)  # line 1
        with run.autocast():
            z = model(x)  # line 2
        loss = pixel_loss(z, y)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()  # line 3
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation", config.tile))
    pictures(run, model, data, config.tile)
    return evaluate(run, model, data, "test", config.tile)  # line 4
