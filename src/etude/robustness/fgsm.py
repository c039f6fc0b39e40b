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
4. the same with a random direction of the same size in place of d; at the largest ε also with −d

Differences:
- E124[B]: the result is clipped to the range of the pixels, and sign(0) = 0: a pixel without influence stays.
- ε is in pixel units, [0, 1]: networks standardise inside, and x outside [low, high] is refused, as standardised images
  would be.
- ∂L/∂z = p − e_y is divided by 1 − p_y, the probability of the other classes: the same sign and direction. Where the
  network is so sure that 1 − p_y is 0 in floating point, the cross-entropy has no gradient and the attack would seem
  to fail; this one does not.
- Line 4 is not in the paper: it shows that the direction does it, not the size. Random signs (ℓ2: a random direction) of
  the same ε change few verdicts (`noise_error`), and a step the other way helps the network (`reversed_error`).
- One gradient serves all ε of a curve (the step is the same). One step is not the strongest attack: the accuracies here
  bound the robust accuracy from above.

Expect: MNIST, 10,000 test images, seeds 0-2, one thread, 10 s with the training: softmax regression (92.6 % clean) has 31 /
    1.4 / 0 % accuracy at ε = .05 / .1 / .25, and is sure by 95 % of what it gets wrong there; a 256-128 network (98.3 %)
    81 / 37 / 0.7 %. Random signs of size .25: 17 and 4 % error. The default, LeNet on the bundled digits: 98 → 5 % at ε = .3.
Command: `etude run robustness/fgsm --source vision/lenet` after `etude run vision/lenet`;
    alone: `etude run robustness/fgsm`. In Python, any module: `fgsm(model, x, y, epsilon)`, and
    `explain(model, x, y, epsilon)` for the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude.blocks.looking.attribution import chosen, input_gradient, panel, probabilities, verdicts
from etude.blocks.looking.sources import Network, resolve, rounds
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, Idle, method
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
    epsilon: tuple[NonNegative, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    """Radii of the ball, in pixel units of [0, 1] (ℓ2: in the same units, over the whole image)."""
    norm: Literal["linf", "l2"] = "linf"
    """Ball: every pixel by at most ε, or the Euclidean length of the change."""
    target: Whole | None = None
    """Class number to be reached; none: away from the truth. Images of that class are left out of the count."""
    images: Count = 360
    """Test images to attack, drawn by the seed (all, where there are fewer)."""
    batch: Count = 60
    """Images in a round of the attack."""
    shown: Whole = 8
    """Images in the picture."""


PRESETS = {
    "tiny": Config(train_steps=30, train_batch=32, images=40, batch=20, epsilon=(0.1, 0.25)),
    "default": Config(),
    "mnist": Config(data="mnist", network="mlp", train_steps=2344, images=10_000, batch=500, epsilon=(0.05, 0.1, 0.25)),
    "mnist_softmax": Config(
        data="mnist", network="softmax", train_steps=2344, images=10_000, batch=500, epsilon=(0.05, 0.1, 0.25)
    ),
    "mnist_lenet": Config(data="mnist", train_steps=938, images=10_000, batch=500, epsilon=(0.05, 0.1, 0.25)),
}

SETTINGS = {
    "source": Idle("a sweep has no other run to name; tests/facts/blocks/test_sources.py examines several"),
    "data": "mnist",
    "batch": Idle("each image is attacked by itself; a larger batch only takes more memory"),
}

SIGNS = Control("random signs of the same size", metric="noise_error")
AWAY = Control("a step against the gradient", metric="reversed_error")

METRICS = {
    "accuracy_at_*": "accuracy on images attacked at this ε",
    "clean_accuracy": "accuracy on the same images, not attacked",
    "attacked_error": "share answered wrongly at the largest ε",
    "attacked_confidence": "mean probability of the answer where it is wrong, at the largest ε",
    "noise_error": "share answered wrongly if the signs are drawn by chance, at the largest ε",
    "reversed_error": "share answered wrongly if the step goes the other way, at the largest ε",
    "target_reached": "share answered with the --target class at the largest ε",
}

EXPERIMENTS = (
    Experiment(
        "softmax at 0.25",
        preset="mnist_softmax",
        metric="attacked_error",
        bar=0.99,
        published="0.999 with mean confidence 0.793 (shallow softmax, Goodfellow 2014, section 4)",
        notes="Theirs was trained otherwise: the paper does not say how. Ours: 2,344 updates of Adam, clean error 0.075.",
        controls=(SIGNS, AWAY, Control("ε = 0", flags={"epsilon": (0.0,)})),
    ),
    Experiment(
        "multilayer at 0.25",
        preset="mnist",
        metric="attacked_error",
        bar=0.99020,
        published="0.894 with mean confidence 0.976 (maxout network, Goodfellow 2014, section 4)",
        notes="Theirs is a maxout network with dropout, clean error 0.0094; ours has 256 and 128 ReLUs, clean error 0.02.",
        controls=(SIGNS, AWAY),
    ),
    Experiment(
        "what softmax regression gets right when nobody attacks",
        preset="mnist_softmax",
        metric="clean_accuracy",
        bar=0.925,
        better="near",
        tolerance=0.01,
        published="0.880 (linear classifier, trained otherwise, LeCun 1998)",
        controls=(
            Control("one update", flags={"train_steps": 1}),
            Control("the attacked images", metric="accuracy_at_0.25"),
        ),
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
    epsilon: float,
    targeted: bool = False,
    low: float = 0.0,
    high: float = 1.0,
    norm: Norm = "linf",
) -> Tensor:
    """Adversarial images, detached, shape and dtype of x: within `epsilon` of x and inside [low, high].

    x is floating (N, …) inside [low, high], in the units the model takes; y, int64 (N,) or one class number, is the
    true class, or the wanted one when `targeted`. Works on any module with logits (N, K ≥ 2), leaves it as it was
    and computes no gradient of its parameters. Raises ValueError for x outside [low, high] or epsilon < 0.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; it must be at least 0")
    if x.numel():
        least, most = (float(value) for value in torch.aminmax(x.detach()))
        if not (low <= least and most <= high):
            raise ValueError(
                f"x lies in [{least:g}, {most:g}], not in [{low:g}, {high:g}]; give pixels and standardise inside "
                "the model, or pass low and high"
            )
    step = direction(model, x, y, targeted, norm)
    return torch.add(x.detach(), step, alpha=epsilon, out=step).clamp_(low, high)


def noise(x: Tensor, generator: torch.Generator, norm: Norm = "linf") -> Tensor:
    """Line 4: a random step of radius 1 for each image, the shape of x: every pixel ±1, or a direction of length 1."""
    drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return drawn.sign_() if norm == "linf" else drawn / drawn.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def project(delta: Tensor, epsilon: float, norm: Norm = "linf") -> Tensor:
    """The nearest change inside the ball of radius `epsilon`, image by image: (N, …) → (N, …)."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.ndim - 1))
    return torch.where(length > epsilon, delta * (epsilon / length.clamp(min=torch.finfo(delta.dtype).tiny)), delta)


def explain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    names: Sequence[str] = (),
    targeted: bool = False,
    norm: Norm = "linf",
) -> Figure:
    """A picture for any module: image, change, attacked image, and the predictions before and after.

    x (N, C, H, W) with C = 1 or 3, in [0, 1]; y (N,); `names` of the classes (their numbers otherwise).
    """
    attacked = fgsm(model, x, y, epsilon, targeted, norm=norm)
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
    if not config.epsilon:
        raise UserError("--epsilon is empty; give at least one radius, such as 0.1")
    if config.norm == "linf" and max(config.epsilon) > 1:
        raise UserError(
            f"--epsilon {max(config.epsilon):g} is more than a pixel's whole range, [0, 1]; 8/255 is written 0.0314"
        )
    source = resolve(run, config.source, config.data, config.network, config.train_steps, config.train_batch)
    names, radii = source.spec.classes, sorted(config.epsilon)
    if config.target is not None and config.target >= len(names):
        raise UserError(f"--target {config.target} is no class; {source.label} has 0 to {len(names) - 1}")
    run.describe(source.spec, source)
    x, y = source.choose(config.images, run.seed)
    if config.target is not None:
        x, y = x[y != config.target], y[y != config.target]
    if not len(y):
        raise UserError(f"all examined images are of class {config.target}, the target; take more --images")
    for step in run.steps(source.steps):  # a fresh network learns first
        run.log(loss=source.learn(step))
    clean = reached = reversed_ = 0
    right, noisy, sure = [0] * len(radii), [0] * len(radii), [0.0] * len(radii)
    chances = noise(x, run.generator("noise"), config.norm).split(config.batch)
    for number, image, true in rounds(run, x, y, config.batch):
        aim = true if config.target is None else config.target
        towards = direction(source.model, image, aim, config.target is not None, config.norm)  # lines 1-2
        chance = chances[number].to(run.device)
        clean += int((probabilities(source.model, image).argmax(1) == true).sum())
        for i, epsilon in enumerate(radii):  # line 3
            surest, taken = probabilities(source.model, (image + epsilon * towards).clamp(0, 1)).max(1)
            wrong = taken != true
            right[i] += int((~wrong).sum())
            sure[i] += float(surest[wrong].sum())
            blurred = probabilities(source.model, (image + epsilon * chance).clamp(0, 1))  # line 4
            noisy[i] += int((blurred.argmax(1) == true).sum())
        reached += int((taken == config.target).sum()) if config.target is not None else 0
        away = probabilities(source.model, (image - radii[-1] * towards).clamp(0, 1))
        reversed_ += int((away.argmax(1) == true).sum())
    count, accuracy, untouched = len(y), [n / len(y) for n in right], clean / len(y)
    series = {
        "attacked": ([0.0, *radii], [untouched, *accuracy]),
        "random noise of the same size": ([0.0, *radii], [untouched, *(n / count for n in noisy)]),
    }
    caption = f"{source.label}: accuracy on {count:,} of them by the radius of the attack ({config.norm})."
    run.artifact("accuracy", curves(series, x="ε", y="accuracy"), caption)
    table = [
        {"epsilon": e, "accuracy": n / count, "accuracy_under_noise": m / count, "mean_confidence_when_wrong": s}
        for e, n, m, s in zip(radii, right, noisy, (s / max(count - n, 1) for s, n in zip(sure, right)))
    ]
    run.artifact("table", {"source": source.label, "norm": config.norm, "rows": table}, "The same in numbers.")
    if config.shown:
        image, true = x[: config.shown].to(run.device), y[: config.shown].to(run.device)
        aim = true if config.target is None else config.target
        attacked = fgsm(source.model, image, aim, radii[-1], config.target is not None, norm=config.norm)
        before, after = probabilities(source.model, image), probabilities(source.model, attacked)
        caption = (
            f"{source.label}, at ε = {radii[-1]:g}: the image, the change (red up, blue down), the sum, and what is seen "
            "in both."
        )
        run.artifact("attacks", _picture(image, attacked, before, after, names, true), caption)
    found = {f"accuracy_at_{epsilon:g}": share for epsilon, share in zip(radii, accuracy)}
    if config.target is not None:
        found["target_reached"] = reached / count
    return found | {
        "clean_accuracy": untouched,
        "attacked_error": 1 - accuracy[-1],
        "attacked_confidence": table[-1]["mean_confidence_when_wrong"],
        "noise_error": 1 - noisy[-1] / count,
        "reversed_error": 1 - reversed_ / count,
    }
