"""What a network must know of its data: enough to build it again without the data at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """Shapes and names of one dataset, JSON-able; written to ``spec.json`` and read back by ``etude.load``."""

    shape: tuple[int, ...] = ()
    """Shape of one input, ``(C, H, W)`` for images."""
    classes: tuple[str, ...] = ()
    """Class names in label order."""
    mean: tuple[float, ...] = ()
    """Per-channel mean of the training split, in [0, 1] units."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation of the training split, in [0, 1] units."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else a method needs to build again (vocabulary, actions, …), JSON values only."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spec:
        """Build from the dictionary that ``json.load`` gives (lists become tuples)."""
        coded: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**coded)
