"""A warm process that forks one `etude` command after another, so that a test of the command line costs 0.1 s, not 3 s.

It reads one JSON request a line and answers each with one line. ``{"words": […], "out": path, "err": path, "cwd": path,
"env": {…}, "before": code}`` forks a child that runs `code`, then the command, and answers its process id;
``{"wait": pid}`` answers the exit code (negative: killed by that signal).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    import rich.progress
    import rich.table  # noqa: F401
    import torch

    import etude.core.evidence  # noqa: F401
    from etude import cli

    torch.set_num_threads(1)
    piece = Path(__file__).with_name("piece.py")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for method in ("vision/lenet", str(piece)):  # imports what runs import
            cli.main(
                ["run", method, "--preset", "tiny", "--steps", "2", "--quiet", "--out", f"{folder}/{Path(method).stem}"]
            )
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(json.dumps(answer), flush=True)


def child(request: dict[str, Any]) -> None:
    """Become the command: streams, folder, environment; never returns."""
    code: object = 1
    try:
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], WRITE),
            (2, request["err"], WRITE),
        ):
            os.dup2(os.open(path, flags, 0o600), number)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        exec(request["before"], {})
        from etude import cli

        code = cli.main(request["words"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY

if __name__ == "__main__":
    main()
