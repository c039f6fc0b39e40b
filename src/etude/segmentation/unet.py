"""U-Net: a class for every pixel, by a way down, a way up and skips between them

Paper: Ronneberger, Fischer, Brox, U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015, arXiv:1505.04597.

Equation: with d_l = conv-conv(pool(d_{l−1})) going down to the bottom u_L = d_L, and up again
    u_l = conv-conv([crop(d_l); upconv(u_{l+1})]),    z = W u_0 + b,
    E = − mean over pixels of log softmax(z)[label].
    conv: 3×3 and ReLU; pool: 2×2 maxima, which halve the sides while the maps double; upconv: 2×2 transposed convolution with
    stride 2, which doubles the sides and halves the maps.

Algorithm:
1. a crop, turned and bent (elastic deformation), is shown with the margin that its pixels see, mirrored at the picture's end
2. z ← U-Net(crop)
3. descend the mean cross-entropy of its pixels, void left out
4. a picture of any size is predicted in overlapping tiles whose answers are those of one pass

Differences:
- E43: the notes call the bottleneck networks the idea *before* U-Net and draw sizes that stay; the original (`--padding valid`)
  has unpadded convolutions, so that every one takes a rim and the skips are cropped: 572 × 572 pixels give 388 × 388
  answers, with 31,030,658 parameters for one channel and two classes. `--padding same` (default) pads with zeros and keeps sizes.
- Small: width 8 to 32 and two to four levels, where the paper has width 64 and four (`--preset paper`).
- Crops in mini-batches and a schedule; the paper takes one large tile a step with momentum 0.99.
- The paper's loss weighs pixels between two touching cells more; here all count alike. Dropout at the bottom is there
  (`--dropout`), normalisation is not the paper's.
- Rand error: of the connected parts of class 1 … in the answer as it is; the challenge first thins the membranes and takes the
  best threshold. ISBI's test labels are not public: slices 24 to 29 of the labelled thirty test here.

Expect: seed 0, one core: digits on canvases, 18 s of CPU time: mean IoU 0.85 (after 300 steps 0.77, with its skips cut 0.56).
    ISBI-2012, preset `isbi`, 90 s: pixel accuracy 0.916, Rand error 0.46 (one gap joins two cells; skips cut 0.46, SegNet 0.56).
    CamVid (92 pictures to learn from), `--preset camvid --width 16 --crop 192 --batch 4 --steps 400`, 4 minutes: pixel
    accuracy 0.723, mean IoU 0.276.
Command: `etude run segmentation/unet`, then `etude predict segmentation/unet FILE`;
    `etude run segmentation/unet --preset isbi`
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
    levels: Few = 2
    """How often the sides are halved."""
    padding: Literal["same", "valid"] = "same"
    """Convolutions padded with zeros, or the paper's, which take a rim."""
    skips: Literal["concat", "cut"] = "concat"
    """What the way up sees of the way down: its maps, or zeros in their place."""
    normalizer: Literal["none", "batch"] = "batch"
    """Batch normalisation between a convolution and its ReLU, or none."""
    dropout: Fraction = 0.0
    """Probability that a unit of the bottom is dropped in training."""
    crop: Count = 64
    """Side of a training crop's answers in pixels."""
    turns: Turns = "none"
    """Crops as they are, mirrored left to right, or in one of eight turns and mirrors."""
    elastic: NonNegative = 0.0
    """Standard deviation in pixels of the bending displacements; the paper's is 10."""
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
    "default": Config(evaluate_every=100),  # 20 s → mean IoU 0.85
    "isbi": Config(
        data="isbi2012", width=16, levels=3, crop=128, turns="all", elastic=4.0, steps=300, batch=4, learning_rate=5e-3,
        evaluate_every=100,
    ),
    "isbi_long": Config(
        data="isbi2012", width=32, levels=4, crop=256, turns="all", elastic=6.0, steps=1500, batch=8, learning_rate=3e-3,
        dropout=0.2, evaluate_every=500,
    ),
    "camvid": Config(
        data="camvid", width=32, levels=4, crop=240, turns="mirror", steps=1500, batch=8, learning_rate=3e-3,
        dropout=0.2, evaluate_every=500,
    ),
    "paper": Config(
        data="isbi2012", width=64, levels=4, padding="valid", normalizer="none", dropout=0.5, crop=388, turns="all",
        elastic=10.0, steps=20000, batch=1, learning_rate=1e-4, schedule="constant", evaluate_every=1000,
    ),
}  # fmt: skip


METRICS = {
    "pixel_accuracy": "share of the pixels whose class is answered rightly, void left out",
    "mean_iou": "mean over the classes of intersection over union, over all pixels of the split together",
    "rand_error": "one minus the F-score of pairs of pixels in one segment, mean over the pictures",
}

SETTINGS = {
    "data": "mnist",
    "levels": 1,
    "padding": {"padding": "valid", "levels": 1, "crop": 40},
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
        "digits", preset="default", metric="test_mean_iou", bar=0.776, flags={"evaluate_every": 0, "steps": 300},
        controls=(Control("skips cut", flags={"skips": "cut"}), SHUFFLED),
    ),
    Experiment(
        "ISBI-2012", preset="isbi", metric="test_pixel_accuracy", bar=0.9, flags={"evaluate_every": 0}, within_seconds=600,
        published="warping error 0.00035 and Rand error 0.038 on the challenge's own test (table 1)",
        notes="slices 24 to 29 of the labelled thirty, whole; Rand error without thinning or a threshold",
        controls=(SHUFFLED,),
    ),
)  # fmt: skip


class UNet(PixelNetwork):
    """Pictures (N, C, H, W), uint8 or float in [0, 1] → logits (N, K, H', W'); mean and std per channel, in [0, 1] units.

    same: H' = H, a multiple of 2^levels. valid: H' = H − 2 margin with margin = 6 · 2^levels − 4, and H' + 4(2^levels − 1) is
    a multiple of 2^levels.
    """

    def __init__(
        self,
        classes: int,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        width: int = 64,
        levels: int = 4,
        padding: Literal["same", "valid"] = "valid",
        normalizer: str = "none",
        dropout: float = 0.0,
        skips: str = "concat",
    ) -> None:
        super().__init__()
        self.skips = skips
        self.stride = 2**levels
        self.reach = reach(levels)
        if padding == "valid":
            self.margin, self.residue = 6 * self.stride - 4, -4 * (self.stride - 1) % self.stride

        def twice(before: int, after: int) -> nn.Sequential:
            return convolutions(before, after, 2, padding, normalizer)

        maps = [width << level for level in range(levels + 1)]
        self.standardise = Standardise(mean, std)
        self.down = nn.ModuleList(twice(a, b) for a, b in zip([len(mean), *maps], maps))
        self.drop = Dropout(dropout) if dropout else nn.Identity()
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * m, m, 2, stride=2) for m in maps[-2::-1])
        self.join = nn.ModuleList(twice(2 * m, m) for m in maps[-2::-1])
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.standardise(x), []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        x = self.drop(kept.pop())
        for up, join in zip(self.up, self.join):
            x = up(x)
            skip = cropped(kept.pop(), x)
            x = join(torch.cat([skip if self.skips == "concat" else torch.zeros_like(skip), x], 1))
        return self.last(x)


def reach(levels: int) -> int:
    """How far beyond an aligned block of 2^levels answers a pixel is seen, over convolutions that are padded."""
    low, high = 0, 2**levels
    for _ in range(levels):  # down the expanding path: two convolutions see 2 further, half as many pixels are needed
        low, high = (low - 2) // 2, -(-(high + 2) // 2)
    low, high = low - 2, high + 2
    for _ in range(levels):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - 2**levels)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for these pictures, weights drawn with variance 2 / inputs (He), as the paper does."""
    net = UNet(
        len(spec.classes), spec.mean, spec.std, config.width, config.levels, config.padding, config.normalizer,
        config.dropout, config.skips,
    )  # fmt: skip
    return {"model": initialise(net, "he")}


@method("segmentation/unet", paper="arXiv:1505.04597", section="5.2.3.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = read(config.data)
    run.describe(data.spec, data)
    model = build(config, data.spec)["model"]
    assert isinstance(model, UNet)
    model.check(config.crop)
    run.suit_threads(run.place(model))
    optimizer = optim.make(config.optimizer, model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
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
