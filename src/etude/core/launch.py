"""Start, resume and load runs: what `etude run`, `etude resume`, `etude.run` and `etude.load` share."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from etude import catalog
from etude.catalog import Entry
from etude.core import checkpoint
from etude.core.config import check, flag, replace
from etude.core.digest import sources
from etude.core.errors import RunError, UserError, nearest
from etude.core.run import Common, Interrupted, Loaded, Run
from etude.core.spec import Spec

try:
    import fcntl
except ImportError:  # a system without it (Windows) has no such locks
    fcntl = None

OBJECT = "the model object"
"""How config.json names a network that was handed over in Python."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder and the metrics it returned."""

    folder: Path
    metrics: dict[str, float]


def configure(module: ModuleType, entry: Entry, preset: str, values: dict[str, Any]) -> Any:
    """The method's Config for this preset with these fields replaced, checked."""
    if preset not in module.PRESETS:
        raise UserError(
            f"{entry.name} has no preset '{preset}'{nearest(preset, module.PRESETS)} (it has {', '.join(module.PRESETS)})"
        )
    return replace(module.PRESETS[preset], values, entry.name)


def run(name: str, *, preset: str = "default", out: str | os.PathLike[str] | None = None, **settings: Any) -> Finished:
    """Run a method and return its folder and metrics.

    `settings` are fields of the method's Config (``data="mnist"``, ``steps=2000``) and of `Common` (``seed``, ``device``,
    ``precision``, ``threads``, ``save_every``, ``quiet``). A method with a ``source`` takes an `nn.Module` there too; such a
    run cannot be resumed, for its folder holds only the object's name. Raises UserError for wrong input, RunError if
    the run fails.
    """
    entry = catalog.find(name)
    module = catalog.load_method(entry)
    shared = {field.name for field in dataclasses.fields(Common)}
    known = [*(field.name for field in dataclasses.fields(module.Config)), *shared, "preset", "out"]
    for unknown in settings.keys() - known:
        raise UserError(f"{entry.name} has no setting '{unknown}'{nearest(unknown, known)}")
    source = settings.get("source")
    if isinstance(source, torch.nn.Module) and "source" in known:
        settings["source"] = f"{OBJECT} {type(source).__name__}"
    else:
        source = None
    common = replace(Common(), {k: v for k, v in settings.items() if k in shared}, "etude.run")
    config = configure(module, entry, preset, {k: v for k, v in settings.items() if k not in shared})
    return start(entry, module, config, common, preset, Path(out) if out is not None else None, source)


def start(
    entry: Entry,
    module: ModuleType,
    config: Any,
    common: Common,
    preset: str,
    out: Path | None = None,
    source: torch.nn.Module | None = None,
) -> Finished:
    """Make the run folder and run the method in it. Wrong input leaves no folder behind."""
    check(config)
    check(common)
    if common.shard and not catalog.loop_of(module).etude["shards"]:  # type: ignore[attr-defined]
        raise UserError(f"{entry.name} cannot split its parameters over ranks; leave out --shard")
    if common.compile and "run.compile(" not in entry.source:
        raise UserError(f"{entry.name} has no part that torch.compile is used for; leave out --compile")
    if common.precision != "fp32" and not any(".autocast(" in path.read_text("utf-8") for path in sources(entry.path)):
        raise UserError(f"{entry.name} computes in one precision only; leave out --precision {common.precision}")
    described = json.dumps(_command(entry, module, config, common, preset), indent=1) + "\n"
    with _ranks(common), contextlib.ExitStack() as held:
        folder, made = _share(lambda: _make_folder(entry, common, out, described, held))
        try:
            return _execute(entry, module, config, common, folder, resume=False, source=source)
        except UserError:
            if not (folder / "checkpoints").exists() and int(os.environ.get("RANK", 0)) == 0:
                _remove(folder, made)
            raise


def resume(folder: str | os.PathLike[str]) -> Finished:
    """Continue a run exactly where its newest whole checkpoint stands (without one, from the start).

    A finished run is returned as it is. Raises UserError when there is no such run, another process is writing it or
    all its checkpoints are damaged, RunError if the run fails.
    """
    folder = find_run(str(folder))
    described = read_config(folder)
    entry = catalog.find(described["method"])
    if (folder / "done").is_file():
        return Finished(folder, _read_json(folder / "result.json"))
    module = catalog.load_method(entry)
    config = replace(module.Config(), described["config"], f"{folder}/config.json")
    common = replace(Common(), described["common"], f"{folder}/config.json")
    with _ranks(common), contextlib.ExitStack() as held:
        _share(lambda: _claim(folder, held))
        return _execute(entry, module, config, common, folder, resume=True)


def load(folder: str | os.PathLike[str]) -> Loaded:
    """Build the modules of a run again and fill them from its newest whole checkpoint (eval mode, on the CPU).

    `folder` is a run folder, a method's name (its latest run) or ``latest``. Raises UserError when there is no such
    run or no whole checkpoint. Loading never runs code from the folder.
    """
    folder = find_run(str(folder))
    described = read_config(folder)
    entry = catalog.find(described["method"])
    module = catalog.load_method(entry)
    config = replace(module.Config(), described["config"], f"{folder}/config.json")
    spec_file = folder / "spec.json"
    spec = Spec.from_json(_read_json(spec_file)) if spec_file.is_file() else Spec()
    step, state, _ = checkpoint.load(folder / "checkpoints")
    modules = module.build(config, spec) if hasattr(module, "build") else {}
    for name, part in modules.items():
        if name in state:
            checkpoint.restore(part, state[name])
            part.eval()
    rest = {name: value for name, value in state.items() if name not in modules and name != "~run"}
    return Loaded(entry.name, config, spec, modules, folder, step, rest)


def runs_folder() -> Path:
    """Where runs go without ``--out``: ETUDE_RUNS, else ``runs/`` here."""
    return Path(os.environ.get("ETUDE_RUNS", "runs"))


def find_run(text: str) -> Path:
    """The run folder meant by a path, a method's name (its latest run) or ``latest``."""
    path = Path(text)
    if (path / "config.json").is_file():
        return path
    if path.is_file():
        raise UserError(f"{text} is a file; name the run folder (it holds config.json and checkpoints/)")
    root = runs_folder()
    under = root if text == "latest" else root / text
    if text != "latest" and not under.is_dir() and text in {entry.rpartition("/")[2] for entry in catalog.entries()}:
        under = root / catalog.find(text).name
    found = [file for file in under.glob("**/config.json") if file.parent.name != "artifacts"] if under.is_dir() else []
    if not found:
        if path.is_dir():
            raise UserError(f"{text} is not a run folder (it has no config.json)")
        known = [str(file.parent) for file in root.glob("*/*/*/config.json")]
        raise UserError(f"there is no run '{text}'{nearest(text, known)}; 'etude run METHOD' makes one under {root}/")
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config.json of a run folder."""
    described = _read_json(folder / "config.json")
    for name, kind in (("method", str), ("config", dict), ("common", dict)):
        if not isinstance(described.get(name), kind):
            raise UserError(
                f"{folder}/config.json is damaged (it has no {name}); without it the run cannot be built again"
            )
    return described


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or missing ({error}); without it the run cannot be built again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no settings); without it the run cannot be built again")
    return found


def _execute(
    entry: Entry,
    module: ModuleType,
    config: Any,
    common: Common,
    folder: Path,
    resume: bool,
    source: torch.nn.Module | None = None,
) -> Finished:
    loop = catalog.loop_of(module)
    run = Run(entry.name, config, common, folder, resume=resume)
    run.source = source
    for complaint in run.complaints:
        run.say(f"{complaint}; going on from step {run.step}")
    before = torch.get_num_threads()
    run.use_threads(loop.etude["threads"])  # type: ignore[attr-defined]
    try:
        with _signals(run):
            return _finish(entry, run, loop)
    finally:
        run.progress.stop()
        torch.set_num_threads(before)


def _finish(entry: Entry, run: Run, loop: Any) -> Finished:
    """Run the loop to its end; an interruption and a failure leave the folder in order before they are passed on."""
    record, folder = run.record, run.folder
    try:
        record.open(run.step, str(run.device))
        metrics = {name: float(value) for name, value in loop(run.config, run).items()}
        run.finish()
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise RunError(f"the method ended with {name} = {value}")
        record.result(metrics)
        record.beat(run.step)
        record.done()
    except Interrupted:
        said = run.stopped()
        record.beat(run.step)
        _report(entry, run)
        if run.rank == 0:
            print(f"{said}\nnext: etude resume {shlex.quote(str(folder))}", file=sys.stderr)
        raise
    except UserError:
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            run.flush()  # the curve up to the failure belongs in the report
        shown = _plain(error, folder)
        with contextlib.suppress(OSError):  # on a full disk the sentence on the terminal must do
            detail = "" if isinstance(shown, RunError) else "\n" + traceback.format_exc()
            reason = str(shown) if isinstance(shown, RunError) else f"{type(shown).__name__}: {shown}"
            record.failed(reason + detail)
            record.beat(run.step)
            _report(entry, run)
        if shown is error:
            raise
        raise shown from error
    _report(entry, run)
    return Finished(folder, metrics)


def write_report(entry: Entry, folder: Path) -> Path:
    """Write ``report.html`` of a run folder from its files and the method's contract."""
    from etude.core import report

    contract = entry.contract
    return report.render(
        folder,
        report.Contract(
            title=entry.title,
            paper=contract.get("Paper", entry.paper),
            section=entry.section,
            equation=contract.get("Equation", ""),
            algorithm=contract.get("Algorithm", ""),
            differences=contract.get("Differences", ""),
            expect=contract.get("Expect", ""),
            docs=contract["claim"].partition("\n")[2].strip(),
            fields=tuple((field["name"], field["help"]) for field in entry.fields),
            bars=tuple(entry.experiments),
            card=entry.card,
            samples=entry.samples,
        ),
    )


def _report(entry: Entry, run: Run) -> None:
    """Write the report on rank 0; trouble with it is said, and never hides the result or the reason of a failure."""
    if run.rank == 0:
        try:
            write_report(entry, run.folder)
        except Exception as error:
            run.say(f"the report could not be written ({type(error).__name__}: {error}); try 'etude show {run.folder}'")


def _make_folder(
    entry: Entry, common: Common, out: Path | None, described: str, held: contextlib.ExitStack
) -> tuple[Path, bool]:
    """The run's folder with its config.json, and whether it is a new one (``--out`` may name an empty folder)."""
    name = entry.name if "/" in entry.name else f"mine/{entry.name}"
    folder = out or runs_folder() / name / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{common.seed}"
    if out is not None and (folder / "config.json").exists():
        raise UserError(
            f"--out {folder} already holds a run; continue it with 'etude resume {folder}' or name another folder"
        )
    made = False
    try:
        made = not folder.exists()
        if out is not None and not made and any(folder.iterdir()):
            raise UserError(f"--out {folder} is not empty; name a new folder for the run")
        stamp = folder.name
        for again in range(2, 1000):  # another run may begin in the same second
            try:
                folder.mkdir(parents=True, exist_ok=out is not None)
                break
            except FileExistsError:
                if out is not None:
                    raise
                folder, made = folder.with_name(f"{stamp}-{again}"), True
        _claim(folder, held)  # before there is a config.json by which another process could resume it
        checkpoint.write_text(folder / "config.json", described)
    except OSError as error:
        if made:
            _remove(folder, made)
        raise UserError(
            f"the run folder {folder} cannot be written ({error.strerror}); name another with --out"
        ) from error
    return folder, made


def _claim(folder: Path, held: contextlib.ExitStack) -> None:
    """Make this process (rank 0) the only one that writes a run folder, until `held` closes or the process dies.

    The lock is the kernel's, on the folder itself, and leaves no file behind. A file system that has none is passed
    over. Raises UserError when another process has the folder.
    """
    if fcntl is None:
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"the run in {folder} is still being written by another process; resume it when that one has ended"
        ) from error
    except OSError:
        return


def _remove(folder: Path, made: bool) -> None:
    """Remove what a run that could not begin has written, and the empty folders above it inside the runs folder."""
    shutil.rmtree(folder, ignore_errors=True)
    if not made:
        folder.mkdir(exist_ok=True)
        return
    for parent in list(folder.parents)[:3]:
        with contextlib.suppress(OSError):
            if parent.is_relative_to(runs_folder()):
                parent.rmdir()


def _command(entry: Entry, module: ModuleType, config: Any, common: Common, preset: str) -> dict[str, Any]:
    """What config.json holds: the resolved settings and the command that repeats them."""
    values = dataclasses.asdict(config)
    default = dataclasses.asdict(module.PRESETS[preset])
    shared, shared_default = dataclasses.asdict(common), dataclasses.asdict(Common())
    name = entry.name if entry.path.is_relative_to(catalog.PACKAGE) else str(entry.path)
    words = ["etude", "run", name] + ([] if preset == "default" else ["--preset", preset])
    for name_, value in [
        *((k, v) for k, v in values.items() if v != default[k]),
        *((k, v) for k, v in shared.items() if v != shared_default[k]),
    ]:
        if isinstance(value, bool):
            words.append(flag(name_) if value else flag("no_" + name_))
        elif isinstance(value, (list, tuple)):
            words += [flag(name_), *map(str, value)]
        else:
            words += [flag(name_), str(value)]
    return {
        "method": name,
        "preset": preset,
        "seed": common.seed,
        "command": shlex.join(words),
        "config": values,
        "default_config": default,
        "common": shared,
    }


BEYOND = r"(?i)can't allocate memory|unable to allocate|size calculation overflowed|overflow when unpacking"
"""What torch and numpy say when a tensor cannot be as large as the settings ask for."""


def _plain(error: Exception, folder: Path) -> Exception:
    """A sentence for what a full or closed disk, too little memory or a lost rank does, or the error itself."""
    resume = f"etude resume {shlex.quote(str(folder))}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        found = checkpoint.list_checkpoints(folder / "checkpoints")
        kept = (
            f"the checkpoint of step {checkpoint.step_of(found[-1])} is kept" if found else "no checkpoint was written"
        )
        return RunError(f"the disk of {folder} is full ({error.strerror}); {kept}; free space and run: {resume}")
    if isinstance(error, OSError) and error.filename and Path(error.filename).is_relative_to(folder):
        what = f"{error.filename} cannot be written any more ({error.strerror})"
        return RunError(f"{what}; put that right and run: {resume}")
    if isinstance(error, (MemoryError, OverflowError, torch.OutOfMemoryError)) or re.search(BEYOND, str(error)):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        size = f"{int(asked[1].split()[0]):,} bytes" if asked and asked[1].endswith(" bytes") else asked and asked[1]
        return RunError(f"the settings ask for more memory than there is ({size or 'a size beyond counting'} at once)")
    if type(error).__name__ == "DistBackendError" or (type(error) is RuntimeError and "gloo" in str(error)):
        return RunError(f"another rank has stopped or cannot be reached, so this one stops too; run on with: {resume}")
    return error


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the run while it lasts (only the main thread can take signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, run.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ranks(common: Common) -> Iterator[None]:
    """Join the process group that torchrun started, if it did; leave it afterwards."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if common.shard and world == 1 and "RANK" not in os.environ:
        raise UserError("--shard needs several ranks; start it with: torchrun --nproc-per-node N -m etude run …")
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        yield
        return
    # its functions take the group that stands at its import as their default; imported later (torch.optim does that) it
    # would keep the group and its threads alive into the end of Python, where now and then one of them aborts
    from torch.distributed import nn  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and common.device != "cpu" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _share(make: Any) -> Any:
    """Rank 0's result on every rank; its error too, so that no rank waits for a folder that will not come."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [make(), None]
        except UserError as error:
            box = [None, str(error)]
    # it travels through the process group of this run: nothing is pickled from a file
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
