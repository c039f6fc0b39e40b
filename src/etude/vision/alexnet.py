"""AlexNet: two towers, rectified units, overlapping pooling, responses normalised

Paper: Krizhevsky, Sutskever & Hinton, ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012;
    Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014, arXiv:1404.5997 (one tower).

Equation: local response normalisation, over n = 5 neighbouring maps, κ = 2, α = 10⁻⁴, β = ¾ (section 3.3),
    b_i = a_i / (κ + α Σ_{j = i − ⌊n/2⌋}^{i + ⌊n/2⌋} a_j²)^β, of the a_j that exist;
    overlapping pooling: the maximum of windows of 3×3 with stride 2 (section 3.4).

Algorithm:
1. crop the image at a random place of its padded self, mirror it in every other case
2. convolutions of 96, 256, 384, 384, 256 maps, each with ReLU; the 2nd, 4th and 5th see the maps of their own tower alone
3. normalise behind the first two; pool behind the first two and the last
4. two dense layers of 4,096 units with ReLU and dropout ½, one of as many as there are classes, softmax
5. descend the mean cross-entropy by momentum 0.9 with weight decay

Differences:
- E30: the notes call the two halves an artefact of two GPUs. They are part of the function: a grouped convolution is one whose
  weights between the towers are zero (`block_gap` 0); a network whose kernels see both towers answers otherwise (`merged_gap`).
  `--towers 2` has 60,965,224 parameters, `--towers 1`, the network of 2014 and torchvision's (64, 192, 384, 256, 256 maps, no
  normalisation), 61,100,840. The first convolution's sizes fit for 227 pixels, not 224: (227 − 11)/4 + 1 = 55.
- E28: ILSVRC-2012 has 1.28 million training images (the notes: 1.5; with validation and test it is 1.43).
- torch's local_response_norm divides α by n, so the paper's 10⁻⁴ is its 5·10⁻⁴.
- Below 64 pixels the first kernel is 5×5 with stride 1, and `--width` and `--dense` are smaller: 32 pixels end as 3×3.
- The paper draws weights from N(0, 0.01²), with biases of 1 in some layers, adds multiples of the colours' principal
  components, and answers with the mean over ten crops; here He's initialisation, crops and mirrors, one crop.
- Schedule: a one-cycle rate instead of dividing by ten by hand.
- `--activation tanh` is what the paper's figure 1 compares with (on digits, tanh learns no slower: 0.986 after 200 updates).
- `--init NAME|FILE|RUN` begins with other weights (those of one tower by torchvision's names); `--freeze N` keeps the first N
  convolutions as they are.

Expect: one core: 0.96 to 0.98 on the bundled digits in 12 CPU seconds; 0.79 with the convolutions as they were drawn. Its answers
    change by up to 1.0 where the towers are merged.
Command: `etude run vision/alexnet --preset cifar`
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
from etude.blocks.nn.norm import Standardise
from etude.blocks.nn.windows import Window
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Fraction, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.vision.parts.augmented import batches

MAPS = {2: (3, 8, 12, 12, 8), 1: (3, 9, 18, 12, 12)}
"""Maps of the five convolutions by the number of towers, in thirds of the first one's."""
LAST = "classifier.6"
ALPHA, KAPPA, NEIGHBOURS = 1e-4, 2.0, 5


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, cifar10, cifar10_jpeg, cifar10_partial, …) or a folder of class-named image folders."""
    towers: Literal[1, 2] = 2
    """2: the network of 2012; 1: that of 2014, as torchvision has it, without normalisation."""
    width: Count = 12
    """Maps of the first convolution (two towers: 96 in the paper, a multiple of 6; one: 64)."""
    dense: Count = 64
    """Units of each of the two dense layers (the paper: 4,096)."""
    activation: Literal["relu", "tanh"] = "relu"
    """What squashes: max(0, x), or the saturating units of figure 1."""
    response_norm: bool | None = None
    """Local response normalisation behind the first two convolutions; None: of two towers only."""
    overlap: bool = True
    """Pooling windows of 3×3 with stride 2, or 2×2 side by side."""
    dropout: Fraction = 0.2
    """Probability that a unit of the dense layers is dropped in training (the paper: 0.5)."""
    size: Count = 32
    """Side of the input images in pixels, 32 or more (others are resized); the paper's is 227."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    init: str = ""
    """Weights to begin with: a published name, a file (.safetensors, .pth), a folder with model.safetensors, or a run."""
    freeze: Whole = 0
    """Convolutions that keep their weights, from the image on."""
    steps: Count = 250
    """Number of parameter updates."""
    batch: Count = 64
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "momentum"
    """Update rule; momentum is 0.9."""
    learning_rate: Positive = 0.03
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
    "tiny": Config(width=6, dense=16, steps=4, batch=8),
    "default": Config(evaluate_every=50),
    "cifar": Config(
        data="cifar10_partial", width=48, dense=256, shift=4, flip=True, steps=1000, evaluate_every=250
    ),
    "paper": Config(
        data="cifar10_jpeg", width=96, dense=1024, shift=4, flip=True, steps=18_000, batch=128, evaluate_every=3000
    ),
}  # fmt: skip

EXPERIMENTS = (
    Experiment(
        "two towers are part of the function",
        preset="default",
        metric="block_gap",
        bar=1e-5,
        better="lower",
        notes="largest difference of a probability with one convolution in place of two, zeros between the towers (E30)",
        controls=(Control("the weights between the towers like those within", metric="merged_gap"),),
    ),
    Experiment(
        "learned convolutions",
        preset="default",
        metric="test_accuracy",
        bar=0.957,
        published="none on these images; ILSVRC-2012: 18.2 % top-5 error of one network",
        notes="digits on 32 × 32 pixels, width 12; the control learns its dense layers alone",
        controls=(Control("convolutions as they were drawn", flags={"freeze": 5}),),
    ),
)

METRICS = {
    "block_gap": "change of a probability where grouped convolutions become whole ones with zeros between the towers",
    "merged_gap": "change of a probability where every kernel sees the other tower's maps as it sees its own",
}

SETTINGS = {
    "data": "mnist",
    "width": 12,
    "examples": 100,
    "init": Idle(
        "needs a file of weights or a run, which a tiny run has not; the tests of the whole run begin with one"
    ),
    "optimizer": "sgd",
    "response_norm": False,
    "size": 48,
}


class ResponseNorm(nn.Module):
    """b = a · (κ + α Σ a²)^−β over five neighbouring maps: (N, C, H, W) → the same.

    The sum over neighbours is a 1×1 convolution with a band of ones, five times as fast as torch's pooling over maps.
    """

    def __init__(self, maps: int) -> None:
        super().__init__()
        place = torch.arange(maps)
        near = (place[:, None] - place).abs() <= NEIGHBOURS // 2
        self.register_buffer("near", near.float()[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        root = (KAPPA + ALPHA * F.conv2d(x * x, self.get_buffer("near"))).rsqrt()
        return x * root * root.sqrt()  # to the power of −¾


class AlexNet(nn.Module):
    """Images (N, C, size, size), uint8 or float in [0, 1] → logits (N, classes); names of the weights as in torchvision.

    `mean` and `std` are per channel, in [0, 1] units. The first `frozen` convolutions never change.
    """

    def __init__(
        self,
        classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        size: int = 227,
        towers: int = 2,
        width: int = 96,
        dense: int = 4096,
        activation: str = "relu",
        response_norm: bool = True,
        overlap: bool = True,
        dropout: float = 0.5,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        large = size >= 64
        first = Window.of(11, 4, 0 if towers == 2 else 2) if large else Window.of(5, 1, 2)
        windows = (first, Window.of(5, 1, 2), *[Window.of(3, 1, 1)] * 3)
        pool = Window.of(3, 2) if overlap else Window.of(2, 2)
        groups = (1, towers, 1, towers, towers)
        self.standardise = Standardise(mean, std)
        self.features = nn.Sequential()
        inputs, side = len(mean), size
        for number, (window, share, group) in enumerate(zip(windows, MAPS[towers], groups)):
            maps = width * share // 3
            self.features.append(
                nn.Conv2d(inputs, maps, window.kernel, window.stride, window.padding, groups=group)  # line 2
            )
            self.features.append(squash(activation))
            inputs, (side, _) = maps, window.places(side, side)
            if number in (0, 1, 4):  # line 3
                norm = [ResponseNorm(maps)] if response_norm and number < 4 else []
                self.features.append(nn.Sequential(*norm, nn.MaxPool2d(pool.kernel, pool.stride)))
                side, _ = pool.places(side, side)
        self.avgpool = nn.AdaptiveAvgPool2d(6) if side > 6 else nn.Identity()  # larger images: means over 6 × 6 fields
        self.classifier = nn.Sequential(
            Dropout(dropout), nn.Linear(inputs * min(side, 6) ** 2, dense), squash(activation),
            Dropout(dropout), nn.Linear(dense, dense), squash(activation),
            nn.Linear(dense, classes),
        )  # fmt: skip
        initialise(self, "he")
        for part in self.convolutions()[:frozen]:
            part.requires_grad_(False)

    def convolutions(self) -> list[nn.Conv2d]:
        """The five convolutions, from the image on."""
        return [part for part in self.features if isinstance(part, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(self.standardise(x)))  # lines 2-3
        return self.classifier(x.flatten(1))  # line 4


def squash(activation: str) -> nn.Module:
    return nn.Tanh() if activation == "tanh" else nn.ReLU(inplace=True)


@torch.no_grad()
def joined(model: AlexNet, between: float) -> AlexNet:
    """The same network of whole convolutions: weights within the towers as they are, those between them `between` times these.

    0 is the same function; at 1 a kernel sees each map of the other tower as it sees the one in the same place of its own.
    """
    whole = copy.deepcopy(model)
    for place, part in enumerate(whole.features):
        if isinstance(part, nn.Conv2d) and part.groups == 2:
            wide: Any = nn.Conv2d(part.in_channels, part.out_channels, part.kernel_size, padding=part.padding).to(
                part.weight
            )  # type: ignore[arg-type]
            own, half = part.weight.chunk(2), part.in_channels // 2
            for tower in (0, 1):
                rows = slice(tower * len(own[0]), (tower + 1) * len(own[0]))
                wide.weight[rows, :half] = own[tower] * (1.0 if tower == 0 else between)
                wide.weight[rows, half:] = own[tower] * (1.0 if tower == 1 else between)
            wide.bias.copy_(part.bias)
            whole.features[place] = wide
    return whole


@torch.no_grad()
def gap(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference between the probabilities that two networks in evaluation give images (N, C, H, W)."""
    return float((model(x).softmax(1) - other(x).softmax(1)).abs().max())


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data, drawn by He's rule. Raises UserError for sizes and widths that do not go."""
    if min(spec.shape[1:]) < 32:
        raise UserError(
            f"images of {spec.shape[1]}×{spec.shape[2]} pixels are used up by the poolings; take --size 32 or more"
        )
    if config.width % 6 and config.towers == 2:
        raise UserError(f"--width {config.width} cannot be shared by two towers; take a multiple of 6, or --towers 1")
    if config.freeze > 5:
        raise UserError(f"--freeze {config.freeze} is more than the 5 convolutions")
    norm = config.towers == 2 if config.response_norm is None else config.response_norm
    model = AlexNet(
        len(spec.classes), spec.mean, spec.std, spec.shape[1], config.towers, config.width, config.dense,
        config.activation, norm, config.overlap, config.dropout, config.freeze,
    )  # fmt: skip
    return {"model": model}


@method("vision/alexnet", paper="Krizhevsky et al. 2012", section="5.1.3.2a", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    weights = published.read(config.init) if config.init else None
    spec = weights.spec(data.spec) if weights else data.spec
    run.describe(spec, data)
    model = build(config, spec)["model"]
    assert isinstance(model, AlexNet)
    if weights:
        published.fill(model, weights, LAST)
    run.suit_threads(model)
    model = run.place(model)
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, data, config.batch, config.shift, config.flip)
    run.track(model=model, optimizer=optimizer)

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)  # lines 2-4

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
        optimizer.step()  # line 5
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    pictures(run, model, data, model.features[0].weight)
    scores, some = evaluate(run, model, data, "test"), data.test.x[:200].to(run.device)
    model.eval()
    gaps = {"block_gap": gap(model, joined(model, 0.0), some), "merged_gap": gap(model, joined(model, 1.0), some)}
    return {**scores, **gaps}
