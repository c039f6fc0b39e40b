"""What the machine does to a run, said in one sentence: a full disk, too little memory, a rank that was lost."""

from __future__ import annotations

import errno
import re
import shlex
from pathlib import Path

from etude.core import checkpoint
from etude.core.errors import RunError

_BYTES = re.compile(
    r"allocate (?:memory: you tried to allocate )?([\d.]+) ?(bytes|[KMGTPE]i?B)|(?:Unable to allocate) ([\d.]+) ([KMGTPE]?i?B)"
)
_UNITS = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))}


def no_memory(error: BaseException) -> str:
    """How much memory was asked for in vain, in words; empty for any other error.

    NumPy, torch and Python say it each in its own way.
    """
    text = " ".join(str(error).split())
    mine = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not mine and not (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    ):
        overflow = isinstance(error, (RuntimeError, ValueError, OverflowError, TypeError)) and _TOO_BIG.search(text)
        return "more bytes than there are addresses" if overflow else ""
    found = _BYTES.search(text)
    if not found:
        return "more memory than there is"
    count = float(found[1]) * _UNITS.get(found[2].replace("bytes", "B"), 1)
    return f"{count:,.0f} bytes"


_TOO_BIG = re.compile(
    r"Storage size calculation overflowed|numel: integer multiplication overflow|invalid dimension|"
    r"Maximum allowed dimension exceeded|array is too big|too large to convert to C|cannot fit 'int' into an index-sized|"
    r"Overflow when unpacking long|out of range for .*int|negative dimensions|int too (big|large) to convert"
)


def explained(error: Exception, folder: Path) -> Exception:
    """A sentence for what a full or closed disk or a lost rank does, or the error itself when it is another one."""
    resume = f"etude resume {shlex.quote(str(folder))}"
    if memory := no_memory(error):
        return RunError(
            f"this machine has not the memory for these settings: {memory} were asked for; make something smaller"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        found = checkpoint.list_checkpoints(folder / "checkpoints")
        kept = (
            f"the checkpoint of step {checkpoint.step_of(found[-1])} is kept" if found else "no checkpoint was written"
        )
        return RunError(f"the disk of {folder} is full ({error.strerror}); {kept}; free space and run: {resume}")
    if isinstance(error, OSError) and error.filename and Path(error.filename).is_relative_to(folder):
        what = f"{error.filename} cannot be written any more ({error.strerror})"
        return RunError(f"{what}; put that right and run: {resume}")
    if type(error).__name__ == "DistBackendError" or (type(error) is RuntimeError and "gloo" in str(error)):
        return RunError(f"another rank has stopped or cannot be reached, so this one stops too; run on with: {resume}")
    return error
