"""VGG: small kernels in deep stacks; most of the weights lie in the dense layers

Paper: Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014, arXiv:1409.1556.

Equation: a stage is n times ReLU ∘ conv 3×3 (padding 1, stride 1), then max pooling 2×2; its maps are 64, 128, 256, 512, 512.
    Three kernels of 3×3 in a row see 7×7 pixels, with 27 C² weights instead of 49 C² and two more ReLUs between.

Algorithm:
1. crop the image at a random place of its padded self, mirror it in every other case
2. five stages of n₁ … n₅ convolutions: 32 pixels become one, 224 become 7
3. two dense layers of 4,096 units with ReLU and dropout ½, one of as many as there are classes, softmax
4. descend the mean cross-entropy by momentum 0.9 with weight decay

Differences:
- E31: the notes describe "two convolutions and a pooling, repeated". That is VGG-13; VGG-11 has 1-1-2-2-2 convolutions a stage,
  VGG-16 2-2-3-3-3 and VGG-19 2-2-4-4-4. Of VGG-16's 138,357,544 parameters 102,764,544 (74.3 %) are its first dense layer.
- `--normalizer batch` (default) puts batch normalisation before each ReLU, as torchvision's vgg16_bn does. The paper has none: it
  began its deep networks with the weights of VGG-11, since fresh ones did not learn (`--initializer paper`);
  He's rule, which is younger and taken here, mends that, with and without normalisation.
- For 32 pixels: one pixel is left, `--width` and `--dense` are smaller, and depth 8 (1-1-1-1-1) is no network of the paper.
- The paper jitters scale and colour, and tests densely over whole images at several scales; here crops, mirrors, one size.
- E26: the border that a crop shows is the mean pixel of the training set, per channel.
- Schedule: a one-cycle rate instead of three steps down.
- `--init NAME|FILE|RUN` begins with other weights by torchvision's names; `--freeze N` keeps the first N stages as they are,
  running statistics included.

Expect: one core: 0.98 to 0.99 on the bundled digits in 10 CPU seconds, 16 layers; drawn as in the paper it stays at 0.10.
    Preset `cifar` (VGG-8, 8,000 images) with 1,500 updates: 0.640 (seed 0) in 148 CPU seconds.
Command: `etude run vision/vgg --preset cifar`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude import optim
from etude.blocks.classifying import published
from etude.blocks.classifying.batches import subset
from etude.blocks.classifying.recipe import Recipe
from etude.blocks.classifying.scores import evaluate, pictures
from etude.blocks.nn.dropout import Dropout
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Fraction, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.vision.parts.augmented import batches

CONVOLUTIONS = {8: (1,) * 5, 11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by the number of layers with weights (table 1 of the paper: A, B, D and E)."""
LAST = "classifier.6"


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, cifar10, cifar10_jpeg, cifar10_partial, …) or a folder of class-named image folders."""
    depth: Literal[8, 11, 13, 16, 19] = 16
    """Layers with weights; 8 is a short network for 32 pixels, the others are the paper's."""
    width: Count = 8
    """Maps of the first stage (the paper: 64); later stages have 2, 4, 8 and 8 times as many."""
    dense: Count = 64
    """Units of each of the two dense layers (the paper: 4,096)."""
    normalizer: Literal["batch", "none"] = "batch"
    """Batch normalisation behind each convolution, or nothing, as in the paper."""
    initializer: Literal["he", "paper"] = "he"
    """How the weights are drawn: by He's rule, or from N(0, 0.01²) as in the paper."""
    dropout: Fraction = 0.2
    """Probability that a unit of the dense layers is dropped in training (the paper: 0.5)."""
    size: Count = 32
    """Side of the input images in pixels, at least 32 (others are resized); the paper's is 224."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    init: str = ""
    """Weights to begin with: a published name, a file (.safetensors, .pth), a folder with model.safetensors, or a run."""
    freeze: Whole = 0
    """Stages that keep their weights, from the image on."""
    steps: Count = 200
    """Number of parameter updates."""
    batch: Count = 64
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "momentum"
    """Update rule; momentum is 0.9."""
    learning_rate: Positive = 0.02
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 5e-4
    """L2 coefficient λ' in the gradient λ'·w (decoupled for adamw)."""
    shift: Whole = 2
    """Move each training image by up to this many pixels (0: never)."""
    flip: bool = False
    """Mirror every other training image left to right."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(depth=8, width=4, dense=16, steps=4, batch=8),
    "default": Config(evaluate_every=50),
    "cifar": Config(
        data="cifar10_partial", depth=8, width=32, dense=256, dropout=0.3, shift=4, flip=True, steps=2500,
        learning_rate=0.05, evaluate_every=500,
    ),
    "paper": Config(
        data="cifar10_jpeg", width=64, dense=512, shift=4, flip=True, steps=18_000, batch=128, optimizer="nesterov",
        learning_rate=0.1, evaluate_every=3000,
    ),
}  # fmt: skip

EXPERIMENTS = (
    Experiment(
        "sixteen layers",
        preset="default",
        metric="test_accuracy",
        bar=0.977,
        published="none on these images; ILSVRC-2012: 7.0 % to 7.5 % top-5 error of one network (validation)",
        notes="digits on 32 × 32 pixels, width 8: whether a fresh network of sixteen layers learns at all",
        controls=(Control("weights drawn as in the paper", flags={"initializer": "paper"}),),
    ),
)

METRICS = {
    "first_dense_share": "share of all parameters that lie in the first dense layer",
}

SETTINGS = {
    "data": "mnist",
    "depth": 11,
    "examples": 100,
    "init": Idle(
        "needs a file of weights or a run, which a tiny run has not; the tests of the whole run begin with one"
    ),
    "optimizer": "sgd",
    "size": 40,
}


class VGG(nn.Module):
    """Images (N, C, size, size), uint8 or float in [0, 1] → logits (N, classes); names of the weights as in torchvision.

    `mean` and `std` are per channel, in [0, 1] units. The first `frozen` stages never change, also in training mode.
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        size: int = 224,
        width: int = 64,
        dense: int = 4096,
        normalizer: str = "none",
        initializer: str = "he",
        dropout: float = 0.5,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        self.standardise = Standardise(mean, std)
        self.features = nn.Sequential()
        inputs, ends = len(mean), [0]
        for count, times in zip(CONVOLUTIONS[depth], (1, 2, 4, 8, 8)):
            for _ in range(count):
                maps = width * times
                self.features.append(nn.Conv2d(inputs, maps, 3, padding=1))
                if normalizer == "batch":
                    self.features.append(BatchNorm(maps))
                self.features.append(nn.ReLU(inplace=True))
                inputs = maps
            self.features.append(nn.MaxPool2d(2))
            ends.append(len(self.features))
        side = size // 32
        self.avgpool = nn.AdaptiveAvgPool2d(7) if side > 7 else nn.Identity()  # larger images: means over 7 × 7 fields
        self.classifier = nn.Sequential(
            nn.Linear(inputs * min(side, 7) ** 2, dense), nn.ReLU(inplace=True), Dropout(dropout),
            nn.Linear(dense, dense), nn.ReLU(inplace=True), Dropout(dropout),
            nn.Linear(dense, classes),
        )  # fmt: skip
        initialise(self, "he")
        for part in self.modules() if initializer == "paper" else ():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(part.weight, std=0.01)
        self.frozen = [
            self.features[place] for place in range(ends[frozen])
        ]  # a list: no second name in the state dict
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> VGG:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(self.standardise(x)))  # line 2
        return self.classifier(x.flatten(1))  # line 3


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data, drawn by He's rule. Raises UserError for small images and too many frozen stages."""
    if min(spec.shape[1:]) < 32:
        raise UserError(
            f"images of {spec.shape[1]}×{spec.shape[2]} pixels end in five poolings; take --size 32 or more"
        )
    if config.freeze > 5:
        raise UserError(f"--freeze {config.freeze} is more than the 5 stages below the dense layers")
    model = VGG(
        config.depth, len(spec.classes), spec.mean, spec.std, spec.shape[1], config.width, config.dense,
        config.normalizer, config.initializer, config.dropout, config.freeze,
    )  # fmt: skip
    return {"model": model}


def first_dense_share(model: VGG) -> float:
    """The share of all parameters that lie in the first dense layer: 74.3 % of VGG-16 (E31)."""
    first = sum(p.numel() for p in model.classifier[0].parameters())
    return first / sum(p.numel() for p in model.parameters())


@method("vision/vgg", paper="arXiv:1409.1556", section="5.1.3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    weights = published.read(config.init) if config.init else None
    spec = weights.spec(data.spec) if weights else data.spec
    run.describe(spec, data)
    model = build(config, spec)["model"]
    assert isinstance(model, VGG)
    if weights:
        published.fill(model, weights, LAST)
    run.suit_threads(model)
    model = run.place(model)
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, data, config.batch, config.shift, config.flip)
    run.track(model=model, optimizer=optimizer)

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)  # lines 2-3

    objective = run.compile(mean_loss)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, recipe.rate(step))
        x, y = batch(step)  # line 1
        with run.autocast():
            loss = objective(x, y)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()  # line 4
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    pictures(run, model, data, model.features[0].weight)
    return {**evaluate(run, model, data, "test"), "first_dense_share": first_dense_share(model)}
