"""etude: every canonical method of deep learning as one short file, readable, proved and fast.

    etude.methods("vision")                            # the names of the methods
    done = etude.run("vision/lenet", data="mnist")     # what `etude run vision/lenet --data mnist` does
    done.metrics, done.history, done.model             # what it returned, its curves, the trained network
    etude.load("vision/lenet").predict("seven.png")    # the latest run, on a picture of your own
    from etude.vision.lenet import LeNet               # every file is importable without side effects

Importing this package does not import torch; `run`, `resume`, `load`, `sample` and the methods do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etude.core.finished import Finished as Finished
    from etude.core.launch import load, resume, run, sample
    from etude.core.loaded import Loaded as Loaded

__version__ = "0.1.0"
__all__ = ["load", "methods", "resume", "run", "sample"]


def methods(room: str | None = None) -> list[str]:
    """The names of all methods, or of those in one room, as `etude.run` takes them."""
    from etude import catalog
    from etude.core.errors import UserError, nearest

    known = catalog.entries()
    found = [name for name, entry in known.items() if room in (None, entry.room)]
    if not found:
        raise UserError(f"there is no room '{room}'{nearest(str(room), {entry.room for entry in known.values()})}")
    return found


def __getattr__(name: str) -> Any:
    if name in __all__:
        from etude.core import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'etude' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
