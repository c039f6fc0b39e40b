"""etude: every canonical method of deep learning as one short file, readable, proved and fast.

    etude.run("vision/lenet", data="mnist")     # what `etude run vision/lenet --data mnist` does
    etude.load("runs/vision/lenet/…").model     # the trained network of a run
    from etude.vision.lenet import LeNet        # every file is importable without side effects

Importing this package does not import torch; `run`, `resume`, `load` and the methods do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etude.core.launch import load, resume, run, sample

__version__ = "0.1.0"
__all__ = ["load", "resume", "run", "sample"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from etude.core import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'etude' has no attribute '{name}'")
