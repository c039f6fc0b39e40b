"""Fixtures of the process-level tests: `etude(…)` runs a command in a fresh process and returns what it did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@dataclass
class Done:
    """What a command left: exit code (negative: killed by that signal) and its two streams."""

    code: int
    out: str
    err: str


class Started:
    """A command that runs."""

    def __init__(self, forge: Forge, pid: int, out: Path, err: Path) -> None:
        self.forge, self.pid, self.out, self.err = forge, pid, out, err

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def until(self, ready: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until something is so; the command must live on meanwhile."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"nothing came: {self.err.read_text()}"
            time.sleep(0.002)

    def ready(self) -> None:
        """Wait for the line by which tests/faults/piece.py says that it waits."""
        self.until(lambda: "waiting\n" in self.out.read_text())

    def wait(self) -> Done:
        code = self.forge.ask({"wait": self.pid})
        return Done(code, self.out.read_text(), self.err.read_text() if self.err.is_file() else "")


class Forge:
    """The warm process of forge.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "forge.py")],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    made = Forge()
    yield made
    made.process.kill()
    made.process.communicate()


class Etude:
    """`etude("run", …)` runs a command to its end; `etude.start(…)` returns while it runs. Both in `tmp_path`."""

    def __init__(self, forge: Forge, folder: Path) -> None:
        self.forge, self.folder, self.count = forge, folder, 0
        self.piece, self.choir = str(HERE / "piece.py"), str(HERE / "choir.py")
        self.environment = {**ENVIRONMENT, "ETUDE_RUNS": str(folder / "runs")}
        self.live: list[Started] = []

    def start(self, *words: object, before: str = "", err: str | None = None, **env: str) -> Started:
        self.count += 1
        out = self.folder / f"out-{self.count}"
        out.touch()
        request = {
            "words": [str(word) for word in words],
            "out": str(out),
            "err": err or str(self.folder / f"err-{self.count}"),
            "cwd": str(self.folder),
            "env": {"ETUDE_RUNS": str(self.folder / "runs"), **env},
            "before": before,
        }
        started = Started(self.forge, self.forge.ask(request), out, Path(request["err"]))
        self.live.append(started)
        return started

    def __call__(self, *words: object, before: str = "", **env: str) -> Done:
        return self.start(*words, before=before, **env).wait()

    def refused(self, *words: object, before: str = "", **env: str) -> str:
        """The one sentence by which a command refuses wrong input: exit code 2 and nothing left behind."""
        done = self(*words, before=before, **env)
        assert done.code == 2, (done.code, done.out, done.err)
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("etude: "), done.err
        assert done.out == ""
        return lines[0].removeprefix("etude: ")


@pytest.fixture
def etude(forge: Forge, tmp_path: Path) -> Iterator[Etude]:
    made = Etude(forge, tmp_path)
    yield made
    for started in made.live:  # none is left when a test fails half-way
        try:
            os.kill(started.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
