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
- `--order first` is the paper's first-order variant: θ'_i counts as θ plus a constant. `--order none` takes no inner step in
  training (joint pre-training on all tasks, the baseline that the paper's Figure 2 shows); it still adapts when tested.
- Batch norm: the paper's code normalises the query with the query's own statistics, so that an answer depends on which
  other questions are asked (transductive). Here `--norm support` (default) takes mean and variance from the *support* set,
  for support and query alike: answers do not depend on order or number of queries. `--norm transductive` gives the
  paper's, and its scores are called `transductive_test_error_k`. There are no running statistics in either.
- The tasks of a batch are one batched computation (`torch.vmap` over per-task weights, a grouped convolution). The paper
  loops over tasks.
- Omniglot: 28×28 drawings; training classes are the 964 background characters and their rotations by 90°, 180°, 270°; test
  classes are the 659 evaluation characters, of other alphabets. The paper shuffles all characters together (1,200 to train).

Expect: CPU (one core) 30 s → sinusoid error 0.47 after one step, 0.13 after ten (mean of three seeds);
    2 min → Omniglot 5-way 1-shot 0.136 wrong after three steps, 5 min (busy machine) → 5-shot 0.05 wrong.
Command: `etude run meta/maml`, `etude run meta/maml --preset omniglot`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import optim
from etude.catalog import Experiment, method
from etude.core.config import Count, Positive, Whole
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.core.spec import Spec
from etude.meta.maml.adaptation import Loss, Predict, adapt, batched, meta_loss, plain
from etude.meta.maml.networks import Convolutional, Regressor, answer
from etude.meta.maml.pictures import curves, episode
from etude.meta.maml.tasks import Task, episodes, sinusoids


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
    inner_steps: Count = 1
    """Gradient steps on the support set in training."""
    inner_rate: Positive = 0.01
    """Learning rate α of the inner steps."""
    order: Literal["second", "first", "none"] = "second"
    """second: the full meta-gradient; first: FOMAML; none: joint pre-training without inner steps."""
    norm: Literal["support", "transductive"] = "support"
    """Omniglot: whose statistics the batch norms use for the query (transductive: its own, as in the paper's code)."""
    width: Count = 40
    """Hidden units (sinusoid) or channels (Omniglot)."""
    learning_rate: Positive = 1e-3
    """Adam's rate for θ."""
    test_tasks: Count = 1000
    """Fresh tasks in the test."""
    test_steps: Count = 10
    """Most gradient steps taken in the test."""
    evaluate_every: Whole = 0
    """Meta-updates between tests (0: only at the end)."""


OMNIGLOT = {
    "data": "omniglot",
    "queries": 5,
    "steps": 1000,
    "inner_rate": 0.4,
    "width": 32,
    "test_tasks": 400,
    "test_steps": 3,
    "learning_rate": 2e-3,
}

PRESETS = {
    "tiny": Config(steps=30, tasks=4, test_tasks=20),  # 1 s
    "default": Config(),  # 30 s → 0.47 after one step
    "pretrain": Config(order="none"),
    "first_order": Config(order="first"),
    "omniglot": Config(shots=1, tasks=8, **OMNIGLOT),  # 2 min → 0.136 wrong after three steps
    "omniglot_5shot": Config(shots=5, tasks=4, **OMNIGLOT),  # 5 min → 0.05 wrong after three steps
}

EXPERIMENTS = (
    Experiment("sinusoid, one step", preset="default", metric="test_error_1", bar=0.6, better="lower"),
    Experiment("sinusoid, ten steps", preset="default", metric="test_error_10", bar=0.25, better="lower"),
    Experiment(
        "omniglot 5-way 1-shot",
        preset="omniglot",
        metric="test_error_3",
        bar=0.15,
        better="lower",
        published="0.013 (Finn 2017, transductive)",
    ),
    Experiment(
        "omniglot 5-way 5-shot",
        preset="omniglot_5shot",
        metric="test_error_3",
        bar=0.07,
        better="lower",
        published="0.001 (Finn 2017, transductive)",
    ),
)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of this family of tasks."""
    return {"model": Regressor(config.width) if config.data == "sinusoid" else Convolutional(config.ways, config.width)}


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
    learn, test = _drawings(config)
    run.describe(Spec())
    model = run.place(build(config, Spec())["model"])
    optimizer = optim.make("adam", model.parameters(), config.learning_rate)
    run.track(model=model, optimizer=optimizer)
    loss: Loss = F.mse_loss if learn is None else F.cross_entropy
    predict = plain(model) if learn is None else answer(model, config.norm)
    scores: dict[str, float] = {}

    for step in run.steps(config.steps):  # line 1
        dice = run.generator("tasks", step)
        task = draw_tasks(config, learn, config.tasks, config.queries, dice, turn=True).to(run.device)  # line 2
        value = meta_loss(model, loss, task, config.inner_rate, config.inner_steps, config.order, predict)  # line 3
        optimizer.zero_grad()
        value.backward()
        run.average(model, loss=value)
        optimizer.step()  # line 4
        run.log(loss=value)
        if run.every(config.evaluate_every):
            scores = evaluate(config, run, model, test)
            run.log(**scores)
    scores = scores or evaluate(config, run, model, test)
    _picture(config, run, model, predict, test)
    return scores


def evaluate(config: Config, run: Run, model: nn.Module, drawings: Tensor | None) -> dict[str, float]:
    """`test_error_k`: error on the query sets of fresh tasks after k gradient steps, mean over tasks.

    Mean squared error for sinusoids, share of wrong answers for characters (`transductive_test_error_k` where the
    answers saw each other).
    """
    loss: Loss = F.mse_loss if drawings is None else F.cross_entropy
    predict = plain(model) if drawings is None else answer(model, config.norm)
    dice = generator(run.seed, 0, 0, "test tasks")
    wanted = sorted({s for s in (0, 1, 3, 5, 10, config.test_steps) if s <= config.test_steps})
    queries = 100 if drawings is None else min(15, 20 - config.shots)
    sums = dict.fromkeys(wanted, 0.0)
    done = 0
    while done < config.test_tasks:
        count = min(50, config.test_tasks - done)
        task = draw_tasks(config, drawings, count, queries, dice, turn=False).to(run.device)
        weights = {name: w.detach().requires_grad_() for name, w in batched(model, count).items()}
        for step in range(config.test_steps + 1):
            if step:
                weights = adapt(predict, loss, weights, task, config.inner_rate, 1, "first")
                weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
            if step in sums:
                with torch.no_grad():
                    out = torch.vmap(predict)(weights, task.query_x, task.support_x)
                    wrong = out.argmax(-1) != task.query_y if drawings is not None else (out - task.query_y).square()
                    sums[step] += float(wrong.cpu().double().flatten(1).mean(1).sum())
        done += count
    label = "transductive_test_error" if drawings is not None and config.norm == "transductive" else "test_error"
    return {f"{label}_{step}": total / config.test_tasks for step, total in sums.items()}


def _drawings(config: Config) -> tuple[Tensor | None, Tensor | None]:
    """Training and test characters (uint8 (classes, 20, 28, 28)) of disjoint alphabets; None for sinusoids."""
    if config.data == "sinusoid":
        return None, None
    if config.shots + config.queries > 20:
        raise UserError(
            f"--shots {config.shots} and --queries {config.queries} need more than the 20 drawings of a character"
        )
    from etude.data import characters

    sets = characters("omniglot", size=28)
    learn, test = sets.background.x, sets.evaluation.x
    if config.ways > min(len(learn), len(test)):
        raise UserError(f"--ways {config.ways} is more than the {min(len(learn), len(test))} characters there are")
    return learn, test


def _picture(config: Config, run: Run, model: nn.Module, predict: Predict, drawings: Tensor | None) -> None:
    """What adaptation does: curves of a few sinusoids before and after, or one episode with its answers."""
    dice = generator(run.seed, 0, 0, "pictures")
    if drawings is None:
        figure = curves(model, config.inner_rate, config.test_steps, config.shots, dice)
        caption = f"Three new sinusoids, {config.shots} points each, before and after gradient steps."
        run.artifact("adaptation", figure, caption)
        return
    queries = min(4, 20 - config.shots)
    task = episodes(drawings, 1, config.ways, config.shots, queries, dice, turn=False)
    figure = episode(model, predict, config.inner_rate, config.test_steps, config.ways, task)
    caption = f"One test task: new characters by number, and answers to {queries} queries of each (wrong ones red)."
    run.artifact("episode", figure, caption)
