"""What `etude.load` returns: a run built again, with its trained modules, ready to be used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from etude import catalog
from etude.core import checkpoint
from etude.core import trust as permission
from etude.core.config import replace
from etude.core.errors import UserError
from etude.core.own import opened
from etude.core.spec import Spec


@dataclass(repr=False)
class Loaded:
    """A finished or interrupted run, built again: what `etude.load(run_dir)` returns."""

    name: str
    config: Any
    spec: Spec
    modules: dict[str, nn.Module]
    folder: Path
    step: int
    state: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        """The module named ``model``, in eval mode."""
        if "model" not in self.modules:
            raise UserError(f"{self.name} has no single 'model'; its modules are {', '.join(self.modules) or 'none'}")
        return self.modules["model"]


def load(run: str | os.PathLike[str], *, trust: bool = False) -> Loaded:
    """Build the modules of a run again and fill them from its newest whole checkpoint (eval mode, on the CPU).

    `run` is a run folder, a method's name (its latest run) or ``latest``. Raises UserError when there is no such
    run or no whole checkpoint. A run of an own file is built by the source that it keeps, which is run only if this
    machine has run it before, or with `trust`; nothing else in the folder is ever executed.
    """
    folder, described, entry = opened(run, trust=trust)
    with permission.granted(trust):
        module = catalog.load_method(entry)
        config = replace(module.Config(), described["config"], f"{folder}/config.json")
        spec = Spec.read(folder)
        step, state, _ = checkpoint.load(folder / "checkpoints")
        modules = _built(module, config, spec, folder)
    for name, part in modules.items():
        if name in state:
            checkpoint.restore(part, state[name])
            part.eval()
    rest = {name: value for name, value in state.items() if name not in modules and name != "~run"}
    return Loaded(entry.name, config, spec, modules, folder, step, rest)


def _built(module: ModuleType, config: Any, spec: Spec, folder: Path) -> dict[str, nn.Module]:
    """The method's modules for this config and spec; a spec.json that does not describe its data is named."""
    if not hasattr(module, "build"):
        return {}
    try:
        return module.build(config, spec)
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"no network can be built from {folder}/config.json and spec.json ({said})") from error
