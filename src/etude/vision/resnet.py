"""ResNet: layers add to what they are given, so a hundred of them can be trained

Paper: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385.

Equation: y = ReLU(F(x) + S(x)), F = BN ∘ conv 3×3 ∘ ReLU ∘ BN ∘ conv 3×3 (18 and 34 layers, and all for 32 pixels),
    or 1×1, 3×3, 1×1 to four times the width (50, 101, 152); S(x) = x where the shape stays, hence before the last ReLU
    ∂y/∂x = I + ∂F/∂x: the gradient reaches every layer on a way without weights.

Algorithm:
1. crop the image at a random place of its padded self, mirror it in every other case
2. stem: conv 3×3, 16 maps (32 pixels); or conv 7×7 stride 2, 64 maps, and 3×3 max pooling with stride 2 (224 pixels)
3. stages of n blocks; the first block of each later stage has stride 2 and twice the width
4. global average pooling, one linear layer, softmax
5. descend the mean cross-entropy by momentum 0.9 with weight decay

Differences:
- E32: the notes' 3.57 % is an ensemble of six; a single ResNet-152 has 4.49 % top-5 error (validation).
- E33: the notes build all depths of pairs of convolutions and pool between stages. Here as in the paper: bottlenecks from 50
  layers on, stride-2 convolutions between stages and one max pooling in the stem, ReLU after the addition, a projection
  where the shape changes, a last map of 7×7 (at 224 pixels), and one linear layer stays.
- `--shortcut`: padding is the paper's option A for 32 pixels (every other pixel, new maps zero, half before and half behind
  the old ones), projection its option B, none its plain network.
- The stride stands in the first 3×3 convolution of a block; of a bottleneck in the 3×3, as in torchvision (the paper: 1×1).
- E26: the border that a crop shows is the mean pixel of the training set, per channel; the paper subtracts a mean image.
- Schedule: half a cosine instead of two steps down; the paper's 64,000 updates are `--steps 64000`.
- `--init NAME|FILE|RUN` begins with other weights (published ones by torchvision's or Hugging Face's names); `--freeze N`
  keeps the stem and the first N − 1 stages as they are, running statistics included.

Expect: one core: 0.98 on the bundled digits in 16 CPU seconds. 56 layers on 8×8 digits after 120 updates: 0.84, without
    shortcuts 0.10 (seed 0); largest over smallest gradient norm of the fresh blocks: 8, without shortcuts 2,354.
    CIFAR-10 in JPEG, 20 layers, one pass (`paper` with --batch 64 --steps 800 --learning-rate 0.1), 4 minutes: 0.636, without
    shortcuts 0.562 (seed 0; 0.537 on another processor).
    H100, busy: `paper` 0.878 on the JPEG copy of CIFAR-10 (51 epochs), 261 s.
Command: `etude run vision/resnet --preset paper --precision bf16`
"""

from __future__ import annotations

import re
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
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm, Standardise
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.vision.parts.augmented import batches

Shortcut = Literal["padding", "projection", "none"]
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks in each stage of the networks for 224 pixels (table 1 of the paper)."""


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, cifar10, cifar10_jpeg, cifar10_partial, …) or a folder of class-named image folders."""
    depth: Literal[8, 14, 20, 32, 44, 56, 110, 18, 34, 50, 101, 152] = 20
    """Layers with weights: 8 to 110 of these are the narrow networks for 32 pixels; 18, 34, 50, 101, 152 ImageNet's."""
    shortcut: Shortcut | None = None
    """How a shortcut changes shape: padding (A), projection (B); none is the plain network. None: A at 32 pixels, else B."""
    zero_init: bool = False
    """Begin with γ = 0 in the last normalisation of each block, so that every block is the identity."""
    size: Count = 8
    """Side of the input images in pixels (others are resized)."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    init: str = ""
    """Weights to begin with: a published name, a file (.safetensors, .pth), a folder with model.safetensors, or a run."""
    freeze: Whole = 0
    """Parts that keep their weights: 1 the stem, 2 also the first stage, and so on."""
    steps: Count = 300
    """Number of parameter updates."""
    batch: Count = 64
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "momentum"
    """Update rule; momentum is 0.9."""
    learning_rate: Positive = 0.1
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 1e-4
    """L2 coefficient λ' in the gradient λ'·w (decoupled for adamw)."""
    shift: Whole = 1
    """Move each training image by up to this many pixels (0: never)."""
    flip: bool = False
    """Mirror every other training image left to right."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(depth=8, steps=6, batch=16),
    "default": Config(evaluate_every=100),
    "deep": Config(depth=56, steps=120, batch=32, learning_rate=0.03),
    "cifar": Config(
        data="cifar10_partial", depth=8, size=32, shift=4, flip=True, steps=350, learning_rate=0.2
    ),
    "paper": Config(
        data="cifar10_jpeg", size=32, shift=4, flip=True, steps=18_000, batch=128, optimizer="nesterov",
        learning_rate=0.2, weight_decay=5e-4, evaluate_every=3000,
    ),
}  # fmt: skip

PLAIN = Control("the plain network", flags={"shortcut": "none"})
SHORT = {"batch": 64, "steps": 800, "learning_rate": 0.1, "evaluate_every": 0}
UNTRAINED = Control("an untrained network", flags={"steps": 1})
EXPERIMENTS = (
    Experiment(
        "gradients by depth",
        preset="tiny",
        flags={"depth": 56, "steps": 1},
        metric="gradient_spread",
        bar=10.5,
        better="lower",
        notes="8, guessed from batches of 32, was missed: 7.9, 9.3 and 8.8 on seeds 0 to 2; plain networks 2,354 to 2,558",
        published="the degradation of plain networks (section 4.1, figure 1), of which the paper gives no gradients",
        controls=(PLAIN,),
    ),
    Experiment(
        "fifty-six layers",
        preset="deep",
        metric="test_accuracy",
        bar=0.765,
        published="0.9303 (ResNet-56, CIFAR-10; the plain 56 layers are worse than 20, figure 6)",
        notes="digits of 8 × 8 pixels, 120 updates: whether so deep a network begins to learn at all",
        controls=(PLAIN,),
    ),
    Experiment(
        "CIFAR-10 in JPEG, twenty layers",
        preset="paper",
        flags=SHORT,
        metric="test_accuracy",
        bar=0.6,
        seeds=(0,),
        published="0.9125 (ResNet-20, all pixels, 64,000 updates of 128; table 6)",
        notes="one pass over the images, as far as a CPU core gets in four minutes; the whole preset on a GPU: 0.878",
        controls=(UNTRAINED,),
    ),
    Experiment(
        "CIFAR-10 in JPEG, twenty plain layers",
        preset="paper",
        flags={**SHORT, "shortcut": "none"},
        metric="test_accuracy",
        bar=0.55,
        seeds=(0,),
        published="a curve near 0.9 (plain-20, figure 6; from memory): at this depth plain networks still learn",
        controls=(UNTRAINED,),
    ),
)

METRICS = {
    "gradient_spread": "largest over smallest gradient norm among the blocks' first convolutions, in the fresh network",
}

SETTINGS = {
    "data": "mnist",
    "depth": 14,
    "examples": 100,
    "init": Idle(
        "needs a file of weights or a run, which a tiny run has not; the tests of the whole run begin with one"
    ),
    "optimizer": "sgd",
    "size": 12,
}


def widened(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: (N, C, H, W) → (N, channels, ⌈H/stride⌉, ⌈W/stride⌉): every stride-th pixel, zero maps on both sides."""
    more = channels - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more // 2, more - more // 2))


class Block(nn.Module):
    """Two 3×3 convolutions or (`bottleneck`) 1×1, 3×3, 1×1, and a shortcut: (N, inputs, H, W) → (N, outputs, H/s, W/s).

    `outputs` is `width`, or four times that of a bottleneck.
    """

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut, bottleneck: bool) -> None:
        super().__init__()
        self.stride, self.shortcut, self.outputs = stride, shortcut, width * (4 if bottleneck else 1)
        kernels = ((1, 1), (3, stride), (1, 1)) if bottleneck else ((3, stride), (3, 1))
        self.count, before = len(kernels), inputs
        for number, (kernel, step) in enumerate(kernels, 1):
            after = self.outputs if number == self.count else width
            self.add_module(f"conv{number}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{number}", BatchNorm(after))
            before = after
        self.downsample: nn.Module | None = None
        if shortcut == "projection" and (stride > 1 or inputs != self.outputs):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, self.outputs, 1, stride, bias=False), BatchNorm(self.outputs)
            )

    def last(self) -> BatchNorm:
        """The normalisation before the addition."""
        return self.get_submodule(f"bn{self.count}")  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.count + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.count:
                y = F.relu(y, inplace=True)
        if self.shortcut == "none":
            return F.relu(y, inplace=True)
        if self.downsample is not None:
            x = self.downsample(x)
        elif y.shape != x.shape:
            x = widened(x, self.outputs, self.stride)
        return F.relu(y + x, inplace=True)


class ResNet(nn.Module):
    """Images (N, C, H, W), uint8 or float in [0, 1] → logits (N, classes); names of the weights as in torchvision.

    `depth` is a key of STAGES, or 6 n + 2 for the networks for 32 pixels. `mean` and `std` are per channel, in [0, 1] units.
    The first `frozen` parts (stem, stages) never change, also in training mode.
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        shortcut: Shortcut | None = None,
        zero_init: bool = False,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        large = depth in STAGES
        width = 64 if large else 16
        counts = STAGES[depth] if large else (depth // 6,) * 3
        kind: Shortcut = shortcut or ("projection" if large else "padding")
        self.standardise = Standardise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.bn1 = BatchNorm(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs, self.stages = width, len(counts)
        for stage, count in enumerate(counts):
            blocks: list[nn.Module] = []
            for number in range(count):
                stride = 2 if stage and not number else 1
                block = Block(inputs, width * 2**stage, stride, kind, bottleneck=depth >= 50 and large)
                inputs = block.outputs
                blocks.append(block)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)
        initialise(self, "he")
        for block in self.blocks() if zero_init else ():
            nn.init.zeros_(block.last().weight)  # type: ignore[arg-type]
        parts = [(self.conv1, self.bn1), *((self.get_submodule(f"layer{n + 1}"),) for n in range(self.stages))]
        self.frozen = [part for group in parts[:frozen] for part in group]  # a list: no second name in the state dict
        for part in self.frozen:
            part.requires_grad_(False)

    def blocks(self) -> list[Block]:
        """All residual blocks, from the image to the classes."""
        return [part for part in self.modules() if isinstance(part, Block)]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the last maps (N, F, h, w)."""
        x = self.pool(F.relu(self.bn1(self.conv1(self.standardise(x))), inplace=True))  # line 2
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)  # line 3
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # line 4


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's or the CIFAR networks' names → torchvision's; others stay."""
    words = (
        (r"^linear\.", "fc."),
        (r"^classifier\.1\.", "fc."),
        (r"^resnet\.embedder\.embedder\.", "0.0."),
        (r"^resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.", r"\1.\2.\3."),
        (r"^resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.", r"\1.\2.downsample."),
    )
    found = {}
    for name, value in state.items():
        new = name
        for pattern, words_for in words:
            new = re.sub(pattern, words_for, new)
        if new != name and not new.startswith("fc."):
            *place, kind, leaf = new.split(".")
            if place == ["0", "0"]:
                new = f"{'conv' if kind == 'convolution' else 'bn'}1.{leaf}"
            else:
                stage, number, layer = place
                home = f"layer{int(stage) + 1}.{number}."
                if layer == "downsample":
                    new = f"{home}downsample.{0 if kind == 'convolution' else 1}.{leaf}"
                else:
                    new = f"{home}{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}.{leaf}"
        found[new] = value
    return found


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data, drawn by He's rule. Raises UserError where more parts are to be frozen than there are."""
    parts = 5 if config.depth in STAGES else 4
    if config.freeze > parts:
        raise UserError(f"--freeze {config.freeze} is more than the {parts} parts below the last layer")
    model = ResNet(
        config.depth, len(spec.classes), spec.mean, spec.std, config.shortcut, config.zero_init, config.freeze
    )
    return {"model": model}


@torch.no_grad()
def slopes(model: ResNet) -> Tensor:
    """The gradient's norm in the first convolution of the stem and of every block, from the image on: (1 + blocks,)."""
    weights: list[Any] = [model.conv1.weight, *(block.get_submodule("conv1").weight for block in model.blocks())]
    return torch.stack([torch.zeros(()) if w.grad is None else w.grad.norm().float().cpu() for w in weights])


@method("vision/resnet", paper="arXiv:1512.03385", section="5.1.3.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    if config.batch == 1:
        raise UserError("--batch 1 has no statistics for batch normalisation; take 2 or more")
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    weights = published.read(config.init) if config.init else None
    spec = weights.spec(data.spec) if weights else data.spec
    run.describe(spec, data)
    model = build(config, spec)["model"]
    assert isinstance(model, ResNet)
    if weights:
        published.fill(model, published.Weights(renamed(weights.state), weights.moments, weights.origin), "fc")
    run.suit_threads(model)
    model = run.place(model)
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, data, config.batch, config.shift, config.flip)
    first = Box(slopes=torch.zeros(1 + len(model.blocks())))
    run.track(model=model, optimizer=optimizer, first=first)

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
        if step == 0:
            first.slopes = slopes(model)
        optimizer.step()  # line 5
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    run.artifact("gradients", depth_picture(first.slopes), "The gradient's norm in the layers of the fresh network.")
    pictures(run, model, data, model.conv1.weight)
    scores = evaluate(run, model, data, "test")
    return {**scores, "gradient_spread": spread(first.slopes)}


def spread(norms: Tensor) -> float:
    """The largest over the smallest gradient norm of the layers that learn; 1 where no or one does."""
    learned = norms[norms > 0]
    return float(learned.max() / learned.min()) if len(learned) else 1.0


def depth_picture(norms: Tensor) -> Any:
    """The norms (L,) from the image to the classes, on a logarithmic axis; of frozen layers nothing."""
    place = torch.arange(1, len(norms) + 1)[norms > 0]
    return curves({"gradient": (place, norms[norms > 0])}, x="block, from the image to the classes", y="norm", log=True)
