"""What a network must know of its data: enough to build it again without the data at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etude.core.config import replace
from etude.core.folder import read_object


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
    def from_json(cls, values: dict[str, Any], owner: str = "spec.json") -> Spec:
        """Build from the dictionary that ``json.load`` gives (lists become tuples). Raises UserError for another one."""
        return replace(cls(), values, owner)

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """From the ``spec.json`` of a run folder; an empty one where the method wrote none."""
        path = folder / "spec.json"
        return cls.from_json(read_object(path), str(path)) if path.exists() else cls()
