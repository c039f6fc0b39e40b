"""Convolution: padding, stride, dilation, groups, pooling, their gradients by hand

Paper: Fukushima, Neocognitron, 1980; LeCun et al., Backpropagation Applied to Handwritten Zip Code Recognition, 1989;
    Dumoulin & Visin, A guide to convolution arithmetic for deep learning, 2016, arXiv:1603.07285.

Equation: y[o, i, j] = b[o] + Σ_{c,u,v} w[o, c, u, v] · x[c, s i + d u − p, s j + d v − p]   (0 outside the image),
    H' = ⌊(H + 2p − d(k − 1) − 1)/s⌋ + 1 places down and as many across; in g groups a map sees C/g of the C inputs.
    It is one linear map, y = W U x + b (`etude.blocks.nn.windows`), so ∂x = Uᵀ Wᵀ ∂y and ∂W = ∂y (U x)ᵀ: the gradient adds
    windows up where they were taken. A max-pooled window sends its gradient to its first maximum, a mean-pooled one to all.

Algorithm:
1. x ← (pixels − mean) / deviation of the training set, per channel, so that a padded zero is the mean pixel
2. a block: convolution k×k, ReLU, pooling over N×N windows with stride N: H×W×C → H×W×M → H/N×W/N×M
3. a second block with twice as many maps; one linear layer; softmax
4. descend the mean cross-entropy of a mini-batch, every gradient as above

Differences:
- E25: the notes write H×W×C images and kh×kw×in×out kernels, and say that the size stays. Tensors are (N, C, H, W) and kernels
  (out, in/groups, kh, kw), what all of them call convolution is cross-correlation (`flipped_gap`: how far the answers
  of this network move when its kernels are turned round), and the size stays only for p = d(k − 1)/2 and s = 1.
- E26: zeros are "smaller than any pixel" of a raw picture alone, not of hidden maps; and what is subtracted is the mean of the
  training set, per channel, not of an image. Without it (`--no-subtract`) zero padding draws a dark frame
  (`border_error`). For white digits on black, black is the right border: there it does no good.
- E27: pooling makes H/N × W/N of H × W (the notes: H/N × W/n), rounded down.
- E41: the windows of a transposed convolution, this map's adjoint, add up where they overlap; they are not averaged.
- Strides stand in for pooling (arXiv:1412.6806) in the preset `strided`: conv_s(x) is conv_1(x)[::s, ::s].
- A layer moves with its image, a network only by whole strides of its pooling: `conv_gap`, `pooled_gap` and `stride_gap`.

Expect: one core: 0.98 on the bundled digits in 10 CPU seconds. From 100 of them 0.88 to 0.90, with their pixels in another
    order 0.72 to 0.84; from 1,000 digits of MNIST (14 pixels, 400 steps) 0.93 to 0.94 and 0.87 to 0.89.
Command: `etude run vision/convolution`
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude import optim
from etude.blocks.classifying.batches import subset
from etude.blocks.classifying.recipe import Recipe
from etude.blocks.classifying.scores import evaluate, pictures
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import Standardise
from etude.blocks.nn.windows import Window, convolve, convolve_backward, max_pool, max_pool_backward, mean_pool
from etude.blocks.nn.windows import mean_pool_backward as mean_back
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr
from etude.vision.parts.augmented import batches
from etude.vision.parts.exhibits import border_error, looked_at, moved_gap, show, turned

Pool = Literal["max", "mean", "none"]


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, cifar10, …) or a folder of class-named image folders."""
    size: Count = 8
    """Side of the input images in pixels (others are resized)."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    maps: Count = 12
    """Maps of the first convolution; the second makes twice as many."""
    kernel: Count = 3
    """Side k of the kernels."""
    stride: Count = 1
    """Pixels s from one window to the next, of both convolutions."""
    padding: Whole | None = None
    """Zeros p on each side; None takes d(k − 1)/2, with which the size stays at stride 1."""
    dilation: Count = 1
    """Pixels d from one weight of a kernel to the next."""
    groups: Count = 1
    """Groups of the second convolution, each of which sees its own share of the maps."""
    pool: Pool = "max"
    """What each convolution is followed by: the largest or the mean value of each window, or no pooling."""
    window: Count = 2
    """Side N of the pooling windows, which lie side by side."""
    subtract: bool = True
    """Subtract the training set's mean of each channel, so that a padded zero is the mean pixel."""
    scramble: bool = False
    """Show the pixels in another order, the same in every image: nothing is beside what it belongs to."""
    engine: Literal["written", "torch"] = "written"
    """Who computes: the windows and gradients written out here, or torch's kernels."""
    photograph: Literal["flower", "china"] = "flower"
    """The photograph that the pictures show."""
    steps: Count = 500
    """Number of parameter updates."""
    batch: Count = 64
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "adam"
    """Update rule."""
    learning_rate: Positive = 1e-2
    """Peak learning rate of the schedule."""
    schedule: optim.Schedule = "one_cycle"
    """Learning rate over the run."""
    weight_decay: NonNegative = 0.0
    """L2 coefficient λ' in the gradient λ'·w (decoupled for adamw)."""
    shift: Whole = 0
    """Move each training image by up to this many pixels (0: never)."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(steps=6, batch=16, maps=4),
    "default": Config(evaluate_every=100),
    "strided": Config(pool="none", stride=2, evaluate_every=100),
    "mnist": Config(data="mnist", size=28, kernel=5, shift=1, steps=800, evaluate_every=200),
}

EXPERIMENTS = (
    Experiment(
        "neighbours",
        preset="default",
        flags={"examples": 100, "steps": 300},
        metric="test_accuracy",
        bar=0.862,
        published="none: the bundled digits have 8 × 8 pixels",
        notes="from 100 digits: what stands beside what must make up for the images that lack; with all of them it is worth less",
        controls=(
            Control("pixels in another order", flags={"scramble": True}),
            Control("kernels of one pixel", flags={"kernel": 1}),
        ),
    ),
    Experiment(
        "torch's numbers",
        preset="default",
        flags={"examples": 100, "steps": 300},
        metric="torch_gap",
        bar=1e-5,
        better="lower",
        notes="largest difference of a probability of the trained network with torch's kernels in place of its own",
        controls=(Control("kernels turned round, as in a true convolution (E25)", metric="flipped_gap"),),
    ),
    Experiment(
        "a layer moves with its image",
        preset="default",
        flags={"examples": 100, "steps": 300},
        metric="conv_gap",
        bar=1e-5,
        better="lower",
        notes="the image is moved by one pixel; behind pooling, or with stride 2, that is no whole number of places",
        controls=(
            Control("behind the pooling", metric="pooled_gap"),
            Control("stride 2", flags={"stride": 2, "pool": "none"}),
        ),
    ),
    Experiment(
        "the frame of zeros",
        preset="default",
        flags={"examples": 100, "steps": 300},
        metric="border_error",
        bar=0.33,
        better="lower",
        notes="a photograph blurred 3 × 3, on its outermost pixels, in deviations of its pixels (E26)",
        controls=(Control("no mean subtracted", flags={"subtract": False}),),
    ),
)

METRICS = {
    "torch_gap": "largest difference of a probability of a test image, with torch's kernels in place of these",
    "flipped_gap": "largest difference of a probability of a test image when all kernels are turned by half a turn",
    "conv_gap": "change of the first maps under moving image and maps by one pixel, over their size; 0 is equivariance",
    "pooled_gap": "change of the last maps under moving the image by one pixel, over their size",
    "stride_gap": "the same under moving the image by as many pixels as lie between the last maps' places",
    "border_error": "blurred photograph, outermost pixels: zeros outside against its mirror image, rms in deviations",
}

SETTINGS = {
    "data": "mnist",
    "size": 12,
    "examples": 100,
    "stride": {"stride": 2, "pool": "none"},
    "padding": 2,
    "window": 1,
    "groups": 2,
    "kernel": 5,
    "optimizer": "sgd",
}


class Convolve(torch.autograd.Function):
    """W U x + b with its gradient written out: x (N, C, H, W), weight (O, C/g, k, k), bias (O,) → (N, O, H', W')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how  # stride, padding, dilation, groups
        return convolve(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (*convolve_backward(upstream[0].to(x.dtype), x, weight, *ctx.how), None, None, None, None)


class PoolMax(torch.autograd.Function):
    """The largest value of each n×n window; its slope goes back to the first place where that stood."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        y, places = max_pool(x, n)
        ctx.save_for_backward(places)
        ctx.size = x.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return max_pool_backward(upstream[0], *ctx.saved_tensors, *ctx.size), None


class PoolMean(torch.autograd.Function):
    """The mean of each n×n window; every pixel gets its share of the slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.how = (*x.shape[2:], n)
        return mean_pool(x, n)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return mean_back(upstream[0], *ctx.how), None


class Convolution(nn.Conv2d):
    """`Convolve` as a layer, with the names and weights of torch's; whoever exports it gets torch's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return Convolve.apply(input, self.weight, self.bias, *how)  # type: ignore[return-value]


class MaxPool(nn.MaxPool2d):
    """`PoolMax` as a layer, windows side by side."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.compiler.is_compiling() else PoolMax.apply(input, self.kernel_size)  # type: ignore[return-value]


class MeanPool(nn.AvgPool2d):
    """`PoolMean` as a layer, windows side by side."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.compiler.is_compiling() else PoolMean.apply(input, self.kernel_size)  # type: ignore[return-value]


class Scramble(nn.Module):
    """The pixels in another order, drawn once for all images, seeds and runs: (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, self.get_buffer("order")].view_as(x)


class Network(nn.Module):
    """Images (N, C, H, W), uint8 or float in [0, 1] → logits (N, classes); `features` and `classifier` are plain chains."""

    def __init__(self, before: nn.Module, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.before, self.features, self.classifier = before, features, classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.before(x)))


def stages(config: Config, channels: int, height: int, width: int) -> list[dict[str, Any]]:
    """What each layer makes of an image: name, maps, height, width, field, step, weights, products; the image comes first.

    `field` is the side of what one place sees of the image and `step` the pixels between two places. Raises UserError where
    a window does not fit or the maps cannot be grouped.
    """
    rows: list[dict[str, Any]] = [
        {"layer": "image", "maps": channels, "height": height, "width": width, "field": 1, "step": 1}
        | {"weights": 0, "products": 0}
    ]

    def layer(name: str, maps: int, window: Window, groups: int = 0) -> None:
        last = rows[-1]
        try:
            down, across = window.places(last["height"], last["width"])
        except ValueError as error:
            raise UserError(f"the {name} does not fit: {error}; take a larger --size or smaller windows") from error
        (k, _), (s, _), _, (d, _) = window
        inputs = last["maps"] // groups if groups else 0
        rows.append(
            {"layer": name, "maps": maps, "height": down, "width": across}
            | {"field": last["field"] + d * (k - 1) * last["step"], "step": last["step"] * s}
            | {"weights": maps * (inputs * k * k + 1) if groups else 0}
            | {"products": maps * inputs * k * k * down * across}
        )

    reach = config.dilation * (config.kernel - 1)
    if config.padding is None and reach % 2:
        raise UserError(f"--kernel {config.kernel} has no middle: give --padding, or an odd kernel")
    padding = reach // 2 if config.padding is None else config.padding
    for number, maps in enumerate((config.maps, 2 * config.maps), 1):
        groups = config.groups if number == 2 else 1
        if config.maps % groups:
            raise UserError(f"--groups {groups} does not divide the {config.maps} maps (--maps)")
        layer(f"convolution {number}", maps, Window.of(config.kernel, config.stride, padding, config.dilation), groups)
        if config.pool != "none":
            layer(f"{config.pool} pooling {number}", maps, Window.of(config.window, config.window))
    return rows


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data, drawn by He's rule. Raises UserError where a layer does not fit (`stages`)."""
    channels, height, width = spec.shape
    last = stages(config, channels, height, width)[-1]
    padding = config.dilation * (config.kernel - 1) // 2 if config.padding is None else config.padding
    written = config.engine == "written"
    convolution, largest, mean = (
        (Convolution, MaxPool, MeanPool) if written else (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    )
    chain: list[nn.Module] = []
    for inputs, maps, groups in ((channels, config.maps, 1), (config.maps, 2 * config.maps, config.groups)):
        chain += [
            convolution(inputs, maps, config.kernel, config.stride, padding, config.dilation, groups),
            nn.ReLU(),
            {"max": largest(config.window), "mean": mean(config.window), "none": nn.Identity()}[config.pool],
        ]
    before = [Scramble(height, width)] if config.scramble else []
    before.append(Standardise(spec.mean if config.subtract else (0.0,) * channels, spec.std))
    classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(last["maps"] * last["height"] * last["width"], len(spec.classes))
    )
    return {"model": initialise(Network(nn.Sequential(*before), nn.Sequential(*chain), classifier), "he")}


@torch.no_grad()
def examine(config: Config, spec: Spec, model: Network, x: Tensor, photograph: Tensor) -> dict[str, float]:
    """The numbers of METRICS, for a trained network, test images (N, C, H, W) uint8 and a photograph as `looked_at` gives it."""
    own, theirs = (build(dataclasses.replace(config, engine=engine), spec)["model"] for engine in ("written", "torch"))
    for network in (own, theirs):
        network.to(x.device).eval().load_state_dict(model.state_dict())
    said = own(x).softmax(1)
    layers, pixels = stages(config, *spec.shape), model.before(x[:50])
    first, last = layers[1]["step"], layers[-1]["step"]
    features = model.features
    return {
        "torch_gap": float((theirs(x).softmax(1) - said).abs().max()),
        "flipped_gap": float((turned(own)(x).softmax(1) - said).abs().max()),
        "conv_gap": moved_gap(features[:1], pixels, 1, first),
        "pooled_gap": moved_gap(features, pixels, 1, last),
        "stride_gap": moved_gap(features, pixels, last, last),
        "border_error": border_error(photograph),
    }


@method("vision/convolution", paper="arXiv:1603.07285", section="5.1.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    run.describe(data.spec, data)
    layers = stages(config, *data.spec.shape)
    model = run.place(build(config, data.spec)["model"])
    assert isinstance(model, Network)
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, data, config.batch, config.shift, flip=False)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, recipe.rate(step))
        x, y = batch(step)
        with run.autocast():
            loss = F.cross_entropy(model(x), y)  # lines 1-3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()  # line 4
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    photograph, seen = looked_at(config.photograph, config.subtract)
    show(run, layers, model.before, model.features, data.test.x, photograph)
    pictures(run, model, data, model.features[0].weight)
    scores = evaluate(run, model, data, "test")
    return {**scores, **examine(config, data.spec, model.eval(), data.test.x.to(run.device), seen)}
