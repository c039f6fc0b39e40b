"""MLP: a feed-forward network learns images as plain vectors of pixels

Paper: Rumelhart, Hinton, Williams, Learning Representations by Back-Propagating Errors, Nature 323, 1986; universal
approximation: Cybenko 1989.

Equation: a⁰ = x,  aˡ = σ(Wˡ aˡ⁻¹ + bˡ) for the hidden layers,  logits = Wᴸ aᴸ⁻¹ + bᴸ

Algorithm:
1. reshuffle the training set every epoch; take the next B images (mini-batch gradient descent, without replacement)
2. g ← (1/B) Σ ∇_θ −log p(y | x, θ)
3. θ ← update(θ, g)

Differences:
- E12: the notes print the update with −(1/B) Σ log p in place of its gradient; line 2 has the gradient.
- E13: the notes shuffle once 'in advance'. Here every epoch has its own permutation, and a batch may straddle two
  epochs, so no batch is short and every image is used exactly once an epoch.
- E15: `--normalizer` puts batch or layer normalisation between W a + b and σ (batch normalisation replaces b).
- E19: biases start at 0 unless `--initial-bias` says otherwise.
- E21: `--clip-norm` is one norm over all parameters of a network, the notes take one for each g_i; `--clip-value` clips
  element by element.
- E24: dropout's p is the probability of dropping; classic dropout multiplies by 1 − p at test (the notes: divides).
- `--ensemble` and `--combine` train several networks at once; `etude.blocks.classifying.ensembles` says how they
  differ.

Expect: one core: 0.978 on the bundled digits (64-64-10); MNIST 784-256-128-10: 0.974 in 6 s (5 epochs); softmax
    regression by 60 steps of gradient descent on all of MNIST 0.90 in 30 s; 2,000 images, 512-512 units: 0.934 with
    dropout, 0.926 without, in 7 s.
Command: `etude run basics/mlp --preset mnist`
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from etude import data as room
from etude import optim
from etude.blocks.classifying.batches import batches, subset
from etude.blocks.classifying.ensembles import Combine, Kind, first_network
from etude.blocks.classifying.recipe import Normalizer, Recipe, ensemble, normaliser
from etude.blocks.classifying.scores import evaluate, pictures
from etude.blocks.classifying.updates import clip, clipped_together, losses, newton_step, take_snapshot
from etude.blocks.nn.dropout import Dropout, Form
from etude.blocks.nn.init import Init, initialise
from etude.blocks.nn.norm import Standardise
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, fashion_mnist, kmnist, cifar10) or a folder of class-named image folders."""
    size: Count | None = None
    """Side of the input images in pixels; None keeps the dataset's own."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes all."""
    widths: tuple[Count, ...] = (256, 128)
    """Units of each hidden layer, first to last."""
    activation: Literal["relu", "tanh", "sigmoid"] = "relu"
    """Squashing function σ."""
    initializer: Init = "he"
    """How the weights are drawn."""
    initial_bias: float = 0.0
    """Initial value of all biases."""
    normalizer: Normalizer = "none"
    """Between W a + b and σ: batch normalisation (in place of b), layer normalisation, or none."""
    dropout: Fraction = 0.0
    """Probability that a hidden unit is dropped in training."""
    dropout_style: Form = "inverted"
    """inverted: divide by the probability of keeping in training; classic: multiply by it at test."""
    steps: Count = 400
    """Number of parameter updates."""
    batch: Count = 128
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "adam"
    """Update rule (newton, damped, is for networks of up to 3,000 parameters; give it --learning-rate 1)."""
    learning_rate: Positive = 1e-3
    """Learning rate (peak of the schedule)."""
    schedule: optim.Schedule = "constant"
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
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(widths=(32,), steps=30, batch=32),  # 1 s
    "default": Config(evaluate_every=100),  # → 0.975
    "digits": Config(widths=(64,), dropout=0.2, steps=2000, batch=32, learning_rate=1e-2, schedule="one_cycle"),
    "mnist": Config(data="mnist", steps=2110, evaluate_every=422),  # 5 epochs, 6 s → 0.974
    # softmax regression by gradient descent on all 54,000 images at once
    "softmax": Config(
        data="mnist",
        widths=(),
        initializer="small",
        steps=60,
        batch=54_000,
        optimizer="sgd",
        learning_rate=0.12,
        evaluate_every=20,
    ),
    # all digits at once: loss 2.3 → 0.21 in the first step, 0.036 in seven
    "newton": Config(widths=(), initializer="small", steps=8, batch=1293, optimizer="newton", learning_rate=1.0),
    # 51 epochs of 2,000 images: 0.934 against 0.926 with --dropout 0 (means of seeds 0-2)
    "dropout": Config(
        data="mnist",
        examples=2000,
        widths=(512, 512),
        dropout=0.5,
        steps=800,
        learning_rate=2e-3,
        schedule="one_cycle",
        evaluate_every=200,
    ),
}

EXPERIMENTS = (
    Experiment(
        "mnist",
        preset="mnist",
        metric="test_accuracy",
        bar=0.97,
        published="0.984 (2 hidden layers of 800 units, all 60,000 images, Srivastava 2014)",
        notes="784-256-128-10, 5 epochs of 54,000 images",
        controls=(Control("no hidden layer", flags={"widths": ()}),),
    ),
    Experiment(
        "digits, 64-64-10",
        preset="digits",
        metric="test_accuracy",
        bar=0.97,
        notes="1,293 training images of 8×8 pixels, 360 test images",
        controls=(Control("no hidden layer", flags={"widths": (), "dropout": 0.0}),),
    ),
    Experiment(
        "softmax regression, gradient descent on the whole training set",
        preset="softmax",
        metric="test_accuracy",
        bar=0.89,
        published="0.880 (linear classifier, 60,000 images, LeCun 1998)",
        notes="60 updates at a constant learning rate on standardised pixels",
        controls=(Control("one update", flags={"steps": 1}),),
    ),
    Experiment(
        "dropout 0.5, 2,000 images",
        preset="dropout",
        metric="test_accuracy",
        bar=0.93,
        published="0.9894 (3 × 1024 units, dropout and max-norm, all 60,000 images, Srivastava 2014)",
        notes="784-512-512-10; what dropout gains over the same run without it, the control",
        controls=(Control("no dropout", flags={"dropout": 0.0}),),
    ),
)

SETTINGS = {
    "data": "mnist",
    "size": 6,
    "examples": 100,
    "dropout_style": {"dropout": 0.5, "dropout_style": "classic"},
    "optimizer": "sgd",  # adamw is adam where nothing decays
    "clip_norm": 0.5,
    "clip_value": 0.01,
    "members": {"ensemble": "seeds", "members": 2},
    "combine": {"ensemble": "seeds", "combine": "vote"},
}

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class MLP(nn.Module):
    """Inputs (N, C, …), uint8 or float in [0, 1] → logits (N, classes).

    `inputs` is the number of values in one example, `mean` and `std` their per-channel statistics in [0, 1] units.
    """

    def __init__(
        self,
        inputs: int,
        widths: tuple[int, ...],
        classes: int,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        activation: str = "relu",
        dropout: float = 0.0,
        dropout_style: Form = "inverted",
        normalizer: Normalizer = "none",
    ) -> None:
        super().__init__()
        self.standardise = Standardise(mean, std)
        hidden: list[nn.Module] = []
        for before, after in pairwise((inputs, *widths)):
            hidden.append(nn.Linear(before, after, bias=normalizer != "batch"))
            hidden += [*normaliser(normalizer, after), ACTIVATIONS[activation]()]
            if dropout:
                hidden.append(Dropout(dropout, dropout_style))
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear((inputs, *widths)[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.standardise(x))


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network for this data, drawn by `config.initializer`, or the ensemble of such networks."""

    def network() -> nn.Module:
        model = MLP(
            prod(spec.shape), config.widths, len(spec.classes), spec.mean, spec.std,
            config.activation, config.dropout, config.dropout_style, config.normalizer,
        )  # fmt: skip
        return initialise(model, config.initializer, bias=config.initial_bias)

    return {"model": ensemble(network, config)}


@method("basics/mlp", paper="Rumelhart et al. 1986", section="4.1", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    recipe = Recipe.of(config)
    if not config.widths and (config.dropout or config.normalizer != "none"):
        raise UserError("--dropout and --normalizer act on hidden units, and --widths names none; give --widths 256")
    if config.normalizer == "layer" and 1 in config.widths:
        raise UserError("--normalizer layer makes a layer of one unit constant; give it more --widths")
    data = subset(room.images(config.data, config.size), config.examples, run.seed)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    optimizer = recipe.make_optimizer(model, run)
    batch = batches(run, recipe, model, data)
    together = clipped_together(model)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(config.steps):
        set_lr(optimizer, recipe.rate(step))
        x, y = batch(step)  # line 1
        if config.optimizer == "newton":
            loss = newton_step(run, optimizer, model, x, y)
        else:
            with run.autocast():
                total, loss = losses(model, x, y)  # of an ensemble: the sum over its members, and their mean
            optimizer.zero_grad()
            total.backward()  # line 2
            run.average(model, loss=loss)
            clip(together, config.clip_norm, config.clip_value)
            optimizer.step()  # line 3
        if step in recipe.moments:
            take_snapshot(run, model, data)
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    pictures(run, model, data, first_network(model).layers[1].weight)
    return evaluate(run, model, data, "test")
