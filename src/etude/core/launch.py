"""Start, resume and load runs: what `etude run`, `etude resume`, `etude.run` and `etude.load` share."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from etude import catalog
from etude.catalog import Entry
from etude.core import checkpoint, devices, longer, own, ranks
from etude.core import trust as permission
from etude.core.config import check, flag, replace
from etude.core.digest import sources
from etude.core.errors import RunError, UserError, nearest
from etude.core.finished import Finished
from etude.core.folder import find_run, read_result, runs_folder
from etude.core.loaded import Loaded, load, sample
from etude.core.own import opened
from etude.core.reporting import write_report
from etude.core.run import Common, Interrupted, Run
from etude.core.troubles import explained

__all__ = [
    "OBJECTS",
    "Finished",
    "configure",
    "find_run",
    "load",
    "method",
    "opened",
    "resume",
    "run",
    "sample",
    "start",
    "write_report",
]

try:
    import fcntl
except ImportError:  # a system without it (Windows) has no such locks
    fcntl = None

OBJECTS = {"source": "the model object", "data": "the data object", "env": "the environment object"}
"""How config.json names what was handed over in Python, by the setting."""


def configure(module: ModuleType, entry: Entry, preset: str, values: dict[str, Any]) -> Any:
    """The method's Config for this preset with these fields replaced, checked."""
    if preset not in module.PRESETS:
        raise UserError(
            f"{entry.name} has no preset '{preset}'{nearest(preset, module.PRESETS)} (it has {', '.join(module.PRESETS)})"
        )
    return replace(module.PRESETS[preset], values, entry.name)


def method(name: str) -> tuple[Entry, ModuleType]:
    """The method of this name, file or folder, imported: the user names it now, so an own one is trusted from here on."""
    entry = catalog.find(name)
    with permission.granted(True):
        return entry, catalog.load_method(entry)


def run(name: str, *, preset: str = "default", out: str | os.PathLike[str] | None = None, **settings: Any) -> Finished:
    """Run a method and return its folder and metrics.

    `settings` are fields of the method's Config (``data="mnist"``, ``steps=2000``) and of `Common` (``seed``, ``device``,
    ``precision``, ``threads``, ``save_every``, ``quiet``). A method with a ``source`` takes an `nn.Module` or a finished run
    there too, and images, a pair (images, labels) or a `torch.utils.data` dataset as ``data``; one with an ``env`` takes an
    environment, its class or a function that makes one. A run on an object cannot be resumed, for its folder holds only
    the object's kind. Raises UserError for wrong input, RunError if the run fails.
    """
    entry, module = method(name)
    shared = {field.name for field in dataclasses.fields(Common)}
    known = [*(field.name for field in dataclasses.fields(module.Config)), *shared, "preset", "out"]
    for unknown in settings.keys() - known:
        raise UserError(f"{entry.name} has no setting '{unknown}'{nearest(unknown, known)}")
    if isinstance(settings.get("source"), (Finished, Loaded)):
        settings["source"] = settings["source"].folder
    given = _objects(entry, settings, known)
    common = replace(Common(), {k: v for k, v in settings.items() if k in shared}, "etude.run")
    config = configure(module, entry, preset, {k: v for k, v in settings.items() if k not in shared})
    return start(entry, module, config, common, preset, Path(out) if out is not None else None, given)


def _objects(entry: Entry, settings: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Take what is no name and no path out of the settings, and leave its kind there: by setting, what was handed over."""
    given = {}
    for name, words in OBJECTS.items():
        thing = settings.get(name)
        if name not in known or thing is None or isinstance(thing, (str, os.PathLike)):
            continue
        if name == "data" and "source" not in known:
            raise UserError(f"{entry.name} takes data by name or as a folder, not a {type(thing).__name__} object")
        if name == "source" and not isinstance(thing, torch.nn.Module):
            continue  # refused with the other settings of a wrong type
        given[name] = thing
        settings[name] = f"{words} {getattr(thing, '__name__', type(thing).__name__)}"
    return given


def start(
    entry: Entry,
    module: ModuleType,
    config: Any,
    common: Common,
    preset: str,
    out: Path | None = None,
    given: dict[str, Any] | None = None,
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
    described = _command(entry, module, config, common, preset)
    with (
        permission.granted(True),
        ranks.joined(common.shard, common.device),
        contextlib.ExitStack() as held,
    ):
        folder, made = ranks.shared(lambda: _make_folder(entry, common, out, described, held))
        try:
            return _execute(entry, module, config, common, folder, resume=False, given=given)
        except UserError:
            if not (folder / "checkpoints").exists() and ranks.first():
                _remove(folder, made)
            raise


def resume(
    folder: str | os.PathLike[str],
    *,
    trust: bool = False,
    source: str | os.PathLike[str] | None = None,
    **length: int,
) -> Finished:
    """Continue a run exactly where its newest whole checkpoint stands (without one, from the start).

    A finished run is returned as it is, unless `length` (``steps=2000``; iterations, episodes or rounds, as the method calls
    it) is more than it was made for: then it trains on. A run of an own file goes on with the source that it keeps, or
    with `source`, a repaired file, which is kept in its place. `trust` lets it run code that this machine has not run
    before. Raises UserError when there is no such run, another process is writing it or all its checkpoints are
    damaged, RunError if the run fails.
    """
    path, described, entry = opened(folder, trust=trust or source is not None)
    repaired = _repaired(path, described, os.fspath(source)) if source is not None else None
    if (path / "done").is_file() and not length:
        return Finished(path, read_result(path))
    with permission.granted(trust or repaired is not None):
        module = catalog.load_method(repaired or entry)
        config = replace(module.Config(), described["config"], f"{path}/config.json")
        common = replace(Common(), described["common"], f"{path}/config.json")
        if length:
            config = longer.lengthen(path, described, repaired or entry, config, length)
        with ranks.joined(common.shard, common.device), contextlib.ExitStack() as held:
            ranks.shared(lambda: _claim(path, held))
            if repaired is not None and ranks.first():
                before = described["source"]
                described["source"] = {
                    **own.keep(repaired, path),
                    "before": [*before.get("before", []), before["sha256"]],
                }
            if (repaired is not None or length) and ranks.first():
                for name in ("done", "result.json") if length else ():
                    _take_away(path / name)
                checkpoint.write_text(path / "config.json", json.dumps(described, indent=1) + "\n")
            return _execute(repaired or entry, module, config, common, path, resume=True)


def _take_away(path: Path) -> None:
    """Delete a file of a run folder, if it is there. Raises UserError where something else stands in its place."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be removed ({error.strerror}); look at it and take it away") from error


def _repaired(folder: Path, described: dict[str, Any], source: str) -> own.Own:
    """The file (or folder) that is to be kept in place of the source a run was made with."""
    if not described["source"].get("sha256"):
        raise UserError(f"{folder} is a run of {described['method']}, which is no own file; leave out --source")
    found = own.find(source)
    if found.whole != (folder / "source").is_dir():
        raise UserError(
            f"the run in {folder} was made by a {'file' if found.whole else 'folder'}, and {source} is none"
        )
    return dataclasses.replace(found, name=described["method"])


def _execute(
    entry: Entry,
    module: ModuleType,
    config: Any,
    common: Common,
    folder: Path,
    resume: bool,
    given: dict[str, Any] | None = None,
) -> Finished:
    loop = catalog.loop_of(module)
    run = Run(entry.name, config, common, folder, resume=resume)
    for name, thing in (given or {}).items():
        setattr(run, name, thing)
    for complaint in run.complaints:
        run.say(f"{complaint}; going on from step {run.step}")
    before = torch.get_num_threads()
    run.use_threads(loop.etude["threads"])  # type: ignore[attr-defined]
    try:
        with _signals(run), devices.kept_memory():
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
        shown = explained(error, folder)
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


def _report(entry: Entry, run: Run) -> None:
    """Write the report on rank 0; trouble with it is said, and never hides the result or the reason of a failure."""
    if run.rank == 0:
        try:
            write_report(entry, run.folder)
        except Exception as error:
            run.say(f"the report could not be written ({type(error).__name__}: {error}); try 'etude show {run.folder}'")


def _make_folder(
    entry: Entry, common: Common, out: Path | None, described: dict[str, Any], held: contextlib.ExitStack
) -> tuple[Path, bool]:
    """The run's folder with its config.json, and whether it is a new one (``--out`` may name an empty folder)."""
    folder = out or runs_folder() / entry.name / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{common.seed}"
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
        if isinstance(entry, own.Own):
            described["source"] = own.keep(entry, folder)
        checkpoint.write_text(folder / "config.json", json.dumps(described, indent=1) + "\n")
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
    name = str(entry.root.resolve()) if isinstance(entry, own.Own) else entry.name
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
        "method": entry.name,
        "preset": preset,
        "seed": common.seed,
        "command": shlex.join(words),
        "config": values,
        "default_config": default,
        "common": shared,
    }


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
