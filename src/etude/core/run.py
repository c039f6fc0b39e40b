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
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar

import torch
from torch import nn

from etude.core import checkpoint, devices, record
from etude.core.config import Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.loaded import Loaded as Loaded  # what `sample` of a method's file is given
from etude.core.progress import Progress
from etude.core.randomness import fold, generator
from etude.core.spec import Spec

Module = TypeVar("Module", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])
SAVE_SECONDS = 60.0


class Describes(Protocol):
    """Data that can say what they are."""

    def about(self) -> dict[str, Any]:
        """Name, source and counts, JSON values only."""
        ...


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
    threads: Annotated[int, Range(0, 512)] = 0
    """CPU threads; 0 takes the method's own default (1 for small networks, all for large ones)."""
    save_every: Whole = 0
    """Steps between checkpoints; 0 saves every 60 seconds. One is always saved at the end and when interrupted."""
    compile: bool = False
    """Compile the pure update functions with torch.compile (slow first step)."""
    shard: bool = False
    """Shard parameters over the ranks of torchrun (FSDP2)."""
    quiet: bool = False
    """No progress on the terminal."""


class Run:
    """Device, precision, ranks, clock, checkpoints, log and pictures of one run. Made by `etude.core.launch`."""

    def __init__(self, name: str, config: Any, common: Common, folder: Path, resume: bool = False) -> None:
        self.name, self.config, self.common, self.folder = name, config, common, folder
        self.seed = common.seed
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = devices.pick_device(common.device)
        self._on_cpu = self.device.type == "cpu"
        self.step = 0
        self.source: nn.Module | None = None  # given as `source` in Python: it has no place in config.json
        self.data: Any = None  # images given as `data`, likewise
        self.env: Any = None  # an environment given as `env`, likewise
        self.complaints: list[str] = []
        self.progress = Progress(name, enabled=not common.quiet and self.rank == 0)
        self.record = record.Record(folder, writes=self.rank == 0)
        self._tracked: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._parameters: dict[tuple[nn.Module, ...], list[nn.Parameter]] = {}  # of the modules given to `average`
        self._about: dict[str, Any] = {}  # what the report says of the data
        self._row: dict[str, Any] = {}
        self._last_row: dict[str, Any] = {}  # of the step in which the loop was left
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._latest: dict[str, float] = {}
        single = {"device": self.device, "dtype": torch.float32}  # whatever torch's default type is
        self._found, self._one = torch.zeros(1, **single), torch.ones(1, **single)
        self._suspects: list[tuple[int, torch.Tensor]] = []
        self._signal = 0
        self._busy = self._stop = self._left = self._over = False
        self._total = 0
        self._sharded = False
        self._state_step = -1  # step of the newest checkpoint on disk
        self._seeders = [torch.default_generator]
        if self.device.type == "cuda":
            torch.cuda.init()
            self._seeders.append(torch.cuda.default_generators[self.device.index or 0])
        if resume and checkpoint.list_checkpoints(folder / "checkpoints"):  # without one, step 0 is where it stands
            self.step, self._saved, self.complaints = checkpoint.load(folder / "checkpoints")
            clock = self._saved.pop("~run", None)
            if not isinstance(clock, dict) or not isinstance(clock.get("rows"), int) or "over" not in clock:
                raise UserError(
                    f"the checkpoint of step {self.step} in {folder} is not one of etude's (it holds no clock)"
                )
            self._over, self.record.rows = bool(clock["over"]), clock["rows"]
            others = clock.get("ranks", [])
            if self.rank and self.rank <= len(others):
                self._saved |= others[self.rank - 1]
            if len(others) + 1 != self.world:
                count = f"{len(others) + 1} rank{'s' if others else ''}"
                self.complaints.append(
                    f"the run was saved by {count} and is now on {self.world}, so its numbers will be other ones"
                )
            self._state_step = self.step
        self._resumed = self._state_step
        torch.manual_seed(fold(self.seed, 0, 0, "init"))  # equal initial weights on every rank

    def use_threads(self, count: int | None) -> None:
        """CPU threads from here on: `count`, or for None every core, shared with other ranks; ``--threads`` goes first."""
        torch.set_num_threads(self.common.threads or count or devices.cores())
        self.record.threads = torch.get_num_threads()

    def suit_threads(self, module: nn.Module) -> None:
        """One thread for a network of up to a million parameters, which a busy machine does not slow; else every core."""
        self.use_threads(1 if sum(p.numel() for p in module.parameters()) <= 1_000_000 else None)

    # ------------------------------------------------------------------------------------------------------ state

    def describe(self, spec: Spec, data: Describes | None = None) -> None:
        """Write what `build` needs to know of the data to ``spec.json``; `data.about()` is kept for the report."""
        if self.rank == 0:
            checkpoint.write_text(self.folder / "spec.json", json.dumps(dataclasses.asdict(spec), indent=1) + "\n")
        self._about = {} if data is None else {"data": data.about()}

    def _introduce(self) -> None:
        """Write ``about.json``: what is learned from, and how many parameters each tracked module has."""
        sizes = {
            name: sum(p.numel() for p in thing.parameters())
            for name, thing in self._tracked.items()
            if isinstance(thing, nn.Module)
        }
        if self.rank == 0 and self.folder.is_dir():
            about = self._about | {"parameters": sizes}
            checkpoint.write_text(self.folder / "about.json", json.dumps(about, indent=1) + "\n")

    def place(self, module: Module) -> Module:
        """Move a module to the run's device: channels_last for convolutions, or sharded by FSDP2 under ``--shard``.

        Call it before making the optimizer. The module stays itself (same class, same methods).
        """
        module.to(self.device)
        if self.common.shard:  # which takes no channels_last
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for unit in devices.units(module):
                fully_shard(unit, mesh=mesh)
            fully_shard(module, mesh=mesh)
            self._sharded = True
        elif any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in module.modules()):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def track(self, **objects: Any) -> None:
        """Name what must survive: modules, optimizers, Boxes, anything with state_dict/load_state_dict.

        On a resumed run each is restored here, in place, before the first step. Over several ranks, modules and
        optimizers are saved once and must be equal on all of them; of anything else (Boxes, replay buffers, worlds)
        each rank's own is saved and restored.
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
        self._refuse_to_keep()
        state = {name: checkpoint.state_of(thing) for name, thing in self._tracked.items()}
        clock = {"over": self._over, "rows": self.record.rows}
        if self.world > 1:
            shared = (nn.Module, torch.optim.Optimizer)
            own = {name: state[name] for name, thing in self._tracked.items() if not isinstance(thing, shared)}
            clock["ranks"] = self._gather(own if self.rank else {})[1:]
        if self.rank == 0:
            checkpoint.save(self.folder / "checkpoints", self.step, {**state, "~run": clock})
            self.record.beat(self.step)
        self._state_step = self.step

    # ------------------------------------------------------------------------------------------------------ clock

    def steps(self, total: int) -> Iterator[int]:
        """Yield the step numbers from where the run stands to `total` - 1: the only clock of a run.

        Between steps it checkpoints on cadence, draws progress and answers Ctrl-C and SIGTERM (state saved, exit 130 /
        143; a second Ctrl-C stops at once). Before each step, and after the last, the global torch generators are
        seeded from (seed, step, rank), so dropout and `torch.randn` repeat exactly after a resume. Leaving the loop
        by `break` ends it.
        """
        if self._saved:
            name = next(iter(self._saved))
            raise RunError(f"the checkpoint holds '{name}', which the method did not track; was its file changed?")
        row, self._row = self._row, {}
        if row and self.step != self._resumed:  # logged before the loop; a resumed run has it on record
            self._rows.append((self.step, row))
        self._total = total
        self._introduce()
        every, save_due = self.common.save_every, time.perf_counter() + SAVE_SECONDS
        self.progress.start(self.step, total)
        self._busy, progress = True, self.progress
        keys: list[int] = []
        began = time.perf_counter() - self.record.loop_seconds  # an earlier loop of this session counts too
        busy = time.process_time() - self.record.cpu_seconds
        try:
            while self.step < total and not self._over and not self._stop:
                if not keys:  # made 256 at a time: between steps it is cold code that costs
                    keys = [
                        fold(self.seed, step, self.rank, "step") for step in range(self.step + 255, self.step - 1, -1)
                    ]
                self._seed(keys.pop())
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
                else:
                    self._stop = self._signal > 0
                if due:
                    self.record.cpu_seconds = time.process_time() - busy
                    self.save()
                    save_due = now + SAVE_SECONDS
            self.record.cpu_seconds = time.process_time() - busy
            self.save()
        except GeneratorExit:  # a `break` or an error in the loop's body: `finish` knows which
            self.record.cpu_seconds = time.process_time() - busy
            self._left, self._last_row, self._row = True, self._row, {}
            raise
        finally:
            self._busy = False
            progress.stop()
            self._seed(fold(self.seed, total, self.rank, "after"))
        if self._stop or self._signal:
            raise Interrupted(self._signal or signal.SIGTERM)

    def finish(self) -> None:
        """Called after the method has returned: save the end, and what was logged after the loop."""
        self._busy = True  # a signal no longer cuts this short
        self._close()
        if self._row:
            self._rows.append((self.step, self._row))
            self._row = {}
        self.save()

    def stopped(self) -> str:
        """Called when Ctrl-C or SIGTERM has ended the method: save what is not saved yet, and say what is."""
        self._close()
        if self._state_step < 0:
            return "stopped before the first step"
        return f"stopped with the state of step {self._state_step} saved"

    def _close(self) -> None:
        """A loop left by `break` has completed its last step: count it and save."""
        if self._left:
            self._left, self._over, self._state_step = False, True, -1
            self.step += 1
            if self._last_row:
                self._rows.append((self.step, self._last_row))
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

        Gradients of all parameters of `modules`, their batch-norm statistics and the named 0-dim `scalars` are averaged
        in one flat all-reduce (FSDP2 reduces its own gradients). On CPU a non-finite scalar or gradient raises RunError
        at once, so the update never happens; on an accelerator the check is kept on the device and read at the next
        flush, always before a checkpoint is written, so the last checkpoint is good in either case.
        """
        parameters = self._parameters.get(modules)
        if parameters is None:
            parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
            self._parameters[modules] = parameters
        grads = [grad for p in parameters if (grad := p.grad) is not None]
        found = self._found
        if self.world > 1:
            whole = [grad for grad in grads if not hasattr(grad, "to_local")]
            self._reduce([*whole, *devices.statistics(modules), *scalars.values()])
            grads = [devices.local(grad) for grad in grads]
        if grads and (base := grads[0]._base) is not None and all(grad._base is base for grad in grads):
            grads = [base]  # views of one flat gradient vector: look at it once
        if grads:  # one dispatch marks `found` when any element is not finite; the factor 1 leaves them as they are
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, self._one)
        if self._sharded:  # each rank sees its own shards only
            torch.distributed.all_reduce(found)
        if self._on_cpu:
            for value in scalars.values():
                if not math.isfinite(value.item()):
                    self._refuse(modules, scalars)
            if found.item():
                self._refuse(modules, scalars)
        else:
            numbers = [value.detach().to(torch.float32).reshape(1) for value in scalars.values()]
            self._suspects.append((self.step, torch.cat([found / (1 - found), *numbers]).sum()))

    def _refuse(self, modules: tuple[nn.Module, ...], scalars: dict[str, torch.Tensor]) -> NoReturn:
        """Name the first scalar or gradient that is not finite."""
        kept = f"at step {self.step}; the update was not made and {self._kept()}"
        for name, value in scalars.items():
            if not math.isfinite(value.item()):
                raise RunError(f"{name} is {value.item()} {kept}")
        for module in modules:
            for name, p in module.named_parameters():
                if p.grad is not None and not devices.local(p.grad).isfinite().all():
                    raise RunError(f"the gradient of {name} is not finite {kept}")
        raise RunError(f"a gradient on another rank is not finite {kept}")

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
        """Record numbers of this step (0-dim tensors or floats). Tensors on a GPU are read later: no sync here."""
        row = self._row
        for name, value in scalars.items():
            if isinstance(value, torch.Tensor):  # a leaf may be changed in place before it is read
                value = value.item() if value.is_cpu else value.detach().clone() if value.is_leaf else value.detach()
            row[name] = value

    def artifact(self, name: str, thing: Any, caption: str = "", step: int | None = None) -> None:
        """Write a picture (figure, image, tensor, list of images → GIF), table (dict) or text into ``artifacts/``."""
        if self.rank == 0:
            self.record.artifact(name, thing, caption, step)

    def say(self, text: str) -> None:
        """One line for the terminal."""
        self.progress.say(text)

    # ------------------------------------------------------------------------------------------------------ private

    def receive(self, signum: int, _frame: Any) -> None:
        """Signal handler: finish the step, save, stop; outside the loop stop now; a second signal stops at once."""
        if self._signal:
            self.progress.stop()
            print("\netude: stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self._signal = signum
        if not self._busy:
            raise Interrupted(signum)
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another print
            self.progress.say("stopping after this step (once more stops at once)")

    def _refuse_to_keep(self) -> None:
        """A state that is not finite replaces no checkpoint: whatever diverged, what is kept can be gone on from."""
        for name, thing in self._tracked.items():
            if isinstance(thing, nn.Module):
                values = [*thing.parameters(), *devices.statistics((thing,))]
            elif isinstance(thing, torch.optim.Optimizer):
                values = [value for slot in thing.state.values() for value in slot.values()]
            else:
                continue
            tensors = [
                devices.local(value)
                for value in values
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
            if not all(bool(value.isfinite().all()) for value in tensors):
                raise RunError(f"{name} is not finite after step {max(self.step - 1, 0)}; {self._kept()}")

    def _seed(self, key: int) -> None:
        for seeder in self._seeders:
            seeder.manual_seed(key)

    def _kept(self) -> str:
        if self._state_step < 0:
            return "no checkpoint had been written yet"
        return f"the checkpoint of step {self._state_step} is kept"

    def flush(self) -> None:
        """Read the buffered tensors, refuse NaN, and append the rows to metrics.jsonl."""
        if self._suspects:
            sums = torch.stack([value for _, value in self._suspects]).tolist()
            for (step, _), value in zip(self._suspects, sums):
                if not math.isfinite(value):
                    raise RunError(f"a loss or gradient is not finite at step {step}; {self._kept()}")
            self._suspects.clear()
        rows, self._rows = self._rows, []
        if not rows:
            return
        waiting = [v for _, row in rows for v in row.values() if isinstance(v, torch.Tensor)]
        read = iter(torch.stack([v.double() if v.is_cuda else v.float() for v in waiting]).tolist() if waiting else [])
        for index, (step, row) in enumerate(rows):
            for name, value in row.items():
                if type(value) is not float:
                    row[name] = value = next(read) if isinstance(value, torch.Tensor) else float(value)
                if not math.isfinite(value):
                    self.record.metrics(rows[:index])
                    raise RunError(f"{name} is {value} at step {max(step - 1, 0)}; {self._kept()}")
            self._latest |= row
        self.record.metrics(rows)

    def _reduce(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place and in one message."""
        values = [value.detach() for value in tensors]
        if not values:
            return
        wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
        flat = torch.cat([value.reshape(-1).to(self.device, wide) for value in values])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(self.world).split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(value) for part, value in zip(parts, values)])

    def _gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on rank 0. They travel through the process group: nothing is pickled to a file."""
        values = [None] * self.world
        torch.distributed.gather_object(value, values if self.rank == 0 else None)
        return values

    def _agree(self, due: bool) -> bool:
        """All ranks take one decision after each step: whether to save (rank 0's clock) or, on a signal to any, to stop."""
        word = torch.tensor(2 if self._signal else int(due and (self.rank == 0 or self.common.save_every > 0)))
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
        self._stop = word.item() == 2
        return word.item() == 1
