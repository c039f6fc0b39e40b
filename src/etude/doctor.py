"""What this machine has for etude, and what to fix: the facts behind `etude doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys

from etude import catalog, data
from etude.core import extras, record
from etude.core.launch import runs_folder


def examine() -> list[dict[str, str]]:
    """What this machine has for etude, one row a fact: {what, state: ok | note | fix, detail}."""
    rows = [_row("python", "ok" if sys.version_info >= (3, 11) else "fix", sys.version.split()[0])]
    for package in (
        "torch",
        "numpy",
        "numba",
        "tyro",
        "rich",
        "safetensors",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "pooch",
    ):
        try:
            rows.append(_row(package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append(_row(package, "fix", f"not installed; run: pip install {package}"))
    for extra, packages in catalog.EXTRAS.items():
        there = catalog.extra_installed(extra)
        users = sum(extra in entry.needs for entry in catalog.entries().values())
        detail = ", ".join(packages) if there else f"not installed ({users} methods use it); run: {extras.how(extra)}"
        rows.append(_row(f"extra {extra}", "ok" if there else "note", detail))
    import torch

    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(_row("devices", "ok", ", ".join(devices)))
    facts = record.hardware()
    rows.append(_row("machine", "ok", f"{facts['cpu']}, {facts['cores']} cores, {facts.get('memory_gb', '?')} GB"))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    rows.append(_row("compiler", "ok" if compiler else "note", compiler or "none found; --compile will not work"))
    for what, path in (("runs folder", runs_folder()), ("data folder", data.home())):
        parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        state = "ok" if writable else "note" if what == "data folder" else "fix"
        rows.append(_row(what, state, f"{path}{'' if writable else ' cannot be written'}"))
        if what == "runs folder":
            free = shutil.disk_usage(parent).free / 2**30
            rows.append(_row("free disk", "ok" if free > 1 else "fix", f"{free:.1f} GB"))
    return rows


def _row(what: str, state: str, detail: str) -> dict[str, str]:
    return {"what": what, "state": state, "detail": detail}
