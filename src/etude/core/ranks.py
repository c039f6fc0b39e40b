"""Several processes in one run, as torchrun starts them: which one this is, and what they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from etude.core.errors import UserError

Value = TypeVar("Value")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def place() -> tuple[int, int]:
    """(rank of this process, number of ranks), (0, 1) alone. Raises UserError where torchrun's variables are not whole."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not any(found.values()):
        return 0, 1
    advice = "start several ranks with: torchrun --nproc-per-node N -m etude run … (or unset the variable for one)"
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if found[name] and not found[other] and found != {"RANK": "", "WORLD_SIZE": "1"}:
            raise UserError(f"{name} is set in the environment and {other} is not; {advice}")
    try:
        rank, world = int(found["RANK"] or 0), int(found["WORLD_SIZE"])
    except ValueError as error:
        raise UserError(f"RANK={found['RANK']} of WORLD_SIZE={found['WORLD_SIZE']} are no numbers; {advice}") from error
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} is no rank of WORLD_SIZE={world}; {advice}")
    return rank, world


def first() -> bool:
    """Whether this process speaks and writes for all."""
    return place()[0] == 0


@contextlib.contextmanager
def joined(shard: bool, device: str) -> Iterator[None]:
    """Join the process group that torchrun started, if it did; leave it afterwards."""
    _, world = place()
    if shard and world == 1 and "RANK" not in os.environ:
        raise UserError("--shard needs several ranks; start it with: torchrun --nproc-per-node N -m etude run …")
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        yield
        return
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"RANK is set in the environment and {missing[0]} is not; start several ranks with: "
            "torchrun --nproc-per-node N -m etude run … (or unset RANK for one)"
        )
    # its functions take the group that stands at its import as their default; imported later (torch.optim does that) it
    # would keep the group and its threads alive into the end of Python, where now and then one of them aborts
    from torch.distributed import nn  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and device != "cpu" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shared(make: Callable[[], Value]) -> Value:
    """Rank 0's result on every rank; its error too, so that no rank waits for a folder that will not come."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [make(), None]
        except UserError as error:
            box = [None, str(error)]
    # it travels through the process group of this run: nothing is pickled from a file
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
