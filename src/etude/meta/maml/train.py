"""MAML: initial weights from which a few gradient steps learn a new task

Paper: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017, arXiv:1703.03400.

Equation: θ'_i = θ − α ∇_θ L_i(θ; D_i^support)    (one or more such steps)
    min_θ Σ_i L_i(θ'_i; D_i^query),    whose gradient is Σ_i (I − α ∇² L_i(θ; support)) ∇L_i(θ'_i; query) for one step

Algorithm: (paper, Algorithms 1 and 2)
1. while not done
2.     draw a batch of tasks i, each with a support set and a query set
3.     θ'_i ← θ, then `inner_steps` times: θ'_i ← θ'_i − α ∇ L_i(θ'_i; support)      for all tasks at once
4.     θ ← Adam(∇_θ mean_i L_i(θ'_i; query))

Differences:
- E131: the notes' one inner step is the special case; line 3 takes any number, and its gradient flows through all of them.
- `--order first` is the paper's first-order variant: θ'_i counts as θ plus a constant. `--inner-steps 0` is joint pre-training
  on all tasks, the baseline of the paper's Figure 2; it still adapts when tested. `--joint` trains that baseline beside ours,
  on the same tasks from the same weights. The paper tunes the baseline's rate when it adapts: so does `--joint`, on
  validation tasks, among α times ¼, ½, 1, 2, 4, for the smallest error after the last step.
- Batch norm: the paper's code normalises the query with the query's own statistics, so that an answer depends on which
  other questions are asked (transductive). Here `--normalizer support` (default) takes mean and variance from the *support*
  set, for support and query alike: answers do not depend on order or number of queries. `--normalizer transductive` gives
  the paper's, and its scores are called `test_transductive_error_k`. There are no running statistics in either.
- The tasks of a batch are one batched computation (`torch.vmap` over per-task weights, a grouped convolution). The paper
  loops over tasks.
- Omniglot: 28×28 drawings. The test has the 659 evaluation characters; of the 964 background characters those of every sixth
  alphabet validate (158) and the others train, also turned by 90°, 180°, 270°. No alphabet is in two of the three parts.
  The paper shuffles all characters together (1,200 to train).

Expect: CPU (one core) 30 s → sinusoid error 0.48 after one step, 0.14 after ten (joint pre-training: 2.5 and 1.6);
    2 min → Omniglot 5-way 1-shot 0.149 wrong after three steps, 2 min → 5-shot 0.063 wrong (seed 0).
Command: `etude run meta/maml`, `etude run meta/maml --preset omniglot`
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Positive, Range, Whole
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.core.spec import Spec
from etude.meta.maml.adaptation import Loss, Predict, adapt, batched, meta_loss, plain
from etude.meta.maml.networks import Convolutional, Regressor, answer
from etude.meta.maml.pictures import curves, episode
from etude.meta.maml.tasks import Task, episodes, sinusoids

QUERIES = {"sinusoid": 100, "omniglot": 15}
"""Queries of a validation or test task (Omniglot: of each character, or as many drawings as are left)."""


@dataclass(frozen=True)
class Config:
    data: Literal["sinusoid", "omniglot"] = "sinusoid"
    """Family of tasks: sinusoids of random amplitude and phase, or telling W new characters apart."""
    ways: Count = 5
    """Omniglot: characters in a task."""
    shots: Count = 10
    """Support examples (Omniglot: of each character)."""
    queries: Count = 10
    """Query examples in training (Omniglot: of each character)."""
    tasks: Count = 25
    """Tasks in a meta-batch."""
    steps: Count = 12_000
    """Number of meta-updates."""
    inner_steps: Annotated[int, Range(0, 10_000)] = 1
    """Gradient steps on the support set in training; 0: joint pre-training."""
    inner_learning_rate: Positive = 0.01
    """Learning rate α of the inner steps."""
    order: Literal["second", "first"] = "second"
    """second: the full meta-gradient; first: FOMAML."""
    normalizer: Literal["support", "transductive"] = "support"
    """Omniglot: whose statistics the batch norms use for the query (transductive: its own, as in the paper's code)."""
    width: Count = 40
    """Hidden units (sinusoid) or channels (Omniglot)."""
    learning_rate: Positive = 1e-3
    """Adam's rate for θ."""
    joint: bool = False
    """Also pre-train a second network jointly, on the same tasks from the same weights, and compare."""
    validation_tasks: Count = 200
    """Fresh tasks in a validation."""
    test_tasks: Count = 1000
    """Fresh tasks in the test."""
    test_steps: Few = 10
    """Most gradient steps taken in validation and test."""
    evaluate_every: Whole = 2000
    """Meta-updates between validations (0: only at the end)."""


OMNIGLOT = {
    "data": "omniglot",
    "queries": 5,
    "inner_learning_rate": 0.4,
    "width": 32,
    "validation_tasks": 50,
    "test_tasks": 400,
    "test_steps": 3,
    "learning_rate": 2e-3,
    "evaluate_every": 250,
}

PRESETS = {
    "tiny": Config(steps=30, tasks=4, joint=True, validation_tasks=20, test_tasks=20),  # 1 s
    "default": Config(),  # 30 s → 0.47 after one step
    "joint": Config(joint=True),  # 45 s
    "first_order": Config(order="first"),
    "omniglot": Config(shots=1, tasks=8, steps=1000, **OMNIGLOT),  # 2 min → 0.149 wrong after three steps
    "omniglot_5shot": Config(shots=5, tasks=4, steps=500, **OMNIGLOT),  # 2 min → 0.063 wrong after three steps
}

CHARACTERS = {"data": "omniglot", "shots": 1, "queries": 1, "width": 4, "tasks": 2, "steps": 2, "test_steps": 1}
SETTINGS = {
    "data": CHARACTERS,
    "ways": CHARACTERS | {"ways": 3},
    "normalizer": CHARACTERS | {"normalizer": "transductive"},
    "evaluate_every": 10,
}

BEFORE = Control("before any gradient step", metric="test_error_0")
UNTRAINED = Control("an untrained network, adapted in the same way", flags={"steps": 1})
METRICS = {
    "test_error_*": "mean squared error on new tasks after this many inner steps",
    "test_accuracy_*": "accuracy on new tasks after this many inner steps",
    "test_joint_error_*": "the same of a network trained on all tasks together, then tuned at its own best rate",
    "test_joint_accuracy_*": "the same of a network trained on all tasks together, then tuned at its own best rate",
    "joint_inner_learning_rate": "the inner learning rate that validation chose for that network",
    "test_times_better_*": "joint error over ours after this many inner steps",
}

EXPERIMENTS = (
    Experiment(
        "sinusoid, one step",
        preset="joint",
        metric="test_error_1",
        bar=0.57,
        better="lower",
        controls=(Control("joint pre-training, adapted by one step", metric="test_joint_error_1"), BEFORE),
    ),
    Experiment(
        "sinusoid, ten steps",
        preset="joint",
        metric="test_error_10",
        bar=0.17,
        better="lower",
        controls=(Control("joint pre-training, adapted by ten steps", metric="test_joint_error_10"), BEFORE),
    ),
    Experiment(
        "sinusoid, times better than joint pre-training",
        preset="joint",
        metric="test_times_better_1",
        bar=4.2,
        controls=(
            Control("before any gradient step", metric="test_times_better_0"),
            Control("no inner steps in training", flags={"inner_steps": 0}),
        ),
    ),
    Experiment(
        "omniglot 5-way 1-shot",
        preset="omniglot",
        metric="test_error_3",
        bar=0.175,
        better="lower",
        published="0.013 (Finn 2017: 64 channels, 60,000 updates of 32 tasks, 1,200 characters, transductive)",
        controls=(BEFORE, UNTRAINED),
    ),
    Experiment(
        "omniglot 5-way 5-shot",
        preset="omniglot_5shot",
        metric="test_error_3",
        bar=0.075,
        better="lower",
        published="0.001 (Finn 2017: 64 channels, 60,000 updates of 32 tasks, 1,200 characters, transductive)",
        controls=(BEFORE, UNTRAINED),
    ),
)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of this family of tasks, and the one that is pre-trained jointly."""
    model = Regressor(config.width) if config.data == "sinusoid" else Convolutional(config.ways, config.width)
    return {"model": model} | ({"joint": copy.deepcopy(model)} if config.joint else {})


def draw_tasks(
    config: Config, drawings: Tensor | None, tasks: int, queries: int, dice: torch.Generator, turn: bool
) -> Task:
    """Line 2, for either family."""
    if drawings is None:
        return sinusoids(tasks, config.shots, queries, dice)[0]
    return episodes(drawings, tasks, config.ways, config.shots, queries, dice, turn)


# ---------------------------------------------------------------------------------------------------------- loop


@method("meta/maml", paper="arXiv:1703.03400", section="10.3.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    learn, validation, test = _drawings(config)
    run.describe(Spec())
    nets = {name: run.place(net) for name, net in build(config, Spec()).items()}
    optimizers = {name: optim.make("adam", net.parameters(), config.learning_rate) for name, net in nets.items()}
    run.track(**nets, **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()})
    loss: Loss = F.mse_loss if learn is None else F.cross_entropy
    alpha = config.inner_learning_rate

    for step in run.steps(config.steps):  # line 1
        dice = run.generator("tasks", step)
        task = draw_tasks(config, learn, config.tasks, config.queries, dice, turn=True).to(run.device)  # line 2
        for name, net in nets.items():
            inner_steps = config.inner_steps if name == "model" else 0
            value = meta_loss(net, loss, task, alpha, inner_steps, config.order, _predict(config, net))  # line 3
            optimizers[name].zero_grad()
            value.backward()
            run.average(net, loss=value)
            optimizers[name].step()  # line 4
            run.log(**{"loss" if name == "model" else f"{name}_loss": value})
        if run.every(config.evaluate_every):
            seen = errors(config, run, nets["model"], validation, "validation", alpha)
            run.log(**_named(config, "validation", {k: seen[k] for k in (1, config.test_steps)}))
    found, rates = errors(config, run, nets["model"], test, "test", alpha), {"model": alpha}
    scores = _named(config, "test", found)
    if config.joint:
        last = max(found)
        rates["joint"] = tuned = min(
            (alpha * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)),
            key=lambda rate: _finite(errors(config, run, nets["joint"], validation, "validation", rate)[last]),
        )
        others = errors(config, run, nets["joint"], test, "test", tuned)
        scores |= _named(config, "test_joint", others) | {"joint_inner_learning_rate": tuned}
        scores |= {f"test_times_better_{step}": others[step] / found[step] for step in found}
    _picture(config, run, nets, rates, test)
    return scores


def errors(
    config: Config, run: Run, model: nn.Module, drawings: Tensor | None, part: str, rate: float
) -> dict[int, float]:
    """The error on the query sets of fresh tasks after k gradient steps of size `rate`, by k: mean over tasks.

    Mean squared error for sinusoids, share of wrong answers for characters. The tasks of a part ("validation", "test") are
    a function of the seed.
    """
    loss: Loss = F.mse_loss if drawings is None else F.cross_entropy
    predict = _predict(config, model)
    dice = generator(run.seed, 0, 0, f"{part} tasks")
    tasks = config.validation_tasks if part == "validation" else config.test_tasks
    queries = QUERIES[config.data] if drawings is None else min(QUERIES[config.data], 20 - config.shots)
    sums = {step: 0.0 for step in sorted({0, 1, 3, 5, 10, config.test_steps}) if step <= config.test_steps}
    for done in range(0, tasks, 50):
        count = min(50, tasks - done)
        task = draw_tasks(config, drawings, count, queries, dice, turn=False).to(run.device)
        weights = {name: w.detach().requires_grad_() for name, w in batched(model, count).items()}
        for step in range(config.test_steps + 1):
            if step:
                weights = adapt(predict, loss, weights, task, rate, 1, "first")
                weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
            if step in sums:
                with torch.no_grad():
                    out = torch.vmap(predict)(weights, task.query_x, task.support_x)
                    wrong = out.argmax(-1) != task.query_y if drawings is not None else (out - task.query_y).square()
                    sums[step] += float(wrong.cpu().double().flatten(1).mean(1).sum())
    return {step: total / tasks for step, total in sums.items()}


def _finite(value: float) -> float:
    """The value, or ∞ where a rate was so large that nothing came of it."""
    return value if math.isfinite(value) else math.inf


def _predict(config: Config, model: nn.Module) -> Predict:
    return plain(model) if config.data == "sinusoid" else answer(model, config.normalizer)


def _named(config: Config, part: str, found: dict[int, float]) -> dict[str, float]:
    """`part_error_k`, or `part_transductive_error_k` where the answers saw each other."""
    kind = "transductive_error" if config.data == "omniglot" and config.normalizer == "transductive" else "error"
    return {f"{part}_{kind}_{step}": value for step, value in found.items()}


def _drawings(config: Config) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Training, validation and test characters (uint8 (classes, 20, 28, 28)) of disjoint alphabets; None for sinusoids."""
    if config.data == "sinusoid":
        return None, None, None
    if config.shots + config.queries > 20:
        raise UserError(
            f"--shots {config.shots} and --queries {config.queries} need more than the 20 drawings of a character"
        )
    from etude.data import characters
    from etude.data.omniglot import validating

    sets = characters("omniglot", size=28)
    held = torch.tensor(validating(sets.background.alphabets))
    parts = sets.background.x[~held], sets.background.x[held], sets.evaluation.x
    fewest = min(map(len, parts))
    if config.ways > fewest:
        raise UserError(
            f"--ways {config.ways} is more than the {fewest} characters there are to validate with or to test"
        )
    return parts


def _picture(
    config: Config, run: Run, nets: dict[str, nn.Module], rates: dict[str, float], drawings: Tensor | None
) -> None:
    """What adaptation does: curves of a few sinusoids before and after, or one episode with its answers."""
    dice = generator(run.seed, 0, 0, "pictures")
    if drawings is None:
        titles = {"model": "MAML" if config.inner_steps else "no inner steps", "joint": "joint pre-training"}
        rows = {titles[name]: (net, rates[name]) for name, net in nets.items()}
        figure = curves(rows, config.test_steps, config.shots, dice)
        caption = f"Three new sinusoids, {config.shots} points each, before and after gradient steps."
        run.artifact("adaptation", figure, caption)
        return
    queries = min(4, 20 - config.shots)
    task = episodes(drawings, 1, config.ways, config.shots, queries, dice, turn=False)
    predict, alpha = _predict(config, nets["model"]), rates["model"]
    figure = episode(nets["model"], predict, alpha, config.test_steps, config.ways, task)
    caption = f"One test task: new characters by number, and answers to {queries} queries of each (wrong ones red)."
    run.artifact("episode", figure, caption)
