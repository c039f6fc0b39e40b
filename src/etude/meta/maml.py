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
  paper's; its results must be labelled so. There are no running statistics in either.
- The tasks of a batch are one batched computation (`torch.vmap` over per-task weights, a grouped convolution). The paper
  loops over tasks.
- Omniglot: 28×28 drawings; training classes are the 964 background characters and their rotations by 90°, 180°, 270°; test
  classes are the 659 evaluation characters, of other alphabets. The paper shuffles all characters together (1,200 to train).

Expect: CPU (one core) 30 s → sinusoid error 0.47 after one step, 0.13 after ten (mean of three seeds);
    2 min → Omniglot 5-way 1-shot 0.136 wrong after three steps, 5 min (busy machine) → 5-shot 0.05 wrong.
Command: `etude run meta/maml`, `etude run meta/maml --preset omniglot`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from etude import optim
from etude.catalog import Experiment, method
from etude.core.config import Count, Positive, Whole
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.core.spec import Spec

# T tasks, S support examples of one task, Q query examples, W ways (classes)
Weights = dict[str, Tensor]
Predict = Callable[[Weights, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


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


PRESETS = {
    "tiny": Config(steps=30, tasks=4, test_tasks=20),  # 1 s
    "default": Config(),  # 30 s → 0.47 after one step
    "pretrain": Config(order="none"),
    "first_order": Config(order="first"),
    "omniglot": Config(
        data="omniglot",
        shots=1,
        queries=5,
        tasks=8,
        steps=1000,
        inner_rate=0.4,
        width=32,
        test_tasks=400,
        test_steps=3,
        learning_rate=2e-3,
    ),
    "omniglot_5shot": Config(
        data="omniglot",
        shots=5,
        queries=5,
        tasks=4,
        steps=1000,
        inner_rate=0.4,
        width=32,
        test_tasks=400,
        test_steps=3,
        learning_rate=2e-3,
    ),
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


class Task(NamedTuple):
    """A batch of T tasks."""

    support_x: Tensor  # (T, S, …)
    support_y: Tensor  # (T, S, …)
    query_x: Tensor  # (T, Q, …)
    query_y: Tensor  # (T, Q, …)


# ------------------------------------------------------------------------------------------------- the algorithm


def plain(module: nn.Module) -> Predict:
    """How a module without statistics answers: (weights, questions (N, …), support (S, …)) → outputs (N, …)."""
    return lambda weights, x, support: functional_call(module, weights, (x,))


def batched(module: nn.Module, tasks: int) -> Weights:
    """θ repeated for T tasks without copying: every trainable parameter as a view (T, …) of itself."""
    return {name: p.unsqueeze(0).expand(tasks, *p.shape) for name, p in module.named_parameters() if p.requires_grad}


def task_losses(predict: Predict, loss: Loss, weights: Weights, x: Tensor, y: Tensor, support: Tensor) -> Tensor:
    """Loss of every task under its own weights: (T,)."""
    return torch.vmap(lambda w, x, y, s: loss(predict(w, x, s), y))(weights, x, y, support)


def adapt(
    predict: Predict, loss: Loss, weights: Weights, task: Task, rate: float, steps: int = 1, order: str = "second"
) -> Weights:
    """Line 3: `steps` gradient steps on the support sets, for all tasks at once; `weights` are not changed.

    `weights` hold (T, …) tensors. The tasks do not share weights, so the gradient of the *sum* of their losses is the
    gradient of each. With order "second" the result is differentiable through the steps; with "first" the
    gradients are constants, and the result is θ plus a constant.
    """
    for _ in range(steps):
        losses = task_losses(predict, loss, weights, task.support_x, task.support_y, task.support_x)
        grads = torch.autograd.grad(losses.sum(), list(weights.values()), create_graph=order == "second")
        weights = {name: w - rate * grad for (name, w), grad in zip(weights.items(), grads)}
    return weights


def meta_loss(
    module: nn.Module,
    loss: Loss,
    task: Task,
    rate: float,
    steps: int = 1,
    order: str = "second",
    predict: Predict | None = None,
) -> Tensor:
    """Line 4's objective, mean over tasks of L_i(θ'_i; query): 0-dim; its backward is the meta-gradient.

    Works for any module and any loss (outputs, targets) → 0-dim that torch.vmap can take. `order` "none" skips the
    adaptation (joint training). Source: arXiv:1703.03400, equation 1.
    """
    predict = predict or plain(module)
    weights = batched(module, len(task.support_x))
    if order != "none":
        weights = adapt(predict, loss, weights, task, rate, steps, order)
    return task_losses(predict, loss, weights, task.query_x, task.query_y, task.support_x).mean()


# ------------------------------------------------------------------------------------------------------ networks


class Regressor(nn.Sequential):
    """(N, 1) → (N, 1): two hidden layers of `width` ReLUs, as in the paper's section 5.1."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class ReferenceNorm(nn.Module):
    """Batch norm whose statistics come from the first `reference` images of the batch (None: from all of them)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, reference: int | None = None) -> Tensor:
        """(N, C, H, W) → the same shape."""
        variance, mean = torch.var_mean(x[:reference], (0, 2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (x - mean) * scale + self.bias[:, None, None]


class Convolutional(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] → logits (N, ways): four 3×3 convolutions of stride 2 (paper, section 5.2)."""

    def __init__(self, ways: int, width: int) -> None:
        super().__init__()
        channels = [1, width, width, width, width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        self.norms = nn.ModuleList(ReferenceNorm(width) for _ in range(4))
        self.out = nn.Linear(width, ways)

    def forward(self, x: Tensor, reference: int | None = None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x), reference).relu()
        return self.out(x.mean((2, 3)))


def answer(module: nn.Module, norm: str) -> Predict:
    """How the convolutional network answers: with the support's statistics, or (transductive) with the questions' own."""

    def predict(weights: Weights, x: Tensor, support: Tensor) -> Tensor:
        if norm == "transductive" or x is support:
            return functional_call(module, weights, (x,))
        return functional_call(module, weights, (torch.cat([support, x]), len(support)))[len(support) :]

    return predict


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of this family of tasks."""
    return {"model": Regressor(config.width) if config.data == "sinusoid" else Convolutional(config.ways, config.width)}


# --------------------------------------------------------------------------------------------------------- tasks


def sinusoids(tasks: int, support: int, queries: int, dice: torch.Generator) -> tuple[Task, Tensor, Tensor]:
    """y = A sin(x − φ), A ∈ [0.1, 5], φ ∈ [0, π], x ∈ [−5, 5] (paper, section 5.1); also A and φ, each (T, 1, 1)."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=dice)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=dice)
    x = 10 * torch.rand(tasks, support + queries, 1, generator=dice) - 5
    y = amplitude * torch.sin(x - phase)
    return Task(x[:, :support], y[:, :support], x[:, support:], y[:, support:]), amplitude, phase


def episodes(
    drawings: Tensor, tasks: int, ways: int, shots: int, queries: int, dice: torch.Generator, turn: bool
) -> Task:
    """T tasks of `ways` characters with fresh labels 0 … W−1 in random order: images float (T, W·n, 1, H, W) in [0, 1].

    drawings: uint8 (classes, 20, H, W). With `turn`, every character of a task is rotated by a random multiple of
    90°, the same for all its drawings: a rotated character is a class of its own.
    """
    classes, copies = drawings.shape[:2]
    chosen = torch.rand(tasks, classes, generator=dice).topk(ways, 1).indices  # (T, W), no repeats, random order
    drawn = torch.rand(tasks, ways, copies, generator=dice).topk(shots + queries, 2).indices
    x = drawings[chosen[:, :, None], drawn].float() / 255  # (T, W, n, H, W)
    if turn:
        turns = torch.randint(4, (tasks, ways), generator=dice)
        for k in range(1, 4):
            x = torch.where((turns == k)[:, :, None, None, None], torch.rot90(x, k, (-2, -1)), x)
    y = torch.arange(ways).view(1, ways, 1).expand(tasks, ways, shots + queries)

    def flat(part: slice) -> tuple[Tensor, Tensor]:
        return x[:, :, part].flatten(1, 2).unsqueeze(2), y[:, :, part].flatten(1, 2)

    return Task(*flat(slice(shots)), *flat(slice(shots, None)))


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
        task = _to(draw_tasks(config, learn, config.tasks, config.queries, dice, turn=True), run.device)  # line 2
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
    _pictures(config, run, model, predict, test)
    return scores


def evaluate(config: Config, run: Run, model: nn.Module, drawings: Tensor | None) -> dict[str, float]:
    """`test_error_k`: error on the query sets of fresh tasks after k gradient steps, mean over tasks.

    Mean squared error for sinusoids, share of wrong answers for characters.
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
        task = _to(draw_tasks(config, drawings, count, queries, dice, turn=False), run.device)
        weights = {name: w.detach().requires_grad_() for name, w in batched(model, count).items()}
        for step in range(config.test_steps + 1):
            if step:
                weights = adapt(predict, loss, weights, task, config.inner_rate, 1, "first")
                weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
            if step in sums:
                with torch.no_grad():
                    out = torch.vmap(predict)(weights, task.query_x, task.support_x)
                    wrong = out.argmax(-1) != task.query_y if drawings is not None else (out - task.query_y).square()
                    sums[step] += float(wrong.double().flatten(1).mean(1).sum())
        done += count
    return {f"test_error_{step}": total / config.test_tasks for step, total in sums.items()}


def _drawings(config: Config) -> tuple[Tensor | None, Tensor | None]:
    """Training and test characters (uint8 (classes, 20, 28, 28)) of disjoint alphabets; None for sinusoids."""
    if config.data == "sinusoid":
        return None, None
    if config.shots + config.queries > 20 or config.shots > 19:
        raise UserError(
            f"--shots {config.shots} and --queries {config.queries} need more than the 20 drawings of a character"
        )
    from etude.data import characters

    sets: Any = characters("omniglot", size=28)
    return sets.background.x, sets.evaluation.x


def _to(task: Task, device: torch.device) -> Task:
    return Task(*(part.to(device) for part in task))


def _pictures(config: Config, run: Run, model: nn.Module, predict: Predict, drawings: Tensor | None) -> None:
    """What adaptation does: curves of a few sinusoids before and after, or one episode with its answers."""
    from matplotlib.figure import Figure

    dice = generator(run.seed, 0, 0, "pictures")
    loss: Loss = F.mse_loss if drawings is None else F.cross_entropy
    if drawings is None:
        task, amplitude, phase = sinusoids(3, config.shots, 1, dice)
        line = torch.linspace(-5, 5, 200).view(1, -1, 1).expand(3, -1, -1)
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        weights = batched(model, 3)
        for steps in (0, 1, config.test_steps):
            adapted = adapt(predict, loss, weights, task, config.inner_rate, steps, "first") if steps else weights
            curves = torch.vmap(predict)(adapted, line, line).detach()
            for panel, curve in zip(panels, curves):
                panel.plot(
                    line[0, :, 0], curve[:, 0], ["0.7", "C0", "C3"][(steps > 0) + (steps > 1)], label=f"{steps} steps"
                )
        for panel, i in zip(panels, range(3)):
            panel.plot(line[0, :, 0], (amplitude * torch.sin(line - phase))[i, :, 0], "k:", label="task")
            panel.plot(task.support_x[i, :, 0], task.support_y[i, :, 0], "k^", label="support")
        panels[0].legend(frameon=False, fontsize=7)
        run.artifact(
            "adaptation", figure, f"Three new sinusoids, {config.shots} points each, before and after gradient steps."
        )
        return
    task = episodes(drawings, 1, config.ways, config.shots, 4, dice, turn=False)
    adapted = adapt(predict, loss, batched(model, 1), task, config.inner_rate, config.test_steps, "first")
    answers = torch.vmap(predict)(adapted, task.query_x, task.support_x)[0].argmax(1)
    figure = Figure(figsize=(6, 1.2 * config.ways), layout="constrained")
    for row, panels in enumerate(figure.subplots(config.ways, 5, squeeze=False)):
        panels[0].imshow(1 - task.support_x[0, row * config.shots, 0], cmap="gray")
        panels[0].set_title(f"support {row}", fontsize=7)
        for k, panel in enumerate(panels[1:]):
            guess = int(answers[row * 4 + k])
            panel.imshow(1 - task.query_x[0, row * 4 + k, 0], cmap="gray")
            panel.set_title(f"→ {guess}", fontsize=7, color="black" if guess == row else "red")
        for panel in panels:
            panel.axis("off")
    run.artifact(
        "episode",
        figure,
        "One test task: the support of each new character and answers to four queries (wrong ones red).",
    )
