"""A network cut behind the last layer that is looked at, laid out for many passes over one picture"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from etude.insight.parts.ascent import seen


class _EnoughError(Exception):
    """The last of the layers has answered."""


class Cut:
    """x (1, C, H, W) → what each of the layers `names` makes of it, differentiable in x.

    A copy of the model in eval mode, its weights constants, convolutions channels last; a pass ends with the last layer asked
    for. The answers are copied where a later layer works in place. `example` gives the shape. Raises UserError as
    `etude.insight.parts.ascent.seen` does.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], example: Tensor) -> None:
        with torch.no_grad():
            seen(model, example, names)
        self.names = list(names)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.held: dict[str, Tensor] = {}
        self.copied: set[str] = set()
        parts = dict(self.model.named_modules())
        for name in dict.fromkeys(names):
            parts[name].register_forward_hook(self._keep(name))
        with torch.no_grad():
            self._pass(example)
            self.copied = {name for name, (made, version) in self._versions.items() if made._version != version}

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_part: nn.Module, _given: object, made: Tensor) -> None:
            self.held[name] = made.clone() if name in self.copied else made
            self._versions[name] = made, made._version
            if len(self.held) == len(set(self.names)):
                raise _EnoughError

        return hook

    def _pass(self, x: Tensor) -> None:
        self.held, self._versions = {}, {}
        with contextlib.suppress(_EnoughError):
            self.model(x.contiguous(memory_format=torch.channels_last))

    def __call__(self, x: Tensor) -> list[Tensor]:
        self._pass(x)
        made = [self.held[name] for name in self.names]
        self.held, self._versions = {}, {}
        return made
