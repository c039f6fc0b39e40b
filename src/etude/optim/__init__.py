"""Optimizers by name, for an `--optimizer` flag: `make("adam", model.parameters(), lr=1e-3, betas=(0.9, 0.99))`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.optim.optimizer import ParamsT

from etude.core.errors import UserError, nearest
from etude.optim.adagrad import AdaGrad
from etude.optim.adam import Adam, AdamW
from etude.optim.flat import flatten
from etude.optim.momentum import Momentum
from etude.optim.newton import Newton
from etude.optim.rmsprop import RMSProp
from etude.optim.schedules import Schedule, schedule, set_lr
from etude.optim.sgd import SGD

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Momentum",
    "Name",
    "Newton",
    "RMSProp",
    "Schedule",
    "flatten",
    "make",
    "schedule",
    "set_lr",
]

Name = Literal["sgd", "momentum", "nesterov", "rmsprop", "adagrad", "adam", "adamw", "newton"]
"""What an `--optimizer` flag may say."""

_MAKERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (Momentum, {"nesterov": False}),
    "nesterov": (Momentum, {"nesterov": True}),
    "rmsprop": (RMSProp, {}),
    "adagrad": (AdaGrad, {}),
    "adam": (Adam, {"decoupled_weight_decay": False}),
    "adamw": (AdamW, {}),
    "newton": (Newton, {}),
}


def make(name: str, params: ParamsT, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer called `name` with torch's names for its settings (momentum, alpha, betas, eps, weight_decay).

    Raises UserError, in one sentence, for an unknown name (with the nearest one), a setting the optimizer does not
    have, and a value out of range.
    """
    if name not in _MAKERS:
        raise UserError(f"unknown optimizer {name!r}, choose from {', '.join(get_args(Name))}{nearest(name, _MAKERS)}")
    maker, fixed = _MAKERS[name]
    known = [key for key in inspect.signature(maker).parameters if key not in ("params", "lr", *fixed)]
    for key in settings:
        if key not in known:
            raise UserError(
                f"the optimizer {name!r} has no setting {key!r}, only {', '.join(known)}{nearest(key, known)}"
            )
    try:
        return maker(params, lr=lr, **fixed, **settings)
    except ValueError as error:
        raise UserError(f"optimizer {name!r}: {error}") from error
