"""MAML: the algorithm for any module and loss, its networks, its tasks, and the training loop."""

from etude.meta.maml.adaptation import adapt, batched, meta_loss, plain, task_losses
from etude.meta.maml.networks import Convolutional, Regressor, answer
from etude.meta.maml.tasks import Task, episodes, sinusoids

__all__ = [
    "Convolutional",
    "Regressor",
    "Task",
    "adapt",
    "answer",
    "batched",
    "episodes",
    "meta_loss",
    "plain",
    "sinusoids",
    "task_losses",
]
