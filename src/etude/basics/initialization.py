"""Twenty layers: what the draw of the weights does to a signal and to its gradient

Paper: LeCun, Bottou, Orr & Müller, Efficient BackProp, 1998; Glorot & Bengio, Understanding the Difficulty of Training
Deep Feedforward Neural Networks, 2010; He, Zhang, Ren & Sun, Delving Deep into Rectifiers, 2015, arXiv:1502.01852; Saxe,
McClelland & Ganguli, Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Networks, 2013,
arXiv:1312.6120. The draws are in `etude.blocks.nn.init`.

Equation: zˡ = Wˡ aˡ⁻¹, aˡ = σ(zˡ), δˡ⁻¹ = σ'(zˡ⁻¹) ⊙ Wˡᵀ δˡ, where δ is the gradient at z. With D units in every layer and
Var W = s², rms(zˡ) ≈ √D s · rms(aˡ⁻¹), so after L layers
    linear   (√D s)ᴸ                      forward and backward: s² = 1/D keeps both
    relu     (√(D/2) s)ᴸ, about           E[relu(z)²] = ½E[z²]: s² = 2/D keeps both
    tanh     below (√D s)ᴸ                it squashes what is large; small signals pass as if linear

Algorithm:
1. for each initialiser and activation function: draw a network of L layers of D units, no bias
2. send a batch of inputs N(0, 1) forward; rms of z, histogram of a, inactive and dead ReLUs in each layer
3. send δᴸ ~ N(0, 1) backward; rms of δ in each layer
4. one layer of D ReLUs over real images, at bias 0 and at bias 0.1: inactive and dead units

Differences:
- E16: the notes' N(0, .0001) is a variance, σ = 0.01: 20 such layers leave 1e-13 of the signal.
- E17: the notes' "Xavier", 1/D, is LeCun's; Glorot's 2/(fan_in + fan_out) is the same number here only because all layers
  are square.
- E18: a ReLU halves the second moment of z, not its variance. 2/D keeps it at any depth; 1/D halves it in every layer.
- E19: at zero bias half of the units are *inactive* for an input. Dead is inactive for all of a data set. No unit of the
  first layer is, where pixels are standardised: then z has mean 0 over the images, so some are above. Of the 64 pixels of the
  bundled digits as they are, all positive, 2 % of the units get no image through. Deeper the share of dead units grows,
  for ReLU networks make all inputs more and more alike.
- E20: an orthogonal W has all singular values 1, and needs the gain √2 behind ReLUs (`orthogonal2`).

Expect: one core, 10 s → rms of z in layer 20: small 1.2e-13 (tanh); lecun 0.162 (tanh), 1.7e-3 (relu); he 1.2 (relu).
Command: `etude run basics/initialization`, or with MNIST's images `etude run basics/initialization --preset mnist`
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from etude import data as room
from etude.blocks.nn.init import Init, active_fraction, dead_fraction, initialise
from etude.blocks.nn.norm import Standardise
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Range
from etude.core.run import Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    width: Count = 512
    """Units D in every layer."""
    layers: Annotated[int, Range(1, 200)] = 20
    """Layers L; float32 holds the linear signal of He's draw, 2^(L/2), up to some 250."""
    batch: Count = 256
    """Inputs N(0, 1) that are sent through."""
    data: str = "digits"
    """Images for the count of dead units (digits, mnist, … or a folder of class-named image folders)."""
    images: Count = 1000
    """How many of them."""


PRESETS = {
    "tiny": Config(width=64, layers=8, batch=64, images=100),  # 1 s
    "default": Config(),  # 8 s → rms 1.2 after 20 ReLU layers of He's
    "mnist": Config(data="mnist", images=10_000),  # 10 s → no dead unit among 512
}

METRICS = {
    "rms_*": "root mean square of z in the last layer: activation function, draw",
    "relu_error": "largest deviation of ReLU networks from the closed form, in doublings (log₂)",
    "linear_error": "largest deviation of linear networks from the closed form, in doublings (log₂)",
    "inactive_images*": "share of (unit, image) pairs whose ReLU is at 0, in one layer at He's draw",
    "dead_images*": "share of units whose ReLU is at 0 for every image",
    "dead_last_layer": "share of units of the last layer of the deep network that are at 0 for every input",
}

EXPERIMENTS = (
    Experiment(
        "relu_he", preset="default", metric="rms_relu_he", bar=1.414, better="near", tolerance=0.265,
        published="√2 (He 2015, §2.2, in expectation)",
        controls=(Control("1/D behind ReLUs", metric="rms_relu_lecun"),),
    ),
    Experiment(
        "relu_layers", preset="default", metric="relu_error", bar=0.55, better="lower",
        notes="all six draws, forward and backward, in doublings: one layer too few is 1",
        controls=(
            Control("variances in place of second moments", swap={"passes": "etude.basics.parts.training_nulls.variance"}),
        ),
    ),
    Experiment(
        "linear_layers", preset="default", metric="linear_error", bar=0.086, better="lower",
        notes="all six draws, forward and backward, in doublings",
        controls=(Control("N(0, .0001) read as σ = .0001", swap={"deviation": "etude.basics.parts.training_nulls.squared"}),),
    ),
    Experiment(
        "tanh_glorot", preset="default", metric="rms_tanh_glorot", bar=0.1645, better="near", tolerance=0.002,
        controls=(Control("N(0, .0001)", metric="rms_tanh_small"),),
    ),
    Experiment(
        "none_dead", preset="default", metric="dead_images", bar=0.0, better="lower",
        controls=(
            Control("pixels as they are", swap={"Standardise": "etude.basics.parts.training_nulls.Raw"}),
            Control("in layer 20", metric="dead_last_layer"),
        ),
    ),
    Experiment(
        "none_dead_on_mnist", preset="mnist", flags={"layers": 2}, metric="dead_images", bar=0.0, better="lower",
        controls=(Control("inactive for four images", {"images": 4}),),
    ),
)  # fmt: skip

SETTINGS = {"data": "mnist"}

DRAWS: dict[str, tuple[Init, float]] = {
    "small": ("small", 1.0),
    "lecun": ("lecun", 1.0),
    "glorot": ("glorot", 1.0),
    "he": ("he", 1.0),
    "orthogonal": ("orthogonal", 1.0),
    "orthogonal2": ("orthogonal", math.sqrt(2)),
}
LABELS = ("small N(0, 0.01²)", "LeCun 1/D", "Glorot 2/(D + D)", "He 2/D", "orthogonal", "orthogonal × √2")
FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda z: z}
CASES = list(itertools.product(FUNCTIONS, DRAWS))
BINS = 61
STATISTICS = 10_000  # images that pixels are standardised by
TINIEST = 2.0**-126  # the last float32 with all its digits
INKS = (PALETTE[1], PALETTE[0], PALETTE[5], PALETTE[2], PALETTE[3], PALETTE[4])
THICK = (1.6, 6.0, 3.4, 4.5, 1.2, 1.2)  # lines of equal draws lie on each other: thin ones on thick ones


def forward(weights: Sequence[Tensor], x: Tensor, function: str) -> list[Tensor]:
    """The pre-activations z¹ … zᴸ, each (N, D), of inputs (N, D)."""
    found, a = [], x
    for weight in weights:
        found.append(a @ weight.T)
        a = FUNCTIONS[function](found[-1])
    return found


def backward(weights: Sequence[Tensor], z: Sequence[Tensor], last: Tensor, function: str) -> list[Tensor]:
    """The gradients δ¹ … δᴸ at the pre-activations, given δᴸ = `last` (N, D)."""
    found = [last]
    for weight, before in zip(reversed(weights[1:]), reversed(z[:-1])):
        down = found[-1] @ weight
        slope = {"tanh": lambda t: 1 - t.tanh() ** 2, "relu": lambda t: (t > 0).to(t.dtype), "linear": torch.ones_like}
        found.append(slope[function](before) * down)
    return found[::-1]


def deviation(name: str, width: int) -> float:
    """s of a draw by its name, for layers of `width` units."""
    return {"small": 0.01, "he": math.sqrt(2 / width), "orthogonal2": math.sqrt(2 / width)}.get(name, width**-0.5)


def passes(function: str) -> float:
    """The share of the second moment that a linear layer or a ReLU lets through."""
    return {"linear": 1.0, "relu": 0.5}[function]


def doublings(rms: np.ndarray, gradient: np.ndarray, function: str, width: int) -> float:
    """The largest |log₂(measured / closed form)| of zᴸ and δ¹ over all draws; `rms`, `gradient`: (6, L) by layer.

    With q = `passes`: rms(zᴸ) = √D s (√(q D) s)ᴸ⁻¹ and rms(δ¹) = (√(q D) s)ᴸ⁻¹ rms(δᴸ).
    """
    grows = math.sqrt(width) * np.array([deviation(name, width) for name in DRAWS])
    down = (math.sqrt(passes(function)) * grows) ** (rms.shape[1] - 1)
    pairs = ((rms[:, -1], grows * down), (gradient[:, 0], down * gradient[:, -1]))
    logs = [np.log2(np.maximum(one, TINIEST)) - np.log2(np.maximum(two, TINIEST)) for one, two in pairs]
    return float(np.abs(logs).max())


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return x.double().square().mean().sqrt().item()


def histogram(z: Tensor, function: str) -> np.ndarray:
    """Counts (BINS,) over [−1, 1] of the activations of tanh, over [−5, 5] of the pre-activations of the others."""
    return torch.histc(z.tanh() if function == "tanh" else z / 5, BINS, -1.0, 1.0).numpy()


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network is kept: each step draws one, measures it and forgets it."""
    return {}


@method("basics/initialization", paper="LeCun 1998; Glorot 2010; arXiv:1502.01852", section="4.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    shape = (len(CASES), config.layers)
    seen = Box(
        rms=np.zeros(shape),
        gradient=np.zeros(shape),
        inactive=np.zeros(shape),
        dead=np.zeros(shape),
        histogram=np.zeros((*shape, BINS), np.float32),
    )
    run.track(seen=seen)
    for step in run.steps(len(CASES)):  # line 1
        function, name = CASES[step]
        init, gain = DRAWS[name]
        draw = run.generator("draw", step)
        net = nn.ModuleList(nn.Linear(config.width, config.width, bias=False) for _ in range(config.layers))
        initialise(net, init, gain=gain, generator=draw)
        weights = [layer.weight.detach().to(run.device) for layer in net]
        x, last = (torch.randn(config.batch, config.width, generator=draw).to(run.device) for _ in range(2))
        z = forward(weights, x, function)  # line 2
        seen.rms[step] = [rms(layer) for layer in z]
        seen.inactive[step] = [1 - active_fraction(layer) for layer in z]
        seen.dead[step] = [dead_fraction(layer) for layer in z]
        seen.histogram[step] = [histogram(layer.cpu(), function) for layer in z]
        seen.gradient[step] = [rms(layer) for layer in backward(weights, z, last, function)]  # line 3
        run.log(**{f"rms_{function}_{name}": seen.rms[step, -1], f"gradient_{function}_{name}": seen.gradient[step, 0]})
    last = {case: float(seen.rms[i, -1]) for i, case in enumerate(CASES)}
    rows = {function: [i for i, case in enumerate(CASES) if case[0] == function] for function in FUNCTIONS}
    pixels = room.images(config.data).train.x[: max(config.images, STATISTICS)].flatten(1)
    run.artifact("depth", depth_figure(seen), "Signal forward and gradient backward, layer by layer.")
    run.artifact(
        "activations", histogram_figure(seen), "What tanh makes of z, and the z that ReLUs take, in three layers."
    )
    run.artifact("dead", dead_figure(seen), "Inactive for an input is not dead.")
    return {
        "rms_relu_he": last["relu", "he"],
        "rms_relu_lecun": last["relu", "lecun"],
        "rms_tanh_glorot": last["tanh", "glorot"],
        "rms_tanh_small": last["tanh", "small"],
        "relu_error": doublings(seen.rms[rows["relu"]], seen.gradient[rows["relu"]], "relu", config.width),
        "linear_error": doublings(seen.rms[rows["linear"]], seen.gradient[rows["linear"]], "linear", config.width),
        **census(pixels, config.images, config.width, run),  # line 4
        "dead_last_layer": float(seen.dead[CASES.index(("relu", "he")), -1]),
    }


def census(pixels: Tensor, images: int, width: int, run: Run) -> dict[str, float]:
    """Inactive and dead shares of `width` ReLUs over the first `images` of (N, D) `pixels` at He's draw, bias 0 and 0.1.

    Every pixel is standardised by itself, over all N. Otherwise what all images share pushes a unit the same way for
    each of them.
    """
    x = Standardise.fit(pixels)(pixels[:images]).to(run.device)
    found = {}
    for name, bias in (("", 0.0), ("_with_bias", 0.1)):
        layer = initialise(nn.Linear(x.shape[1], width), "he", bias=bias, generator=run.generator("census", 0))
        with torch.no_grad():
            z = layer.to(run.device)(x)
        found |= {f"inactive_images{name}": 1 - active_fraction(z), f"dead_images{name}": dead_fraction(z)}
    return found


# ----------------------------------------------------------------------------------------------------------- pictures


def depth_figure(seen: Box) -> Any:
    """rms of z (above) and of its gradient (below) against the layer, one plot an activation function."""
    figure, axes = panels(3, rows=2, width=10, height=6.0, sharex=True, sharey=True)
    layers = np.arange(1, seen.rms.shape[1] + 1)
    axes[0].set_yscale("log")
    axes[0].set_xticks(_ticks(len(layers)))
    for column, function in enumerate(FUNCTIONS):
        for row, (values, title) in enumerate(((seen.rms, "rms of z"), (seen.gradient, "rms of ∂L/∂z"))):
            here = axes[3 * row + column]
            for i, name in enumerate(DRAWS):
                line = values[CASES.index((function, name))]
                here.plot(layers, line, color=INKS[i], linewidth=THICK[i], label=LABELS[i])
            label(here, f"{function}: {title}", "layer" if row else "", title if column == 0 else "")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _ticks(depth: int) -> list[int]:
    """The first layer and some round numbers behind it."""
    gap = 5 * -(-depth // 30)
    return [1, *range(gap, depth + 1, gap)]


def histogram_figure(seen: Box) -> Any:
    """Histograms of tanh's activations (left) and before ReLUs (right), a row a draw, in the first, middle and last layer."""
    depth = seen.rms.shape[1]
    layers = sorted({1, (depth + 1) // 2, depth})
    shown = ("small", "glorot", "he")
    figure, both = panels(2, width=10, height=4.2)
    for axes, function, what in zip(
        both, ("tanh", "relu"), ("tanh: a = tanh(z), from −1 to 1", "relu: z, from −5 to 5")
    ):
        for row, name in enumerate(shown):
            case, i = CASES.index((function, name)), list(DRAWS).index(name)
            for column, layer in enumerate(layers):
                counts = seen.histogram[case, layer - 1]
                heights = 0.68 * counts / max(1, counts.max()) - row
                edges = column + np.linspace(0.04, 0.96, BINS + 1)
                axes.stairs(heights, edges, baseline=-row, fill=True, color=INKS[i])
                axes.plot(edges[[0, -1]], [-row, -row], color=SOFT, linewidth=0.6)
                spread = f"rms z = {seen.rms[case, layer - 1]:.2g}"
                axes.text(column + 0.96, 0.74 - row, spread, ha="right", fontsize=7.5, color=SOFT)
        axes.set_xticks(np.arange(len(layers)) + 0.5, [f"layer {layer}" for layer in layers])
        axes.set_yticks(0.3 - np.arange(len(shown)), [LABELS[list(DRAWS).index(name)] for name in shown])
        axes.set_ylim(0.98 - len(shown), 0.95)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        label(axes, what)
    both[1].set_yticks([])
    return figure


def dead_figure(seen: Box) -> Any:
    """Shares of inactive (unit, input) pairs and of dead units against the layer, He's ReLU network."""
    figure, (axes,) = panels(1, width=5.4, height=3.5)
    layers = np.arange(1, seen.rms.shape[1] + 1)
    case = CASES.index(("relu", "he"))
    axes.plot(
        layers, seen.inactive[case], color=PALETTE[0], linewidth=1.8, label="inactive: (unit, input) pairs with z ≤ 0"
    )
    axes.plot(layers, seen.dead[case], color=PALETTE[1], linewidth=1.8, label="dead: units with z ≤ 0 for every input")
    axes.axhline(0.5, color=SOFT, linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.02, 0.75)
    axes.set_xticks(_ticks(len(layers)))
    label(axes, "ReLU, He initialisation, bias 0", "layer", "share")
    legend(axes, loc="upper left")
    return figure
