"""LeNet: convolutions, pooling and a small classifier read handwritten digits

Paper: LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11), 1998.

Equation: a convolution layer (cross-correlation) with kernel w, bias b and zero padding p,
    y[o, i, j] = b[o] + Σ_{c,u,v} w[o, c, u, v] · x[c, i+u−p, j+v−p]
    then a squashing function, then pooling over 2×2 windows with stride 2.

Algorithm:
1. x ← (pixels − mean) / deviation of the training set, zero-padded to 32×32
2. C1: 6 maps, 5×5 → 28×28;  S2: pool → 14×14
3. C3: 16 maps, 5×5 → 10×10;  S4: pool → 5×5
4. C5: 120 units, 5×5 → 1×1;  F6: 84 units;  output: one unit a class
5. descend the mean cross-entropy of a mini-batch

Differences:
- E29: the notes draw LeNet as conv-pool-conv-pool-dense. LeNet-5 also has a sparse C3 (60 of 96 connections, 1,516
  weights and biases), trainable average subsampling, the squashing function 1.7159 tanh(2x/3) and an RBF output. `--style 1998`
  builds the first three exactly: 60,000 trainable parameters below the output, as the paper counts. `--style modern`
  (default) is what is called LeNet today: full C3, max pooling, ReLU; 61,706 parameters with 10 classes.
- Output and loss: a linear layer under cross-entropy in both styles; the paper uses fixed RBF units and a
  mean-square-like loss (its eq. 8-9).
- Optimizer: Adam with a one-cycle rate; the paper uses stochastic diagonal Levenberg-Marquardt over 20 passes.
- E25: what is called convolution is cross-correlation; tensors are (N, C, H, W) and kernels (out, in, kh, kw).
- The paper has neither normalisation nor dropout: `--normalizer` stands between a layer and its squashing function (batch:
  one mean a map over N, H and W; layer: one an image), `--dropout` behind C5 and F6. For `--ensemble` see
  `etude.blocks.classifying.ensembles`.
- E26: padding writes zeros *after* the mean is subtracted, so the border is the mean pixel of the training set.

Expect: one core: 0.989 to 0.994 on the bundled digits in 8 s; MNIST 0.988 to 0.990 in 20 s (3.3 epochs), 0.992 to 0.994
    in 110 s (17 epochs).
Command: `etude run vision/lenet --preset mnist`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude import optim
from etude.blocks.classifying.batches import batches, subset
from etude.blocks.classifying.ensembles import Combine, Kind, first_network
from etude.blocks.classifying.recipe import Normalizer, Recipe, ensemble, normaliser
from etude.blocks.classifying.scores import evaluate, pictures
from etude.blocks.classifying.updates import clip, clipped_together, losses, take_snapshot
from etude.blocks.nn.dropout import Dropout, Form
from etude.blocks.nn.init import Init, initialise
from etude.blocks.nn.norm import Standardise
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Whole
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.augment import shift
from etude.optim import set_lr

# Table I of the paper: which of the six S2 maps feed each of the sixteen C3 maps
TABLE_1 = (
    "012",
    "123",
    "234",
    "345",
    "045",
    "015",
    "0123",
    "1234",
    "2345",
    "0345",
    "0145",
    "0125",
    "0134",
    "1245",
    "0235",
    "012345",
)


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, fashion_mnist, kmnist, cifar10) or a folder of class-named image folders."""
    style: Literal["modern", "1998"] = "modern"
    """modern: full C3, max pooling, ReLU; 1998: sparse C3, trainable subsampling, scaled tanh."""
    size: Literal[28, 32] = 28
    """Side of the input images in pixels (others are resized); 28 is zero-padded to 32."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    initializer: Init | None = None
    """How the weights are drawn; None takes he for the modern style, lecun for 1998."""
    initial_bias: float = 0.0
    """Initial value of all biases."""
    normalizer: Normalizer = "none"
    """Between a layer and its squashing function: batch normalisation (per map), layer normalisation, or none."""
    dropout: Fraction = 0.0
    """Probability that a unit of C5 and F6 is dropped in training."""
    dropout_style: Form = "inverted"
    """inverted: divide by the probability of keeping in training; classic: multiply by it at test."""
    steps: Count = 600
    """Number of parameter updates."""
    batch: Count = 128
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "adam"
    """Update rule (newton is for networks of up to 3,000 parameters, which this one exceeds)."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 0.0
    """L2 coefficient λ' in the gradient λ'·w (decoupled for adamw)."""
    clip_norm: Positive | None = None
    """Longest gradient, over all parameters of a network; None clips nothing."""
    clip_value: Positive | None = None
    """Largest absolute value of an element of the gradient; None clips nothing."""
    ensemble: Kind = "none"
    """Train several networks: other seeds, bootstrap samples, heads on one trunk, or snapshots of one."""
    members: Few | None = None
    """Networks in the ensemble; None takes 5."""
    combine: Combine = "probability"
    """What the ensemble answers: mean probability, majority vote, or (snapshots) the network of averaged weights."""
    shift: Whole = 1
    """Move each training image by up to this many pixels (0: never)."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(steps=20, batch=32),  # 1 s
    "default": Config(evaluate_every=100),  # 8 s → 0.992
    "mnist": Config(data="mnist", steps=1400, evaluate_every=350),  # 3.3 epochs, 20 s → 0.988
    "mnist_long": Config(data="mnist", steps=7000, evaluate_every=1000, shift=2),  # 110 s → 0.993
    "paper": Config(data="mnist", style="1998", steps=4700, evaluate_every=469, learning_rate=2e-3),
    "cifar": Config(data="cifar10", size=32, steps=4000, evaluate_every=500),
}

EXPERIMENTS = (
    Experiment(
        "mnist in a minute",
        preset="mnist",
        metric="test_accuracy",
        bar=0.986,
        within_seconds=60,
        published="0.9905 (LeNet-5, 60,000 images, 20 epochs, LeCun 1998)",
        controls=(Control("one linear map", swap={"LeNet": "etude.vision.parts.nulls.linear"}),),
    ),
    Experiment(
        "mnist",
        preset="mnist_long",
        metric="test_accuracy",
        bar=0.991,
        within_seconds=300,
        published="0.9905 (LeNet-5, 60,000 images, 20 epochs; 0.992 with distorted copies, LeCun 1998)",
        controls=(
            Control(
                "one linear map",
                flags={"steps": 1400},
                swap={"LeNet": "etude.vision.parts.nulls.linear"},
            ),
        ),
    ),
)

SETTINGS = {
    "data": "mnist",
    "examples": 100,
    "dropout_style": {"dropout": 0.5, "dropout_style": "classic"},
    "optimizer": "sgd",  # adamw is adam where nothing decays
    "clip_norm": 0.5,
    "clip_value": 0.01,
    "members": {"ensemble": "seeds", "members": 2},
    "combine": {"ensemble": "seeds", "combine": "vote"},
}


class Subsample(nn.Module):
    """S2 and S4 of the paper: mean of each 2×2 window, times a trainable weight, plus a trainable bias, per map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H/2, W/2)."""
        return F.avg_pool2d(x, 2) * self.weight[:, None, None] + self.bias[:, None, None]


class SparseConv(nn.Conv2d):
    """C3 of the paper: a convolution whose map o sees only the input maps of Table I (60 of 96 kernels)."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(6, 16, 5, bias=bias)
        table = torch.zeros(16, 6, 1, 1)
        for o, inputs in enumerate(TABLE_1):
            table[o, [int(c) for c in inputs]] = 1
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, 14, 14) → (N, 16, 10, 10)."""
        return F.conv2d(x, self.weight * self.get_buffer("table"), self.bias)


class ScaledTanh(nn.Module):
    """1.7159 tanh(2x/3): maps ±1 to ±1, where its second derivative is largest (paper, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2 / 3 * x)


class LeNet(nn.Module):
    """Images (N, C, size, size), uint8 or float in [0, 1] → logits (N, classes).

    `style` is ``modern`` or ``1998`` (see the file's docstring); `mean` and `std` are per channel, in [0, 1] units.
    """

    def __init__(
        self,
        classes: int,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        size: int = 28,
        style: str = "modern",
        normalizer: Normalizer = "none",
        dropout: float = 0.0,
        dropout_style: Form = "inverted",
    ) -> None:
        super().__init__()
        modern = style == "modern"
        bias = normalizer != "batch"  # batch normalisation has its own

        def pool(channels: int) -> nn.Module:
            return nn.MaxPool2d(2) if modern else Subsample(channels)

        def squash(*shape: int) -> list[nn.Module]:
            return [*normaliser(normalizer, *shape), nn.ReLU() if modern else ScaledTanh()]

        def drop() -> list[nn.Module]:
            return [Dropout(dropout, dropout_style)] if dropout else []

        self.standardise = Standardise(mean, std)
        self.features = nn.Sequential(
            nn.Conv2d(len(mean), 6, 5, padding=(32 - size) // 2, bias=bias),  # C1
            *squash(6, 28, 28),
            pool(6),  # S2
            nn.Conv2d(6, 16, 5, bias=bias) if modern else SparseConv(bias),  # C3
            *squash(16, 10, 10),
            pool(16),  # S4
            nn.Conv2d(16, 120, 5, bias=bias),  # C5
            *squash(120, 1, 1),
            *drop(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(120, 84, bias=bias), *squash(84), *drop(), nn.Linear(84, classes)
        )  # F6, output

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.standardise(x)))


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data (He initialisation under ReLU, LeCun's 1/fan-in under tanh), or the ensemble of such."""
    initializer: Init = config.initializer or ("he" if config.style == "modern" else "lecun")

    def network() -> nn.Module:
        model = LeNet(
            len(spec.classes), spec.mean, spec.std, config.size, config.style,
            config.normalizer, config.dropout, config.dropout_style,
        )  # fmt: skip
        return initialise(model, initializer, bias=config.initial_bias)

    return {"model": ensemble(network, config)}


def augment(config: Config) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """What happens to the images of a training batch, (B, C, H, W) uint8; None for nothing."""
    return (lambda x, generator: shift(x, config.shift, generator)) if config.shift else None


@method("vision/lenet", paper="LeCun et al. 1998", section="5.1.3.1", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, recipe, model, data, augment(config))
    together = clipped_together(model)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, recipe.rate(step))
        x, y = batch(step)
        with run.autocast():
            total, loss = losses(model, x, y)  # lines 1-4; of an ensemble the sum over its members, and the mean
        optimizer.zero_grad()
        total.backward()
        run.average(model, loss=loss)
        clip(together, config.clip_norm, config.clip_value)
        optimizer.step()  # line 5
        if step in recipe.moments:
            take_snapshot(run, model, data)
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    pictures(run, model, data, first_network(model).features[0].weight)
    return evaluate(run, model, data, "test")
