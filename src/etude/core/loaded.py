"""What `etude.load` returns: a run built again, with its trained modules, ready to be used."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from etude import catalog
from etude.core import checkpoint
from etude.core import trust as permission
from etude.core.config import replace
from etude.core.errors import UserError
from etude.core.own import opened
from etude.core.spec import Spec

if TYPE_CHECKING:
    from etude.core.predict import Detected, Pictures


@dataclass(repr=False)
class Loaded:
    """A finished or interrupted run, built again: what `etude.load(run_dir)` returns.

    `predict` names the pictures that it is given, `generate` goes on with a text, `sample` draws: whichever the method
    can. `modules` are its networks, plain nn.Modules in eval mode; `model` is the one of that name.
    """

    name: str
    config: Any
    spec: Spec
    modules: dict[str, nn.Module]
    folder: Path
    step: int
    state: dict[str, Any]
    """What else the checkpoint holds: optimizers, Boxes."""
    method: ModuleType | None = None
    """The imported method file."""
    trusted: bool = False

    @property
    def model(self) -> nn.Module:
        """The module named ``model``, in eval mode."""
        if "model" not in self.modules:
            raise UserError(f"{self.name} has no single 'model'; its modules are {', '.join(self.modules) or 'none'}")
        return self.modules["model"]

    def predict(self, pictures: Pictures) -> list[Any]:
        """The class and its probability for each picture: a file, a folder, several of them, an array or a tensor.

        Files are turned upright, made grey or coloured and resized as the training images were. An array is uint8 from 0
        to 255 or floating from 0 to 1, (H, W), (C, H, W), (H, W, C) or N of those, of the network's own size. A method
        whose answer is no class (masks) has a ``predict(loaded, pictures)`` in its file, and says there what a row is.
        """
        from etude.core.predict import predict

        hook = getattr(self.method, "predict", None)
        if hook is None:
            return predict(self, pictures)
        with permission.granted(self.trusted):
            return hook(self, pictures)

    def detect(self, pictures: Pictures) -> list[Detected]:
        """What a detector finds in each picture, given as to `predict`: classes, probabilities, boxes in its own pixels.

        Files are warped to the square that the network takes; of a picture in an array, the boxes are in its pixels.
        """
        from etude.core.predict import detect

        with permission.granted(self.trusted):
            return detect(self, pictures)

    @property
    def detects(self) -> bool:
        """Whether it finds boxes in pictures."""
        return bool(self.spec.extra.get("boxes")) and hasattr(self.method, "detect")

    @overload
    def generate(self, prompt: str = "", **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str] = "", **options: Any) -> str | list[str]:
        """Each prompt and what the model writes after it; `options` are the flags of ``etude sample`` (count, temperature …).

        A list of prompts gives a list of texts, `samples` for each.
        """
        hook = self._writer
        if hook is None:
            raise UserError(f"{self.name} writes no text; {self.offers}")
        rules = self._options(options)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with permission.granted(self.trusted):
            written = hook(self, prompts, rules)
        return written[0] if isinstance(prompt, str) and len(written) == 1 else written

    def sample(self, out: str | os.PathLike[str] | None = None, **options: Any) -> Sampled:
        """Draw what ``etude sample`` draws, into `out` (default: ``samples/`` of the run folder)."""
        if not hasattr(self.method, "sample"):
            raise UserError(f"{self.name} learns no distribution to draw from; {self.offers}")
        return self.draw(self._options(options), Path(out) if out is not None else None)

    def draw(self, options: Any, out: Path | None = None) -> Sampled:
        """`sample` with the method's own options object."""
        assert self.method is not None
        target = out or self.folder / "samples"
        target.mkdir(parents=True, exist_ok=True)
        with permission.granted(self.trusted):
            text = self.method.sample(self, options, target)
        files = sorted(target.iterdir())
        if not files:
            target.rmdir()
        return Sampled(target, text or "", files)

    @property
    def offers(self) -> str:
        """What can be done with this run, in words that end a sentence."""
        where = shlex.quote(str(self.folder))
        if self._writer is not None:
            flag = "text" if hasattr(self.method.Sample, "text") else "prompt"  # type: ignore[union-attr]
            return f"it writes text: etude sample {where} --{flag} …, or loaded.generate({flag})"
        if hasattr(self.method, "sample"):
            return f"draw from it with: etude sample {where}"
        if hasattr(self.method, "predict"):
            return f"it answers for pictures: etude predict {where} FILE …"
        if self.detects:
            return f"it finds boxes in pictures: etude predict {where} FILE …, or loaded.detect(pictures)"
        if "model" in self.modules and len(self.spec.shape) == 3 and len(self.spec.classes) > 1:
            return f"it names pictures: etude predict {where} FILE …"
        return f"see its results with: etude show {where}"

    @property
    def _writer(self) -> Any:
        """The method file's own ``generate(loaded, prompts, options) -> texts``, or None."""
        hook = getattr(self.method, "generate", None)
        own = hook is not None and hook.__module__ == getattr(self.method, "__name__", "")
        return hook if own and hasattr(self.method, "Sample") else None

    def _options(self, values: dict[str, Any]) -> Any:
        assert self.method is not None
        return replace(self.method.Sample(), values, f"sampling from {self.name}")

    def __repr__(self) -> str:
        sizes = [
            f"{name} ({sum(p.numel() for p in part.parameters()):,} parameters)" for name, part in self.modules.items()
        ]
        return f"<{self.name} at step {self.step:,}: {', '.join(sizes) or 'no network'}; {self.folder}>"


@dataclass(frozen=True)
class Sampled:
    """What was drawn from a run: the text that was returned and the files that were written."""

    folder: Path
    text: str
    files: list[Path]


def sample(
    run: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, trust: bool = False, **options: Any
) -> Sampled:
    """Draw from a trained run, as ``etude sample`` does; `options` are its flags. Raises UserError."""
    return load(run, trust=trust).sample(out, **options)


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
    return Loaded(entry.name, config, spec, modules, folder, step, rest, module, trust)


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
