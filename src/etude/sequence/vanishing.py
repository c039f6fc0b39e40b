"""Vanishing: how far back a gradient reaches in a recurrent network

Paper: Bengio, Simard, Frasconi, "Learning Long-Term Dependencies with Gradient Descent is Difficult", 1994; Pascanu, Mikolov,
Bengio, 2012, arXiv:1211.5063; Hochreiter, Schmidhuber, 1997 (the adding problem); Williams, Peng, 1990 (truncation).

Equation: a_t the state (h_t; for the LSTM h_t and c_t), J_t = ∂a_t/∂a_{t−1}
    ∂a_T/∂a_t = J_T J_{T−1} ··· J_{t+1},   ‖∂a_T/∂a_t‖ ≤ Π_{i>t} ‖J_i‖,   ‖J_i‖ ≤ ‖U‖·max|tanh'|      (‖·‖ = σ_max)
    linear network: J_i = U, so ‖∂a_T/∂a_t‖ = σ_max(U^{T−t})                          (1 for ever where U is orthogonal)
    ∂loss/∂θ = Σ_{t ≤ T} (∂loss/∂a_T)(∂a_T/∂a_t)(∂⁺a_t/∂θ);   truncated: the sum over T − k < t ≤ T only

Algorithm:
    1. the adding problem: T pairs (value ~ U[0, 1], mark); one mark in each half; the answer is the sum of the two marked values
    2. each step: a fresh batch; read it from an empty state; the answer is a linear readout of the last h
    3. loss = mean squared error; back-propagation through time over all T steps, or the last k; clip; Adam with a rate
       that falls on a line
    4. at the end score fresh sequences, and multiply the J_t of a few of them from T back to 0

Differences:
    - Everything is exact: J_t by automatic differentiation, its products and their largest singular values in float64.
    - Hochreiter's values lie in [−1, 1] and his lengths vary; here U[0, 1] and a fixed T, as in later work: whoever answers 1,
      the mean, has the error 1/6.
    - ∂⁺ is the immediate part, with a_{t−1} held constant. Truncation changes the gradient, not what is computed forwards: it is
      biased, not blind, as what is learned of the last steps holds for all. With k = 10 the LSTM errs by 0.006, k = 1 by 0.02.
    - The LSTM's forget gate begins with a bias (`--forget-bias`; 0 is torch's start).

Expect: T = 50, 64 units, one thread of a busy CPU, 30 s, seed 0: LSTM 0.0004, GRU 0.0001, tanh RNN 0.165 (answering 1: 0.165).
    ‖∂a_50/∂a_0‖ before training: LSTM 6·10⁻³, GRU 5·10⁻¹⁰, RNN 3·10⁻¹³; after it 6 for the LSTM.
Command: `etude run sequence/vanishing --cell rnn`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev, vmap

from etude.blocks.nn.recurrent import CELLS, Engine, Recurrent, State, Weights
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.sequence.lstm import favour_memory
from etude.sequence.parts.text import falling

Kind = Literal["rnn", "rnn_relu", "lstm", "gru"]
Step = Callable[[Tensor, State, Weights], State]
KINDS: tuple[Kind, ...] = ("rnn", "lstm", "gru")
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
EXAMINED = 4
"""Test sequences whose Jacobians are multiplied."""
DEPTH, NORM = "steps back, T − t", "‖∂a_T/∂a_t‖"


@dataclass(frozen=True)
class Config:
    cell: Kind = "lstm"
    """The recurrent cell."""
    length: Count = 50
    """Steps of a sequence, T."""
    truncation: Whole = 0
    """How many steps a gradient goes back, k; 0: all of them."""
    engine: Engine = "auto"
    """Autograd over a plain loop, the gradient written out, that in machine code, torch's kernels, or the fastest of them."""
    width: Count = 64
    """Units, D."""
    initializer: Literal["torch", "orthogonal", "identity"] = "torch"
    """How U begins, gate by gate: uniform as torch draws it, an orthogonal matrix, or the identity (Le 2015)."""
    gain: Positive = 1.0
    """Factor of U at the start; above 1 a gradient may explode."""
    forget_bias: NonNegative = 1.0
    """Added to the LSTM's forget gate at the start."""
    batch: Count = 64
    """Fresh sequences in a step."""
    steps: Count = 2000
    """Number of parameter updates."""
    learning_rate: Positive = 1e-2
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 250
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(length=10, width=8, batch=16, steps=20),  # 1 s
    "default": Config(),  # 30 s → 0.0004
    "long": Config(length=200, steps=6000, clip_norm=0.5),
}

SETTINGS = {"truncation": 4, "engine": "loop", "evaluate_every": 5, "gain": 2.0}

METRICS = {
    "test_mean_error": "the same of who always answers 1, the mean of all answers",
    "reach": "‖∂a_T/∂a_0‖ after training, the mean over a few test sequences",
    "untrained_reach": "‖∂a_T/∂a_0‖ before training",
}

EXPERIMENTS = (
    Experiment(
        "adding",
        preset="default",
        metric="test_error",
        bar=5e-4,
        better="lower",
        controls=(
            Control("the tanh RNN, whose gradient vanishes", flags={"cell": "rnn"}),
            Control("a truncated, biased gradient (10 steps)", flags={"truncation": 10}),
            Control("always the mean answer", metric="test_mean_error"),
        ),
    ),
)


def adding(count: int, length: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Line 1: x (count, T, 2) of values and marks, and the sum (count,) of the two marked values."""
    values, half = torch.rand(count, length, generator=dice), max(1, length // 2)
    first = torch.randint(half, (count, 1), generator=dice)
    second = torch.randint(min(half, length - 1), length, (count, 1), generator=dice)
    marks = F.one_hot(first[:, 0], length) + F.one_hot(second[:, 0], length)
    answers = (values.gather(1, first) + values.gather(1, second))[:, 0]
    return torch.stack([values, marks.to(values.dtype)], -1), answers


class Adder(nn.Module):
    """A recurrent layer and a linear readout of its last output."""

    def __init__(self, cell: Kind, width: int, engine: Engine = "auto") -> None:
        super().__init__()
        self.recurrent, self.readout = Recurrent(cell, 2, width, engine=engine), nn.Linear(width, 1)

    def forward(self, x: Tensor, truncation: int = 0) -> Tensor:
        """x (B, T, 2) → answers (B,); a gradient goes back over the last `truncation` steps only, or over all for 0."""
        x, state = x.to(self.readout.weight.dtype), None
        before = x.shape[1] - truncation if truncation else 0
        if before > 0:
            with torch.no_grad():
                _, state = self.recurrent(x[:, :before])
        h, _ = self.recurrent(x[:, max(before, 0) :], state)
        return self.readout(h[:, -1])[:, 0]


@torch.no_grad()
def reaches(step: Step, given: Tensor, begun: State, by: Weights) -> tuple[Tensor, Tensor]:
    """‖∂a_T/∂a_t‖ and its bound Π_{i>t} ‖J_i‖ for t = T, T − 1, …, 0, each (T + 1,): means over B sequences.

    `step` is a cell of `CELLS`, given its Wx + b (T, B, G) and a first state of S parts (B, D); a_t lays the parts side by side.
    """
    parts, width = len(begun), begun[0].shape[-1]

    def moved(now: Tensor, at: Tensor) -> Tensor:
        return torch.cat(step(now, at.split(width, -1), by), -1)

    states = [torch.cat(begun, -1)]
    for now in given:
        states.append(moved(now, states[-1]))
    whole = torch.eye(parts * width, dtype=given.dtype, device=given.device).expand(given.shape[1], -1, -1)
    bound = given.new_ones(given.shape[1])
    norms, bounds = [given.new_ones(())], [given.new_ones(())]
    for now, at in zip(reversed(given), reversed(states[:-1])):
        one = vmap(jacrev(moved, argnums=1))(now, at)  # J_t (B, SD, SD)
        whole, bound = whole @ one, bound * torch.linalg.matrix_norm(one, 2)
        norms.append(torch.linalg.matrix_norm(whole, 2).mean())
        bounds.append(bound.mean())
    return torch.stack(norms), torch.stack(bounds)


def measured(recurrent: Recurrent, x: Tensor) -> tuple[Tensor, Tensor]:
    """`reaches` of a network of one layer on x (B, T, I), in float64 on the CPU."""
    w, u, b, c = (recurrent.get_parameter(f"{name}_l0").detach().cpu().double() for name in NAMES)
    given = F.linear(x.double(), w, b).transpose(0, 1)
    begun = tuple(part.cpu().double() for part in recurrent.zeros(len(x)))
    return reaches(CELLS[recurrent.cell], given, tuple(part[0] for part in begun), Weights(u, c))


def visible(norms: Tensor) -> Tensor:
    """For a logarithmic axis: nothing below 10⁻³⁰."""
    return norms.clamp(min=1e-30)


def start(recurrent: Recurrent, initializer: str, gain: float) -> None:
    """U of every gate is drawn again as `initializer` says, and multiplied by `gain`."""
    for gate in recurrent.weight_hh_l0.data.split(recurrent.width):
        if initializer == "orthogonal":
            nn.init.orthogonal_(gate)
        elif initializer == "identity":
            nn.init.eye_(gate)
        gate.mul_(gain)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network."""
    model = Adder(config.cell, config.width, config.engine)
    start(model.recurrent, config.initializer, config.gain)
    if config.cell == "lstm":
        favour_memory(model.recurrent, config.forget_bias)
    return {"model": model}


@torch.no_grad()
def error(model: Adder, x: Tensor, y: Tensor) -> float:
    """Mean squared error of the answers to x (N, T, 2)."""
    device = next(model.parameters()).device
    answers = torch.cat([model(part.to(device)).cpu() for part in x.split(500)])
    return float((answers.double() - y).square().mean())


@method("sequence/vanishing", paper="arXiv:1211.5063", section="6.1.2, 6.1.3, 6.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.length < 2:
        raise UserError("a sequence of one step has no two marks; give at least --length 2")
    spec = Spec(shape=(config.length, 2))
    run.describe(spec)
    model = build(config, spec)["model"]
    looked_at, _ = adding(EXAMINED, config.length, run.generator("examined"))
    untrained = measured(model.recurrent, looked_at)
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    run.track(model=model, optimizer=optimizer)
    validation = adding(1000, config.length, run.generator("validation"))

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * falling(step, config.steps, config.final_learning_rate)
        x, y = adding(config.batch, config.length, run.generator("batch", step))  # line 2
        loss = (model(x.to(run.device), config.truncation) - y.to(run.device)).square().mean()  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss, gradient_norm=norm)
        if run.every(config.evaluate_every):
            run.log(validation_error=error(model, *validation))

    trained = measured(model.recurrent, looked_at)  # line 4
    others = {kind: build(replace(config, cell=kind), spec)["model"].recurrent for kind in KINDS}
    depth = list(range(config.length + 1))
    shown = {kind: (depth, visible(measured(net, looked_at)[0])) for kind, net in others.items()}
    run.artifact(
        "fresh", curves(shown, DEPTH, NORM, log=True),
        caption="Before training, from these settings: how a gradient shrinks or grows on its way back.",
    )  # fmt: skip
    told = {"before": untrained[0], "before: product of the steps' norms": untrained[1], "after": trained[0]}
    run.artifact(
        "trained", curves({name: (depth, visible(norms)) for name, norms in told.items()}, DEPTH, NORM, log=True),
        caption=f"The {config.cell} of this run, before and after it has learned.",
    )  # fmt: skip
    x, y = adding(2000, config.length, run.generator("test"))
    return {
        "test_error": error(model, x, y),
        "test_mean_error": float((y.double() - 1).square().mean()),
        "reach": float(trained[0][-1]),
        "untrained_reach": float(untrained[0][-1]),
    }
