"""Fast gradient sign method: one step inside a small ball makes a classifier wrong

Paper: Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial Examples, 2014, arXiv:1412.6572. The threat
    model (a ball of radius ε, and projection onto it): Madry et al., 2017, arXiv:1706.06083.

Equation: x* = clip(x + ε · sign(∇_x L(z(x), y)), low, high)   (ℓ∞; section 4 of the paper, and the clip)
          x* = clip(x + ε · ∇_x L / ‖∇_x L‖₂, low, high)       (ℓ2)
    with L the cross-entropy of the true class y. With a target class t the step goes down: x* = clip(x − ε · sign(∇_x
    L(z(x), t))). Against a linear classifier of two classes this is the worst case of the whole ball, with loss
    softplus(−y(w·x) + ε‖w‖₁), y = ±1 (ℓ2: ε‖w‖₂); against others it is a lower bound of the worst case.

Algorithm:
1. g ← ∇_x of the loss of each image, parameters held still, eval mode
2. d ← sign(g), or g / ‖g‖₂; negated when targeted
3. for each ε: x* ← clip(x + ε d, low, high);  count where argmax z(x*) = y

Differences:
- E124[B]: the result is clipped to the range of the pixels, and sign(0) = 0: a pixel without influence stays.
- ε is in pixel units, [0, 1]: networks standardise inside, and x outside [low, high] is refused, as standardised images
  would be.
- ∂L/∂z = p − e_y is divided by 1 − p_y, the probability of the other classes: the same sign and direction. Where the
  network is so sure that 1 − p_y is 0 in floating point, the cross-entropy has no gradient and the attack would seem
  to fail; this one does not.
- One gradient serves all ε of a curve (the step is the same). One step is not the strongest attack: the accuracies here
  bound the robust accuracy from above.

Expect: MNIST, 10,000 test images, seed 0, one thread: softmax regression (92.5 % clean) has 100 % error at ε = .25 with
    mean confidence 95 %; a 256-128 network (98.3 %) 82.5 / 37.9 / 0.5 % accuracy at ε = .05 / .1 / .25, 18 s with its
    training; LeNet (98.4 %) 83.8 / 57.1 / 9.5 %, 36 s. The default, LeNet on the bundled digits: 97.8 → 5 % at ε = .3.
Command: `etude run robustness/fgsm --source vision/lenet` after `etude run vision/lenet`;
    alone: `etude run robustness/fgsm`. In Python, any module: `fgsm(model, x, y, eps)`, and
    `explain(model, x, y, eps)` for the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude.blocks.attribution import chosen, input_gradient, panel, probabilities, verdicts
from etude.blocks.plots import curves
from etude.blocks.sources import Network, resolve
from etude.catalog import Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, NonNegative, Whole
from etude.core.errors import UserError
from etude.core.run import Run

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Config:
    source: str = "fresh"
    """A run folder, a method name (its latest run), or fresh: train a network first. In Python also a model object."""
    data: str = ""
    """Dataset or folder to attack; empty takes what the network was trained on (digits for a fresh one)."""
    network: Network = "lenet"
    """Kind of a fresh network; softmax is linear."""
    train_steps: Count = 300
    """Updates of a fresh network."""
    train_batch: Count = 128
    """Images in each of these updates."""
    eps: tuple[NonNegative, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    """Radii of the ball, in pixel units of [0, 1] (ℓ2: in the same units, over the whole image)."""
    norm: Literal["linf", "l2"] = "linf"
    """Ball: every pixel by at most ε, or the Euclidean length of the change."""
    target: Whole | None = None
    """Class number to be reached; none: away from the truth. Images of that class are left out of the count."""
    images: Count = 360
    """Test images to attack, drawn by the seed (all, where there are fewer)."""
    batch: Count = 60
    """Images in a step of the attack."""
    shown: Whole = 8
    """Images in the picture."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, images=40, batch=20, eps=(0.1, 0.25)),
    "default": Config(),
    "mnist": Config(data="mnist", network="mlp", train_steps=2344, images=10_000, batch=500, eps=(0.05, 0.1, 0.25)),
    "mnist_softmax": Config(
        data="mnist", network="softmax", train_steps=2344, images=10_000, batch=500, eps=(0.05, 0.1, 0.25)
    ),
    "mnist_lenet": Config(data="mnist", train_steps=938, images=10_000, batch=500, eps=(0.05, 0.1, 0.25)),
}

EXPERIMENTS = (
    Experiment(
        "softmax at 0.25",
        preset="mnist_softmax",
        metric="attacked_error",
        bar=0.99,
        published="0.999 with mean confidence 0.793 (shallow softmax, Goodfellow 2014, section 4)",
    ),
    Experiment(
        "multilayer at 0.25",
        preset="mnist",
        metric="attacked_error",
        bar=0.95,
        published="0.894 with mean confidence 0.976 (maxout network, Goodfellow 2014, section 4)",
    ),
)


def direction(model: nn.Module, x: Tensor, y: Tensor | int, targeted: bool = False, norm: Norm = "linf") -> Tensor:
    """Lines 1-2: the step of radius 1 that raises the loss of class y (lowers it when targeted) fastest; shape of x.

    x is floating (N, …) in the units the model takes, y int64 (N,) or one class number; the model returns logits
    (N, K), K ≥ 2, and is left as it was. An image whose gradient is 0 gets 0.
    """

    def rise(logits: Tensor) -> Tensor:  # (p − e_y) / (1 − p_y): the softmax of the other classes, −1 at y
        true = chosen(logits, y)[:, None]
        return logits.scatter(1, true, -torch.inf).softmax(1).scatter_(1, true, -1.0)

    gradient, _ = input_gradient(model, x, rise)
    if norm == "linf":
        step = gradient.sign_()
    else:
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)  # no square underflows
        length = flat.norm(dim=1, keepdim=True)
        step = (flat / length.clamp(min=1.0)).view_as(gradient)  # the largest entry is 1, so only 0 is shorter
    return step.neg_() if targeted else step


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor | int,
    eps: float,
    targeted: bool = False,
    low: float = 0.0,
    high: float = 1.0,
    norm: Norm = "linf",
) -> Tensor:
    """Adversarial images, detached, shape and dtype of x: within `eps` of x and inside [low, high].

    x is floating (N, …) inside [low, high], in the units the model takes; y, int64 (N,) or one class number, is the
    true class, or the wanted one when `targeted`. Works on any module with logits (N, K ≥ 2), leaves it as it was
    and computes no gradient of its parameters. Raises ValueError for x outside [low, high] or eps < 0.
    """
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")
    if x.numel():
        least, most = (float(value) for value in torch.aminmax(x.detach()))
        if not (low <= least and most <= high):
            raise ValueError(
                f"x lies in [{least:g}, {most:g}], not in [{low:g}, {high:g}]; give pixels and standardise inside "
                "the model, or pass low and high"
            )
    step = direction(model, x, y, targeted, norm)
    return torch.add(x.detach(), step, alpha=eps, out=step).clamp_(low, high)


def project(delta: Tensor, eps: float, norm: Norm = "linf") -> Tensor:
    """The nearest change inside the ball of radius `eps`, image by image: (N, …) → (N, …)."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.ndim - 1))
    return torch.where(length > eps, delta * (eps / length.clamp(min=torch.finfo(delta.dtype).tiny)), delta)


def explain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    names: Sequence[str] = (),
    targeted: bool = False,
    norm: Norm = "linf",
) -> Figure:
    """A picture for any module: image, change, attacked image, and the predictions before and after.

    x (N, C, H, W) with C = 1 or 3, in [0, 1]; y (N,); `names` of the classes (their numbers otherwise).
    """
    attacked = fgsm(model, x, y, eps, targeted, norm=norm)
    before, after = probabilities(model, x), probabilities(model, attacked)
    return _picture(
        x, attacked, before, after, names or [str(k) for k in range(before.shape[1])], None if targeted else y
    )


def _picture(
    x: Tensor, attacked: Tensor, before: Tensor, after: Tensor, names: Sequence[str], truth: Tensor | None
) -> Figure:
    change = attacked - x
    if x.shape[1] == 1:
        drawn = change[:, 0]
    else:
        drawn = 0.5 + 0.5 * change / change.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return panel({"image": x, "change": drawn, "attacked": attacked}, verdicts(before, after, names, truth))


@method("robustness/fgsm", paper="arXiv:1412.6572", section="9.3.1, 9.3.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if not config.eps:
        raise UserError("--eps is empty; give at least one radius, such as 0.1")
    if config.norm == "linf" and max(config.eps) > 1:
        raise UserError(
            f"--eps {max(config.eps):g} is more than a pixel's whole range, [0, 1]; 8/255 is written 0.0314"
        )
    source = resolve(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    names, radii = source.data.spec.classes, sorted(config.eps)
    if config.target is not None and config.target >= len(names):
        raise UserError(f"--target {config.target} is no class; {source.label} has 0 to {len(names) - 1}")
    run.describe(source.data.spec)
    x, y = source.choose(config.images, run.seed)
    if config.target is not None:
        x, y = x[y != config.target], y[y != config.target]
    if not len(y):
        raise UserError(f"all examined images are of class {config.target}, the target; take more --images")
    seen = Box(images=0, clean=0, right=[0] * len(radii), reached=[0] * len(radii), sure=[0.0] * len(radii))
    run.track(seen=seen)
    batches = -(-len(y) // config.batch)
    for step in run.steps(source.steps + batches):
        if step < source.steps:  # a fresh network learns first
            run.log(loss=source.learn(step))
            continue
        part = slice((step - source.steps) * config.batch, (step - source.steps + 1) * config.batch)
        image, true = x[part].to(run.device), y[part].to(run.device)
        aim = true if config.target is None else config.target
        towards = direction(source.model, image, aim, config.target is not None, config.norm)  # lines 1-2
        seen.images += len(true)
        seen.clean += int((probabilities(source.model, image).argmax(1) == true).sum())
        for i, eps in enumerate(radii):  # line 3
            sure, taken = probabilities(source.model, (image + eps * towards).clamp(0, 1)).max(1)
            wrong = taken != true
            seen.right[i] += int((~wrong).sum())
            seen.reached[i] += int((taken == config.target).sum()) if config.target is not None else 0
            seen.sure[i] += float(sure[wrong].sum())
        run.log(clean_accuracy=seen.clean / seen.images, attacked_accuracy=seen.right[-1] / seen.images)
    accuracy = [right / seen.images for right in seen.right]
    series = {source.label: ([0.0, *radii], [seen.clean / seen.images, *accuracy])}
    caption = f"Accuracy of {source.label} on {seen.images:,} test images by the radius of the attack ({config.norm})."
    run.artifact("accuracy", curves(series, x="ε", y="accuracy"), caption)
    table = [
        {"eps": eps, "accuracy": right, "mean_confidence_when_wrong": sure / max(seen.images - count, 1)}
        for eps, right, count, sure in zip(radii, accuracy, seen.right, seen.sure)
    ]
    run.artifact("table", {"source": source.label, "norm": config.norm, "rows": table}, "The same in numbers.")
    if config.shown:
        image, true = x[: config.shown].to(run.device), y[: config.shown].to(run.device)
        aim = true if config.target is None else config.target
        attacked = fgsm(source.model, image, aim, radii[-1], config.target is not None, norm=config.norm)
        before, after = probabilities(source.model, image), probabilities(source.model, attacked)
        caption = f"At ε = {radii[-1]:g}: the image, the change (red up, blue down), the sum, and what is seen in both."
        run.artifact("attacks", _picture(image, attacked, before, after, names, true), caption)
    found = {f"accuracy_at_{eps:g}": right for eps, right in zip(radii, accuracy)}
    if config.target is not None:
        found["target_reached"] = seen.reached[-1] / seen.images
    return found | {
        "clean_accuracy": seen.clean / seen.images,
        "attacked_error": 1 - accuracy[-1],
        "attacked_confidence": table[-1]["mean_confidence_when_wrong"],
    }
