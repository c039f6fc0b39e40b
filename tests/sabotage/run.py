"""Sabotage: put one fault at a time into a copy of the sources and see whether the method's own tests notice.

``make sabotage`` runs all rows of ``tests/sabotage/*.toml`` (``make sabotage ROOM=gans`` those of a room, ``ROOM=gans/gan``
those of a method) and writes ``results/sabotage/<room>.json``: how many faults of each method were killed, and the survivors
by name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude import catalog
from etude.core import record
from etude.core.evidence.cards import own_tests

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BARS = {"function": 0.97, "loop": 0.90}
TIMEOUT = 600


@dataclass(frozen=True)
class Fault:
    """One row: what is broken, in which method, where, and how."""

    method: str
    kind: str
    """"loop" (loop, flags, reported numbers) or "function" (pure functions, networks)."""
    file: str
    """Below src/etude."""
    breaks: str
    text: str
    """Occurs once in the file."""
    replacement: str

    @property
    def path(self) -> str:
        return f"src/etude/{self.file}"

    def put(self, source: str) -> str:
        """The source with the fault in it. Raises ValueError unless the text occurs exactly once."""
        if source.count(self.text) != 1:
            raise ValueError(f"the text of '{self.breaks}' occurs {source.count(self.text)} times in {self.path}")
        return source.replace(self.text, self.replacement)


def rows() -> list[Fault]:
    """All faults, file by file."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        found += [Fault(**row) for row in tomllib.loads(path.read_text(encoding="utf-8")).get("fault", [])]
    return found


def tests_of(method: str, root: Path) -> list[str]:
    """The method's own tests: facts first, then its part of the contract, then what it learns."""
    entry = catalog.find(method)
    facts, learns = own_tests(entry, root), own_tests(entry, root, "learns")
    return list(map(str, [*facts, root / "tests" / "contract" / "test_methods.py", *learns]))


def warm() -> None:
    """Import what the tests import, once, so that every attempt can begin as a fork of this process."""
    import matplotlib.pyplot  # noqa: F401
    import numba  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.optim.lr_scheduler

    torch.set_num_threads(1)


def attempt(method: str, root: Path, kind: str = "") -> tuple[bool, str]:
    """Run the tests of a method in a copy of the checkout, in a fork: whether they pass, and the first failure.

    Of a method's facts the whole-run tests come first for a fault in the loop.
    """
    log = root / "attempt.log"
    files = sorted(tests_of(method, root), key=lambda path: not (kind == "loop" and path.endswith("_run.py")))
    child = os.fork()
    if not child:
        code = 3
        try:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(root)
            changed = {"PYTHONPATH": str(root / "src"), "ETUDE_ONLY": method, "OMP_NUM_THREADS": "1"}
            os.environ.update(changed, PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True  # a source changed twice in a second would be taken for its cached form
            for name in [name for name in sys.modules if name.partition(".")[0] == "etude"]:
                del sys.modules[name]
            sys.path[:] = [str(root / "src"), *(path for path in sys.path if path != str(ROOT / "src"))]
            import pytest

            code = int(pytest.main(["-x", "-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > TIMEOUT:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, f"no end within {TIMEOUT} s"
        time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if code in (3, 4, 5):
        raise RuntimeError(f"pytest could not run:\n{said[-2000:]}")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return code == 0, (failed or [""])[0].partition(" - ")[0].removeprefix("FAILED ")


def copy(target: Path) -> Path:
    """What the tests need of the checkout, without its history and its environment."""
    for name in ("src", "tests", "docs", "benchmarks", "results"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.yml"),
        ROOT / "Makefile",
        ROOT / "constraints.txt",
    ]:
        shutil.copy2(path, target)
    return target


def work(job: Fault | str) -> tuple[bool, str]:
    """One attempt in this worker's own copy; a name alone is the unbroken method."""
    root = HOME["root"]
    began = time.perf_counter()
    if isinstance(job, str):
        passed, where = attempt(job, root)
        said = f"{job}: unbroken, its tests {'pass' if passed else f'FAIL: {where}'}"
    else:
        path = root / job.path
        source = path.read_text(encoding="utf-8")
        path.write_text(job.put(source), encoding="utf-8")
        try:
            passed, where = attempt(job.method, root, job.kind)
        finally:
            path.write_text(source, encoding="utf-8")
        said = f"{job.method} ({job.kind}) {job.breaks}: {'SURVIVED' if passed else 'caught'}"
    print(f"{said}  ({time.perf_counter() - began:.0f} s)", flush=True)
    return passed, where


HOME: dict[str, Path] = {}


def settle(folder: str) -> None:
    """A worker's beginning: a copy of the checkout of its own."""
    HOME["root"] = copy(Path(tempfile.mkdtemp(dir=folder)))


def score(faults: list[Fault], survived: list[bool]) -> dict[str, Any]:
    """What is kept of one method: how many of its faults were noticed, by kind, and the survivors by name."""
    made: dict[str, Any] = {}
    for kind in ("function", "loop"):
        fates = [alive for fault, alive in zip(faults, survived) if fault.kind == kind]
        made[f"{kind}s"] = {"killed": fates.count(False), "total": len(fates)}
    made["survivors"] = [f"{f.method}: {f.breaks}" for f, alive in zip(faults, survived) if alive]
    return made | {"written": record._now(), "commit": record.commit()}


def write(room: str, made: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put these methods into results/sabotage/<room>.json beside those that were tried before, and add all of them up."""
    kept = json.loads(path.read_text(encoding="utf-8")).get("methods", {}) if path.is_file() else {}
    known = {fault.method for fault in rows()}
    methods = {name: one for name, one in sorted((kept | made).items()) if name in known}
    whole: dict[str, Any] = {
        kind: {key: sum(one[kind][key] for one in methods.values()) for key in ("killed", "total")}
        for kind in ("functions", "loops")
    }
    whole["survivors"] = [name for one in methods.values() for name in one["survivors"]]
    whole["methods"] = methods
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", nargs="?", default="", help="a room or a method; default: all")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    chosen = [fault for fault in rows() if fault.method.startswith(options.room)]
    if options.room and "/" in options.room:
        chosen = [fault for fault in chosen if fault.method == options.room]
    if not chosen:
        print(f"there is no fault for '{options.room}'")
        return 2
    methods = sorted({fault.method for fault in chosen})
    jobs: list[Fault | str] = [*methods, *chosen]
    warm()
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.workers, context, settle, (scratch,)) as pool:
            done = list(pool.map(work, jobs))
    broken = [name for number, name in enumerate(methods) if not done[number][0]]
    if broken:  # what fails unbroken proves nothing about faults
        print(f"the tests of {', '.join(broken)} fail without a fault, so nothing is written of that")
    tried = [(f, done[len(methods) + n][0]) for n, f in enumerate(chosen) if f.method not in broken]
    survived = [alive for _, alive in tried]
    for room in sorted({fault.method.partition("/")[0] for fault, _ in tried}):
        made = {}
        for name in sorted({fault.method for fault, _ in tried if fault.method.startswith(f"{room}/")}):
            part = [(fault, alive) for fault, alive in tried if fault.method == name]
            made[name] = score([fault for fault, _ in part], [alive for _, alive in part])
        whole = write(room, made, catalog.results_folder() / "sabotage" / f"{room}.json")
        print(f"{room}: functions {whole['functions']}, loops {whole['loops']}")
    missed = []
    for kind, bar in BARS.items():
        fates = [alive for fault, alive in tried if fault.kind == kind]
        if fates and fates.count(False) / len(fates) < bar:
            missed.append(kind)
    print(
        f"{survived.count(False)} of {len(survived)} faults were caught" + (f"; bar missed: {missed}" if missed else "")
    )
    return 1 if missed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
