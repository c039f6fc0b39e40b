"""What a run computes on: devices, cores, memory, and the parts of a network that ranks hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch
from torch import nn

from etude.core.errors import UserError


def units(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered and freed as one under ``--shard``: the children that have parameters.

    Of a ModuleList or ModuleDict, which has no forward pass, it is the blocks inside; a single layer there stays with
    the whole, for its weight may be used in several places (GPT's embedding is its last layer too).
    """
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from (unit for unit in units(child) if any(True for _ in unit.children()))
        elif any(p.numel() for p in child.parameters()):
            yield child


def local(grad: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a gradient, or the gradient itself where it is not sharded."""
    return grad.to_local() if hasattr(grad, "to_local") else grad  # pyright: ignore[reportAttributeAccessIssue]


def statistics(modules: tuple[nn.Module, ...]) -> list[torch.Tensor]:
    """Running means and variances of all batch-norm layers."""
    named = [item for module in modules for item in module.named_buffers()]
    return [buffer for name, buffer in named if name.endswith(("running_mean", "running_var"))]


def cores() -> int:
    """The processor cores this process may use, shared with the other ranks on this machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep the memory that a step frees for the next one; what is free at the end goes back to the system.

    By itself it gives large blocks back at once, and the next step pays for each page again when it is first touched: 1.2 s of
    300 steps of LeNet. Where another C library or the user's own ``MALLOC_…`` or ``GLIBC_TUNABLES`` rules, nothing is changed.
    """
    try:
        libc = ctypes.CDLL(None)
        choose, give_back = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        yield
        return
    rules = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mapped, trimmed = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    if not rules:
        choose(mapped, 1 << 25)  # up to 32 MiB, its largest, blocks are pieces of the heap,
        choose(trimmed, 1 << 30)  # whose end goes back beyond 1 GiB
    try:
        yield
    finally:
        if not rules:
            choose(mapped, 1 << 17)  # its defaults
            choose(trimmed, 1 << 17)
        give_back(0)


def pick_device(name: str) -> torch.device:
    """The torch device of this name; ``auto`` is a GPU where there is one. Under torchrun each rank takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name[:60]} cannot be used here; 'etude doctor' lists the devices of this machine"
        ) from error
    return device
