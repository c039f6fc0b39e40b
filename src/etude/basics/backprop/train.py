"""Backpropagation: our own reverse-mode engine, and a network trained with it

Paper: Rumelhart, Hinton, Williams, Learning Representations by Back-Propagating Errors, Nature 323, 1986; Linnainmaa,
The Representation of the Cumulative Rounding Error of an Algorithm, 1970 (reverse accumulation).

Equation: with δ_z = ∂L/∂z for every intermediate value z and J_a = ∂z/∂a the Jacobian of z = f(a, b, …) in one operand,
    δ_a = Σ_{z that used a} J_aᵀ δ_z,   starting from δ_L = 1; parameters are operands like any other

Algorithm:
1. forward: compute every value and record, for each operand, the product δ ↦ Jᵀδ (never the Jacobian itself)
2. order the recorded values so that each one comes after all its operands
3. δ ← 1 at the losses, nothing elsewhere
4. for each value z in reverse order, for each operand a of z: δ_a ← δ_a + Jᵀ δ_z

Differences:
- E14 (notes 4.2, Algorithm 7): the notes set dL/dθ ← (df/dθ) δ, and δ ← (df/dx) δ "for each f". The Jacobian is
  *transposed*; what comes back from several uses of one value is *summed* (shared weights, fan-out, several losses),
  which the notes say only in 6.1.2; and the order is reverse topological: nothing is passed on before all uses have
  reported.
- A broadcast operand was used once per copy, so its gradient is the sum over the copies (`fold`).
- The values are plain tensors and the δs are not recorded: there are no second derivatives.

Expect: one core: 0.975 on the bundled digits in 1 s; MNIST 784-256-128-10: 0.974 to 0.978 in 8 s (15 s on a busy core); the loss
    curves of ours and autograd agree to 1.2e-6 for 50 steps of gradient descent.
Command: `etude run basics/backprop --preset mnist`
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude import optim
from etude.basics.backprop.engine import Node, backward, cross_entropy, relu, tanh, transpose
from etude.basics.mlp import MLP
from etude.blocks.classifying.scores import evaluate
from etude.blocks.nn.init import initialise
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, PAPER, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Positive, Whole
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.batches import Stream


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Dataset (digits, mnist, fashion_mnist, kmnist, cifar10) or a folder of class-named image folders."""
    widths: tuple[Count, ...] = (256, 128)
    """Units of each hidden layer (ReLU), first to last."""
    steps: Count = 400
    """Number of parameter updates."""
    batch: Count = 128
    """Images in a mini-batch (of each rank)."""
    optimizer: optim.Name = "adam"
    """Update rule."""
    learning_rate: Positive = 1e-3
    """Learning rate."""
    compare: Whole = 100
    """First steps in which a twin network, trained on the same batches by torch.autograd, runs beside ours (0: none)."""
    evaluate_every: Whole = 0
    """Steps between evaluations on the validation split (0: only at the end)."""


PRESETS = {
    "tiny": Config(widths=(32,), steps=30, batch=32, compare=20),  # 1 s
    "default": Config(),  # 1 s → 0.975
    "mnist": Config(data="mnist", steps=2344, evaluate_every=469),  # 7 s → 0.977
}

METRICS = {
    "largest_difference": "largest difference between the losses of our network and of its twin that autograd trains (nats)",
}

EXPERIMENTS = (
    Experiment(
        "mnist", preset="mnist", metric="test_accuracy", bar=0.972, published="0.984 (Srivastava 2014)",
        notes="published: two layers of 800 units, all 60,000 images, no dropout",
        controls=(Control("δ stops at the last hidden layer", swap={"relu": "etude.basics.parts.training_nulls.wall"}),),
    ),
    Experiment(
        "mnist_parity", preset="mnist", metric="largest_difference", bar=1e-5, better="lower",
        flags={"optimizer": "sgd", "learning_rate": 0.1, "steps": 50},
        notes="float32 of losses near 1. In longer runs (and with Adam, which divides by √v) twins part on some processors: "
        "where a sum of weights is all rounding, one twin's ReLU opens and the other's does not",
        controls=(Control("δ stops at the last hidden layer", swap={"relu": "etude.basics.parts.training_nulls.wall"}),),
    ),
    Experiment(
        "digits_parity", preset="default", metric="largest_difference", bar=1e-5, better="lower",
        controls=(Control("no Jacobian of the ReLU", swap={"relu": "etude.basics.parts.training_nulls.straight_through"}),),
    ),
)  # fmt: skip

SETTINGS = {"data": "mnist"}


def forward(model: MLP, nodes: dict[nn.Parameter, Node], x: Tensor) -> Node:
    """The logits (N, classes) of the network for images (N, C, H, W), with `nodes` for its parameters."""
    hidden: Any = model.standardise(x).flatten(1)
    linear = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        z = hidden @ transpose(nodes[layer.weight]) + nodes[layer.bias]
        hidden = z if layer is linear[-1] else relu(z)
    return hidden


def backpropagate(model: MLP, x: Tensor, y: Tensor) -> Tensor:
    """Set `grad` of all parameters by our engine and return the mean cross-entropy."""
    nodes = {parameter: Node(parameter.detach()) for parameter in model.parameters()}
    loss = cross_entropy(forward(model, nodes, x), y)
    backward(loss)
    for parameter, node in nodes.items():
        parameter.grad = node.grad
    return loss.value


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of basics/mlp, He-initialised."""
    return {"model": initialise(MLP(prod(spec.shape), config.widths, len(spec.classes), spec.mean, spec.std), "he")}


@method("basics/backprop", paper="Rumelhart et al. 1986", section="4.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.optimizer == "newton":
        raise UserError("--optimizer newton needs second derivatives, which this engine does not have; take another")
    data = room.images(config.data)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])
    assert isinstance(model, MLP)
    twin = deepcopy(model)
    optimizer = optim.make(config.optimizer, model.parameters(), config.learning_rate)
    other = optim.make(config.optimizer, twin.parameters(), config.learning_rate)
    seen = Box(curve=torch.zeros(min(config.compare, config.steps), 2, dtype=torch.float64))
    run.track(model=model, optimizer=optimizer, twin=twin, other=other, seen=seen)
    stream = Stream(len(data.train.y), config.batch, run.seed, run.rank, run.world)

    for step in run.steps(config.steps):
        index = stream.indices(step)
        x, y = data.train.x[index].to(run.device), data.train.y[index].to(run.device)
        loss = backpropagate(model, x, y)
        run.average(model, loss=loss)
        optimizer.step()
        run.log(loss=loss)
        if step < config.compare:
            theirs = F.cross_entropy(twin(x), y)
            other.zero_grad()
            theirs.backward()
            run.average(twin, loss=theirs)
            other.step()
            seen.curve[step] = torch.stack((loss, theirs.detach()))
            run.log(autograd_loss=theirs)
        if run.every(config.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))
    run.artifact(
        "graph", graph_figure(*example()), "Values forward, gradients backward: tanh is used twice, so its δ is a sum."
    )
    if config.compare:
        caption = "The same network, batches and update rule: our gradients and torch.autograd's."
        run.artifact("curves", curve_figure(seen.curve), caption)
    scores = evaluate(run, model, data, "test")
    if config.compare:
        ours, autograds = seen.curve.T
        scores["largest_difference"] = float((ours - autograds).abs().max())
    return scores


def curve_figure(curve: Tensor) -> Any:
    """Losses (steps, 2) of our engine and of autograd, and how far they are apart."""
    figure, (upper, lower) = panels(rows=2, height=4.4, sharex=True, height_ratios=(1.5, 1))
    steps = torch.arange(1, len(curve) + 1)
    upper.plot(steps, curve[:, 1], color=PALETTE[1], linewidth=5, alpha=0.4, label="torch.autograd")
    upper.plot(steps, curve[:, 0], color=PALETTE[0], linewidth=1.2, label="our engine")
    upper.set_ylim(bottom=0)
    label(upper, "Two engines, one loss curve", y="training loss (nats)")
    legend(upper)
    gap = (curve[:, 0] - curve[:, 1]).abs()
    lower.semilogy(steps, gap.clamp(min=1e-9), ".", color=PALETTE[0], markersize=3)
    lower.axhline(1e-5, color=PALETTE[2], linewidth=1)
    lower.annotate("bar", (1, 1e-5), (0, 3), textcoords="offset points", fontsize=8, color=PALETTE[2])
    lower.set_ylim(5e-10, 1e-4)
    label(lower, "Their difference (equal losses are drawn at 1e-9)", "step", "|difference|")
    return figure


def example() -> tuple[Node, list[Node]]:
    """L = (h + v h)² with h = tanh(w x + b), after `backward`: the loss and all Nodes, operands first."""
    leaves = (("w", 0.6), ("x", 2.0), ("b", -0.5), ("v", 1.5))
    w, x, b, v = (Node(torch.tensor(value, dtype=torch.float64), name) for name, value in leaves)
    h = tanh(w * x + b)
    loss = (h + v * h) ** 2
    return loss, backward(loss)


def graph_figure(loss: Node, order: list[Node]) -> Any:
    """The computational graph of scalars: a box for each Node with its name, its value and its gradient."""
    from matplotlib.patches import FancyBboxPatch

    users: dict[Node, list[Node]] = {node: [] for node in order}
    column: dict[Node, int] = {}
    for node in order:
        column[node] = 1 + max((column[operand] for operand, _ in node.edges), default=-1)
        for operand, _ in node.edges:
            users[operand].append(node)
    for node in order:
        if not node.edges:  # a leaf stands just before its first use
            column[node] = min(column[user] for user in users[node]) - 1
    place: dict[Node, tuple[float, float]] = {}
    for level in range(column[loss], -1, -1):
        here = [node for node in order if column[node] == level]
        height = {node: sum(place[user][1] for user in users[node]) / max(len(users[node]), 1) for node in here}
        for rank, node in enumerate(sorted(here, key=height.__getitem__)):
            place[node] = (level, rank - (len(here) - 1) / 2)
    tall = max(y for _, y in place.values()) - min(y for _, y in place.values()) + 1
    figure, (axes,) = panels(width=6.4, height=0.85 * tall + 0.4)
    axes.set_axis_off()
    axes.set_xlim(-0.5, column[loss] + 0.5)
    axes.set_ylim(min(y for _, y in place.values()) - 0.5, max(y for _, y in place.values()) + 0.5)
    for node, (x, y) in place.items():
        for operand, _ in node.edges:
            from_x, from_y = place[operand]
            long = column[node] - column[operand] > 1  # bows below the boxes in between
            bow = {"connectionstyle": "arc3,rad=0.35"} if long else {}
            end = (x, y - 0.4) if long else (x - 0.38, y)
            axes.annotate("", end, (from_x + 0.36, from_y), arrowprops={"arrowstyle": "-|>", "color": SOFT, **bow})
        box = {
            "boxstyle": "round,pad=0.02",
            "facecolor": PAPER if node.edges else "#e6edf5",
            "edgecolor": SOFT,
            "linewidth": 0.8,
        }
        axes.add_patch(FancyBboxPatch((x - 0.34, y - 0.36), 0.68, 0.72, **box))
        middle = {"ha": "center", "va": "center", "fontsize": 8}
        axes.text(x, y + 0.22, node.name, color=INK, weight="bold", **middle)
        axes.text(x, y, f"{node.value.item():.3f}", color=PALETTE[0], **middle)
        axes.text(x, y - 0.23, f"δ {node.grad.item():.3f}", color=PALETTE[1], **middle)  # type: ignore[union-attr]
    label(
        axes,
        r"$L = (h + v\,h)^2$ with $h = \tanh(w\,x + b)$: values forward, gradients $\delta = \partial L/\partial z$ back",
    )
    return figure
