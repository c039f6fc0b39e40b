"""Code that is not etude's own is run when the user says so, or when this machine has run the very same before.

A run folder may come from anyone, and its config.json may name code: the kept source of a user's own method, a game or
an environment in a file. Whoever is about to run such code hands its bytes to `permit` first. Where the user has named
the file just now (`etude run`, a call from Python) it is granted, and its SHA-256 is remembered in a file outside every
run folder; `load`, `resume`, `sample` and their like run only what is remembered, or what ``--trust`` / ``trust=True``
grants.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from etude.core.errors import UserError

_granted: ContextVar[bool] = ContextVar("granted", default=True)


def cache_folder() -> Path:
    """Where etude keeps what it remembers: ETUDE_CACHE, else `etude` in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ETUDE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "etude"


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of one file, or, for several, of the list of their digests and names (as `sha256sum` prints it)."""
    each = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if len(each) == 1:
        return next(iter(each.values()))
    return hashlib.sha256("".join(f"{each[name]}  {name}\n" for name in sorted(each)).encode()).hexdigest()


@contextlib.contextmanager
def granted(yes: bool) -> Iterator[None]:
    """Inside, code given to `permit` is trusted because the user named it (`yes`), or only if it is remembered."""
    token = _granted.set(yes)
    try:
        yield
    finally:
        _granted.reset(token)


def is_granted() -> bool:
    """Whether the user's word covers code that is not remembered."""
    return _granted.get()


def permit(files: Mapping[str, bytes], what: str) -> None:
    """Raise UserError, saying what would be run, unless the user has granted it or this machine has run it before."""
    found = digest(files)
    if found in remembered():
        return
    if not _granted.get():
        lines = sum(data.count(b"\n") + 1 for data in files.values())
        raise UserError(
            f"{what} ({lines:,} lines, SHA-256 {found[:16]}…) would be run, and this machine has not run it before; "
            "read it, and if you trust it add --trust ('etude run' takes the word of 'etude sample RUN --trust' before it; in "
            "Python: trust=True)"
        )
    _remember(found, what)


def remembered() -> frozenset[str]:
    """The digests of all code that was run here at the user's word."""
    try:
        text = (cache_folder() / "trusted").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(line.split(" ", 1)[0] for line in text.splitlines())


def _remember(found: str, what: str) -> None:
    line = f"{found} {datetime.date.today().isoformat()} {' '.join(what.split())}\n"
    with contextlib.suppress(OSError):  # where nothing can be kept, the next command asks for --trust again
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "trusted", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line.encode("utf-8", "replace"))
        finally:
            os.close(handle)
