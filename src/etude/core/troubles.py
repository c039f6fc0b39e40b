"""What the machine does to a run, said in one sentence: a full disk, too little memory, a rank that was lost."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

from etude.core import checkpoint
from etude.core.errors import RunError, shortage


def explained(error: Exception, folder: Path) -> Exception:
    """A sentence for what a full or closed disk or a lost rank does, or the error itself when it is another one."""
    resume = f"etude resume {shlex.quote(str(folder))}"
    if memory := shortage(error):
        return RunError(memory)
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
