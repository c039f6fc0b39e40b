"""Run: the shared ground under every method's explicit loop. Plain torch; no trainer, no wrapper round the model.

A loop asks it for the clock (`steps`), hands it what must survive (`track`), lets it average gradients over
ranks and guard against NaN (`average`), and gives it numbers and pictures (`log`, `artifact`). Everything else
(networks, losses, optimizers, the order of lines) stays visible in the method's file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from etude.core import checkpoint, record
from etude.core.config import Whole
from etude.core.errors import RunError, UserError
from etude.core.progress import Progress
from etude.core.randomness import fold, generator
from etude.core.spec import Spec

Module = TypeVar("Module", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])
SAVE_SECONDS = 60.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with the state saved; `code` is the exit code (130 or 143)."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code = 128 + signum


@dataclass(frozen=True)
class Common:
    """Settings that every method understands, beside its own."""

    seed: Whole = 0
    """Seed of every random stream of the run."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic inside autocast regions."""
    threads: Whole = 0
    """CPU threads; 0 takes the method's own default (1 for small networks, all for large ones)."""
    save_every: Whole = 0
    """Steps between checkpoints; 0 saves every 60 seconds. One is always saved at the end and when interrupted."""
    compile: bool = False
    """Compile the pure update functions with torch.compile (slow first step)."""
    shard: bool = False
    """Shard parameters over the ranks of torchrun (FSDP2)."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclass
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


class Run:
    """Device, precision, ranks, clock, checkpoints, log and pictures of one run. Made by `etude.core.launch`."""

    def __init__(self, name: str, config: Any, common: Common, folder: Path, resume: bool = False) -> None:
        self.name, self.config, self.common, self.folder = name, config, common, folder
        self.seed = common.seed
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(common.device)
        self.step = 0
        self.complaints: list[str] = []
        self.progress = Progress(name, enabled=not common.quiet and self.rank == 0)
        self.record = record.Record(folder, writes=self.rank == 0)
        self._tracked: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._parameters: dict[tuple[int, ...], tuple[list[tuple[str, nn.Parameter]], tuple[nn.Module, ...]]] = {}
        self._row: dict[str, Any] = {}
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._latest: dict[str, float] = {}
        self._suspects: list[tuple[int, torch.Tensor]] = []
        self._signal = 0
        self._looping = self._left = self._over = False
        self._total = 0
        self._sharded = False
        self._state_step = -1  # step of the newest checkpoint on disk
        self._seeders = [torch.default_generator]
        if self.device.type == "cuda":
            torch.cuda.init()
            self._seeders.append(torch.cuda.default_generators[self.device.index or 0])
        if resume:
            self.step, self._saved, self.complaints = checkpoint.load(folder / "checkpoints")
            self._over = bool(self._saved.pop("~over", False))
            self._state_step = self.step
            self.record.cut(self.step)
        torch.manual_seed(fold(self.seed, 0, 0, "init"))  # equal initial weights on every rank

    # ------------------------------------------------------------------------------------------------------ state

    def describe(self, spec: Spec) -> None:
        """Write what `build` needs to know of the data to ``spec.json``."""
        if self.rank == 0:
            checkpoint.write_text(self.folder / "spec.json", json.dumps(dataclasses.asdict(spec), indent=1) + "\n")

    def place(self, module: Module) -> Module:
        """Move a module to the run's device: channels_last for convolutions, sharded by FSDP2 under ``--shard``.

        Call it before making the optimizer. The module stays itself (same class, same methods).
        """
        module.to(self.device)
        if any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in module.modules()):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.common.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for child in module.children():
                if sum(p.numel() for p in child.parameters()) > 0 and not isinstance(child, nn.ModuleList):
                    fully_shard(child, mesh=mesh)
            fully_shard(module, mesh=mesh)
            self._sharded = True
        return module

    def track(self, **objects: Any) -> None:
        """Name what must survive: modules, optimizers, Boxes, anything with state_dict/load_state_dict.

        On a resumed run each is restored here, in place, before the first step.
        """
        for name, thing in objects.items():
            if name in self._tracked:
                raise ValueError(f"run.track got '{name}' twice")
            self._tracked[name] = thing
            if name in self._saved:
                checkpoint.restore(thing, self._saved.pop(name))

    def save(self) -> None:
        """Write a checkpoint of everything tracked, unless the newest one already stands at this step."""
        self.flush()
        if self._state_step == self.step:
            return
        state = {name: checkpoint.state_of(thing) for name, thing in self._tracked.items()}
        if self.rank == 0:
            checkpoint.save(self.folder / "checkpoints", self.step, {**state, "~over": self._over})
            self.record.beat(self.step)
        self._state_step = self.step

    # ------------------------------------------------------------------------------------------------------ clock

    def steps(self, total: int) -> Iterator[int]:
        """Yield the step numbers from where the run stands to `total` - 1: the only clock of a run.

        Between steps it checkpoints on cadence, draws progress and answers Ctrl-C and SIGTERM (state saved, exit 130 /
        143; a second Ctrl-C stops at once). Before each step the global torch generators are seeded from (seed,
        step, rank), so dropout and `torch.randn` repeat exactly after a resume. Leaving the loop by `break` ends it.
        """
        if self._saved:
            raise RunError(f"the checkpoint holds '{next(iter(self._saved))}', which the method did not track; was its file changed?")
        self._total = total
        every, save_due = self.common.save_every, time.perf_counter() + SAVE_SECONDS
        self.progress.start(self.step, total)
        self._looping, began = True, time.perf_counter()
        seed, rank, seeders, progress = self.seed, self.rank, self._seeders, self.progress
        try:
            while self.step < total and not self._over:
                if self._signal and self.world == 1:
                    raise Interrupted(self._signal)
                key = fold(seed, self.step, rank, "step")
                for seeder in seeders:
                    seeder.manual_seed(key)
                yield self.step
                self.step += 1
                if self._row:
                    self._rows.append((self.step, self._row))
                    self._row = {}
                now = time.perf_counter()
                self.record.loop_seconds = now - began
                if now >= progress.due or len(self._rows) >= 4096:
                    self.flush()
                    progress.update(self.step, self._latest)
                due = self.step % every == 0 if every else now >= save_due
                if self.world > 1:
                    due = self._agree(due)
                if due:
                    self.save()
                    save_due = now + SAVE_SECONDS
        except GeneratorExit:  # a `break` or an error in the loop's body: `finish` knows which
            self._left = True
            raise
        except Interrupted:
            self.save()
            raise
        finally:
            self._looping = False
            progress.stop()
        self.save()

    def finish(self) -> None:
        """Called after the method has returned: a loop left by `break` has completed its last step; save the end."""
        if self._left:
            self.step += 1
            self._over, self._state_step = True, -1
        if self._row:
            self._rows.append((max(self.step, 1), self._row))
            self._row = {}
        self.flush()
        self.save()

    def every(self, interval: int) -> bool:
        """True in each `interval`-th step and in the last one; 0 means only in the last."""
        done = self.step + 1
        return done == self._total or (interval > 0 and done % interval == 0)

    def generator(self, purpose: str, step: int | None = None) -> torch.Generator:
        """A CPU generator keyed by (seed, step, rank, purpose); without `step` it is the same at every step."""
        return generator(self.seed, -1 if step is None else step, self.rank, purpose)

    # ------------------------------------------------------------------------------------------------- arithmetic

    def average(self, *modules: nn.Module, **scalars: torch.Tensor) -> None:
        """After backward, before clipping and update: average over ranks, and stop the run on NaN or Inf.

        Gradients of all parameters of `modules` and the named 0-dim `scalars` are averaged in one flat all-reduce (FSDP2
        reduces its own gradients). On CPU a non-finite scalar or gradient raises RunError at once, so the update
        never happens; on an accelerator the check is kept on the device and read at the next flush, always
        before a checkpoint is written, so the last checkpoint is good in either case.
        """
        key = tuple(map(id, modules))
        if key not in self._parameters:
            named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
            self._parameters[key] = (named, modules)
        named = self._parameters[key][0]
        grads = [p.grad for _, p in named if p.grad is not None]
        if self.world > 1 and not self._sharded:
            self._reduce(grads, scalars)
        if self.device.type != "cpu":
            values = [*torch._foreach_norm(grads), *(v.detach() for v in scalars.values())]
            self._suspects.append((self.step, torch.stack([v.to(self.device, torch.float32) for v in values]).sum()))
            return
        for name, value in scalars.items():
            number = value.item()
            if not math.isfinite(number):
                raise RunError(f"{name} is {number} at step {self.step}{self._kept()}")
        if self._sharded:
            grads = [grad.to_local() for grad in grads]  # type: ignore[attr-defined]
        if grads and not math.isfinite(_size(grads)):
            bad = [name for name, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            if bad:  # none when finite values only overflowed in the sum
                raise RunError(f"the gradient of {bad[0]} is not finite at step {self.step}{self._kept()}")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context for forward passes: bfloat16 where ``--precision bf16`` asks for it, else nothing."""
        if self.common.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def compile(self, function: Function) -> Function:
        """The function compiled by torch.compile under ``--compile``, else itself."""
        return torch.compile(function) if self.common.compile else function  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------------------- record

    def log(self, **scalars: torch.Tensor | float) -> None:
        """Record numbers of this step (0-dim tensors or floats). Tensors are kept and read later: no sync here."""
        row = self._row
        for name, value in scalars.items():
            row[name] = value.detach() if isinstance(value, torch.Tensor) else value

    def artifact(self, name: str, thing: Any, caption: str = "", step: int | None = None) -> None:
        """Write a picture (figure, image, tensor, list of images → GIF), table (dict) or text into ``artifacts/``."""
        if self.rank == 0:
            self.record.artifact(name, thing, caption, step)

    def say(self, text: str) -> None:
        """One line for the terminal."""
        self.progress.say(text)

    # ------------------------------------------------------------------------------------------------------ private

    def receive(self, signum: int, _frame: Any) -> None:
        """Signal handler: finish the step, save, stop; a second signal stops now; outside the loop stop now too."""
        if self._signal:
            self.progress.stop()
            print("\netude: stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self._signal = signum
        if not self._looping:
            raise Interrupted(signum)
        if self.rank == 0:
            self.progress.say("stopping after this step (once more stops at once)")

    def _kept(self) -> str:
        if self._state_step < 0:
            return "; the update was not made; no checkpoint had been written yet"
        return f"; the update was not made and the checkpoint of step {self._state_step} is kept"

    def flush(self) -> None:
        """Read the buffered tensors, refuse NaN, and append the rows to metrics.jsonl."""
        if self._suspects:
            sums = torch.stack([value for _, value in self._suspects]).tolist()
            for (step, _), value in zip(self._suspects, sums):
                if not math.isfinite(value):
                    raise RunError(f"a loss or gradient is not finite at step {step}; the checkpoint of step {self._state_step} is kept")
            self._suspects.clear()
        rows, self._rows = self._rows, []
        if not rows:
            return
        waiting = [v for _, row in rows for v in row.values() if isinstance(v, torch.Tensor) and v.device.type != "cpu"]
        read = iter(torch.stack([v.double() if v.device.type == "cuda" else v.float() for v in waiting]).tolist() if waiting else [])
        lines = []
        for step, row in rows:
            for name, value in row.items():
                if isinstance(value, torch.Tensor):
                    value = value.item() if value.device.type == "cpu" else next(read)
                row[name] = value = float(value)
                if not math.isfinite(value):
                    raise RunError(f"{name} is {value} at step {step - 1}; the checkpoint of step {self._state_step} is kept")
            self._latest |= row
            lines.append((step, row))
        self.record.metrics(lines)

    def _reduce(self, grads: list[torch.Tensor], scalars: dict[str, torch.Tensor]) -> None:
        values = [*grads, *(value.detach() for value in scalars.values())]
        flat = torch.cat([value.reshape(-1).to(torch.float32) for value in values])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(self.world).split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(value) for part, value in zip(parts, values)])

    def _agree(self, due: bool) -> bool:
        """All ranks take one decision after each step: whether to save (rank 0's clock) or, on a signal to any, to stop."""
        word = torch.tensor(2 if self._signal else int(due and (self.rank == 0 or self.common.save_every > 0)))
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
        if word == 2:
            raise Interrupted(self._signal or signal.SIGTERM)
        return bool(word)


def _size(tensors: list[torch.Tensor]) -> float:
    """A number that is finite when every element is: one sum over small sets (3 dispatches), norms over large ones."""
    if sum(tensor.numel() for tensor in tensors) < 100_000:
        return torch.cat([tensor.reshape(-1) for tensor in tensors]).sum().item()
    return sum([norm.item() for norm in torch._foreach_norm(tensors)])


def pick_device(name: str) -> torch.device:
    """The torch device of this name; ``auto`` is a GPU where there is one. Under torchrun each rank takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here; 'etude doctor' lists the devices of this machine") from error
    return device
