"""The command line: `etude VERB …`. Verbs that need no network import no torch and answer at once.

Exit codes: 0 done; 1 the run or a verification failed; 2 the input was wrong; 130/143 interrupted with the state saved.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from etude import __version__
from etude.cli import completion, machine, methods, runs, several
from etude.cli.settings import parse_settings
from etude.cli.shared import VERBS
from etude.core.errors import RunError, UserError, nearest

__all__ = ["VERBS", "main", "parse_settings"]

# the function behind each of VERBS
FUNCTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": methods.list_,
    "info": methods.info,
    "run": runs.run,
    "resume": runs.resume,
    "show": runs.show,
    "runs": several.runs,
    "compare": several.compare,
    "predict": runs.predict,
    "sample": runs.sample,
    "export": several.export,
    "verify": methods.verify,
    "bench": methods.bench,
    "data": machine.data,
    "copy": methods.copy,
    "doctor": machine.doctor,
    "completion": completion.completion,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; every foreseeable mistake is one sentence on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    # read when torch is loaded: threads that wait for each other soon give up their core, which costs nothing where
    # the cores are free, and where they are not a GAN on two threads took 47 s instead of 75
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _streams()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _say_error(error, 2)
    except RunError as error:
        return _say_error(error, 1)
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "code", 130)
    except BrokenPipeError:  # `etude list | head`
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0
    except OSError as error:
        code = _say_error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error), 1)
        with contextlib.suppress(OSError, ValueError):  # what could not be written cannot be written at the end either
            sys.stdout.flush()
        return code
    except Exception as error:
        from etude.core.errors import shortage

        if memory := shortage(error):
            return _say_error(memory, 1)
        raise


def _streams() -> None:
    """Make the three streams usable, however this process was started.

    A closed one becomes the null device, before a file of ours gets its number; what its encoding cannot write (a
    Greek letter in ASCII, a file name that is no UTF-8) becomes a question mark.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif number and hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a terminal has no position to be asked for
                stream.reconfigure(errors="replace")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"etude {__version__}")
        return 0
    if words[0] == "__complete":
        print("\n".join(completion.candidates(words[1:])))
        return 0
    if words[0] not in VERBS:
        raise UserError(f"there is no command '{words[0]}'{nearest(words[0], VERBS)} ('etude --help' lists them)")
    return FUNCTIONS[words[0]](words[1:])


def _overview() -> str:
    lines = ["etude: every canonical method of deep learning as one short file, readable, proved and fast", ""]
    lines += ["usage: etude COMMAND …     ('etude COMMAND --help' says more)", ""]
    lines += [f"  {verb:<11} {text}" for verb, text in VERBS.items()]
    lines += ["", "first steps:", "  etude list", "  etude run vision/lenet", "  etude show latest"]
    return "\n".join(lines)


def _say_error(error: Exception | str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(f"etude: {error}".replace("\n", " "), file=sys.stderr)
    return code
