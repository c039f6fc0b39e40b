"""Worker processes beside a run that share its tensors: started, heard, replaced when they are killed, ended with the run.

A worker is a fork of this process, so what lies in shared memory (`torch.Tensor.share_memory_`) is written by all of them. They
tell what they see over a pipe of their own, as JSON: a worker that is killed while it speaks can block nobody.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from etude.core.errors import RunError, UserError

PATIENCE = 3
"""Deaths of one worker without a word between them after which the run ends."""

Work = Callable[[int, Callable[[Any], None], Callable[[], bool]], None]
"""work(worker, tell, stopped): tell sends a message; the work ends when stopped() is true, or when it is done."""


class Crew:
    """`count` workers, from entering the context to leaving it. Raises UserError where the system cannot fork."""

    def __init__(self, count: int, work: Work) -> None:
        if count and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError("several workers need a system that can fork (Linux, macOS); take --workers 1 here")
        self._context: Any = multiprocessing.get_context("fork" if count else None)
        self._work, self._stop = work, torch.zeros(1, dtype=torch.int64).share_memory_()
        self._processes: list[Any] = [None] * count
        self._pipes: list[Any] = [None] * count
        self._silent = [0] * count
        self.replaced = 0
        """Workers that died and were replaced."""

    def __enter__(self) -> Self:
        for worker in range(len(self._processes)):
            self._start(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Nobody works any more when this returns; what was told and not heard is lost."""
        self._stop.fill_(1)
        for process in self._processes:
            process.join(5)
            if process.is_alive():  # hangs in an environment
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    @property
    def pids(self) -> list[int]:
        """Process numbers, by worker."""
        return [process.pid for process in self._processes]

    def hear(self) -> list[tuple[int, Any]]:
        """(worker, message) of all that was told since; starts anew who was killed.

        Raises UserError or RunError where a worker ended with one, RunError where one of them dies again and again.
        """
        heard = []
        for worker, process in enumerate(self._processes):
            gone = not process.is_alive()  # asked before the pipe is emptied: the last words count
            kind = ""
            for kind, message in self._words(worker):
                if kind == "failed":
                    raise UserError(message[1]) if message[0] == "UserError" else RunError(message[1])
                if kind == "told":
                    self._silent[worker] = 0
                    heard.append((worker, message))
            if gone and kind != "done" and process.exitcode != 0:
                self._silent[worker] += 1
                if self._silent[worker] >= PATIENCE:
                    raise RunError(
                        f"worker {worker} ended {PATIENCE} times in a row before it had said anything (exit code "
                        f"{process.exitcode}{', which is often want of memory' if process.exitcode == -9 else ''})"
                    )
                self.replaced += 1
                self._pipes[worker].close()
                self._start(worker)
        return heard

    def _start(self, worker: int) -> None:
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_live,
            args=(self._work, worker, theirs, self._stop, os.getpid()),
            daemon=True,
            name=f"worker {worker}",
        )
        with warnings.catch_warnings():  # threads beside the fork: the worker touches nothing that they hold
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._processes[worker], self._pipes[worker] = process, mine

    def _words(self, worker: int) -> list[tuple[str, Any]]:
        words, pipe = [], self._pipes[worker]
        try:
            while pipe.poll():
                words.append(tuple(json.loads(pipe.recv_bytes())))
        except (EOFError, OSError, ValueError):  # it died in mid-sentence
            pass
        return words


def _live(work: Work, worker: int, pipe: Connection, stop: torch.Tensor, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent tells when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def send(kind: str, message: Any = None) -> None:
        pipe.send_bytes(json.dumps([kind, message]).encode())

    def stopped() -> bool:
        return bool(stop.item()) or os.getppid() != parent  # without its parent it has nobody to work for

    try:
        work(worker, lambda message: send("told", message), stopped)
        send("done")
    except (UserError, RunError) as error:
        send("failed", [type(error).__name__, str(error)])
    except BrokenPipeError:  # the parent is gone
        pass
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"worker {worker}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        send("failed", ["RunError", said])
