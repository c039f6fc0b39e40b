"""MAML itself, for any module and any loss: the inner steps and the objective behind them, pure functions.

Source: Finn, Abbeel, Levine, arXiv:1703.03400, Algorithms 1 and 2; T tasks, S support and Q query examples of a task.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from etude.meta.maml.tasks import Task

__all__ = ["Loss", "Predict", "Weights", "adapt", "batched", "meta_loss", "plain", "task_losses"]

Weights = dict[str, Tensor]
Predict = Callable[[Weights, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(module: nn.Module) -> Predict:
    """How a module without statistics answers: (weights, questions (N, …), support (S, …)) → outputs (N, …)."""
    return lambda weights, x, support: functional_call(module, weights, (x,))


def batched(module: nn.Module, tasks: int) -> Weights:
    """θ repeated for T tasks without copying: every trainable parameter as a view (T, …) of itself."""
    return {name: p.unsqueeze(0).expand(tasks, *p.shape) for name, p in module.named_parameters() if p.requires_grad}


def task_losses(predict: Predict, loss: Loss, weights: Weights, x: Tensor, y: Tensor, support: Tensor) -> Tensor:
    """Loss of every task under its own weights: (T,). A module that draws (dropout) draws for each task."""
    return torch.vmap(lambda w, x, y, s: loss(predict(w, x, s), y), randomness="different")(weights, x, y, support)


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
        held, second = list(weights.values()), order == "second"
        grads = torch.autograd.grad(losses.sum(), held, create_graph=second, materialize_grads=True)  # 0 where unused
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

    Works for any module and any loss (outputs, targets) → 0-dim that torch.vmap can take. With 0 steps it is the loss of
    joint training. Source: arXiv:1703.03400, equation 1.
    """
    predict = predict or plain(module)
    weights = adapt(predict, loss, batched(module, len(task.support_x)), task, rate, steps, order)
    return task_losses(predict, loss, weights, task.query_x, task.query_y, task.support_x).mean()
