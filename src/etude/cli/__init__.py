"""The command line: `etude VERB …`. Verbs that need no network import no torch and answer at once.

Exit codes: 0 done; 1 the run or a verification failed; 2 the input was wrong; 130/143 interrupted with the state saved.
"""

from __future__ import annotations

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
    try:
        return _dispatch(words)
    except UserError as error:
        return _say_error(error, 2)
    except RunError as error:
        return _say_error(error, 1)
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "code", 130)
    except BrokenPipeError:  # `etude list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say_error(f"{error.filename}: {error.strerror}" if error.filename else error, 1)


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
    print(f"etude: {error}".replace("\n", " "), file=sys.stderr)
    return code
