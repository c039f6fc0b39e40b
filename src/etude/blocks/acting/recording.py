"""Recorded episodes: what was observed and what was done, in a plain file that is read without trusting it.

A recording holds N steps, one episode after the other. On disk it is one ``.npz`` (a zip of numpy arrays, nothing is
pickled), so any program can write it with ``numpy.savez("episodes.npz", observations=…, actions=…, starts=…)``:

    observations  (N, …)            any real numbers, one row a step; what is behind the first axis is flattened
    actions       (N,) or (N, A)    integers from 0 are discrete actions, floating numbers continuous ones
    starts        (N,)              bool (or 0 and 1): an episode begins with this step; the first one always does
    rewards       (N,)              optional

`record` plays episodes with a policy in worlds, `policy_of` is the policy of a finished run, and `written` is what
``etude sample`` says when it has left such a file.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from etude.blocks.acting.memory import afford
from etude.core.errors import UserError
from etude.core.run import Loaded

LARGEST = 4 * 2**30
"""Bytes that the arrays of a file may have together."""
NAMES = ("observations", "actions", "starts", "rewards")

Policy = Callable[[NDArray[np.float32]], NDArray[Any]]
"""observations (n, D) → actions (n,) int64 or (n, A) float"""


class Stepped(Protocol):
    """Worlds, as far as a recording needs them (`etude.blocks.acting.worlds.Worlds`)."""

    observation: NDArray[np.float32]

    def step(self, action: NDArray[Any], /) -> Any: ...


@dataclass(frozen=True)
class Recording:
    """N steps, episode after episode."""

    observations: NDArray[np.float32]
    """(N, D)"""
    actions: NDArray[Any]
    """(N,) int64 from 0, or (N, A) float32"""
    starts: NDArray[np.bool_]
    """(N,): an episode begins with this step"""
    rewards: NDArray[np.float32]
    """(N,); 0 where a file does not say"""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def first(self) -> NDArray[np.int64]:
        """(E,): the step with which each episode begins."""
        return np.flatnonzero(self.starts)

    @property
    def ends(self) -> NDArray[np.int64]:
        """(N,): for each step, the number of the step behind the last one of its episode."""
        bounds = np.append(self.first, len(self))
        return np.repeat(bounds[1:], np.diff(bounds))

    @property
    def longest(self) -> int:
        """Steps of the longest episode."""
        return int((self.ends - np.arange(len(self)))[self.first].max())

    @property
    def returns(self) -> NDArray[np.float64]:
        """(E,): undiscounted."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.first)

    def head(self, steps: int) -> Recording:
        """The first `steps` of them (all, where there are fewer)."""
        return Recording(self.observations[:steps], self.actions[:steps], self.starts[:steps], self.rewards[:steps])

    def episodes(self, chosen: NDArray[np.int64]) -> Recording:
        """The episodes of these numbers, in this order."""
        bounds = np.append(self.first, len(self))
        rows = np.concatenate([np.arange(int(bounds[e]), int(bounds[e + 1])) for e in chosen])
        return Recording(self.observations[rows], self.actions[rows], self.starts[rows], self.rewards[rows])

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        np.savez_compressed(
            path, observations=self.observations, actions=self.actions, starts=self.starts, rewards=self.rewards
        )


def joined(parts: list[Recording]) -> Recording:
    """One recording after the other."""
    return Recording(*(np.concatenate([getattr(part, name) for part in parts]) for name in NAMES))


# ------------------------------------------------------------------------------------------------------- playing


def record(worlds: Stepped, policy: Policy, limit: int) -> Recording:
    """One whole episode (of at most `limit` steps) from each world, in the order of the worlds.

    The worlds must stand at the beginning of an episode. One that has finished is stepped on with the others, and what
    happens there is not recorded; the policy sees all n observations in every step, row i being world i.
    """
    running = np.ones(len(worlds.observation), bool)
    kept: list[tuple[Any, ...]] = []
    for _ in range(limit):
        row = worlds.step(policy(worlds.observation))
        counts = running[row.world]
        kept.append((row.world[counts], row.state[counts], row.action[counts], row.reward[counts]))
        running[row.world[row.terminated | row.truncated]] = False
        if not running.any():
            break
    world, state, action, reward = (np.concatenate(column) for column in zip(*kept))
    order = np.argsort(world, kind="stable")
    starts = np.diff(world[order], prepend=-1) != 0
    return Recording(state[order], action[order], starts, reward[order])


def policy_of(loaded: Loaded) -> Policy:
    """What the policy of a run does, observations (n, D) → actions: the most probable or most valued one.

    Asked are, in this order: the method file's own ``policy(loaded)``; the module ``model``, ``policy`` or ``actor`` by its
    ``best(observations)``, or by the largest of as many outputs as there are actions. Where the spec has the bounds "low" and
    "high", the answers are shares of the box from −1 to 1. Raises UserError for other runs.
    """
    own: Any = getattr(loaded.method, "policy", None)
    if callable(own):
        return own(loaded)  # type: ignore[return-value]
    net = next((loaded.modules[name] for name in ("model", "policy", "actor") if name in loaded.modules), None)
    mute = net is None or not (hasattr(net, "best") or type(net).forward is not torch.nn.Module.forward)
    if net is None or mute or "env" not in loaded.spec.extra:
        raise UserError(f"{loaded.folder} is a run of {loaded.name}, which acts in no world (such as rl/dqn does)")
    best, extra = getattr(net, "best", None) or (lambda state: net(state).argmax(-1)), loaded.spec.extra
    low, high = (np.asarray(extra[end]) if "low" in extra else None for end in ("low", "high"))

    def act(state: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            said = best(torch.from_numpy(state)).numpy()
        return said if low is None else ((high + low) / 2 + (high - low) / 2 * said).astype(np.float32)

    return act


def written(recording: Recording, path: Path) -> str:
    """Save it and say so, with the returns."""
    recording.save(path)
    returns = recording.returns
    return (
        f"{path}: {len(returns):,} episodes, {len(recording):,} steps, returns "
        f"{returns.min():g} to {returns.max():g}, mean {returns.mean():g}"
    )


# -------------------------------------------------------------------------------------------------------- reading


def load(path: Path) -> Recording:
    """Read a file of the form above. Raises UserError in one sentence for anything else; no code in it is ever run."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UserError(f"{path} is not a plain file")
            with zipfile.ZipFile(file) as archive:
                arrays = _arrays(archive, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or no .npz file ({said})") from error
    return _checked(arrays, path)


def _arrays(archive: zipfile.ZipFile, path: Path) -> dict[str, NDArray[Any]]:
    """The arrays by name; the size of each is known, and bounded, before it is read."""
    from numpy.lib import format as npy

    members = {info.filename: info for info in archive.infolist()}
    missing = [name for name in NAMES[:3] if f"{name}.npy" not in members]
    if missing:
        has = ", ".join(sorted(members))[:200] or "nothing"
        raise UserError(
            f"{path} has no array '{missing[0]}' (it holds {has}); a recording has observations, actions and starts"
        )
    chosen = [members[f"{name}.npy"] for name in NAMES if f"{name}.npy" in members]
    total = sum(info.file_size for info in chosen)
    if total > LARGEST:
        raise UserError(f"{path} holds {total:,} bytes of arrays; at most {LARGEST:,} are read")
    afford(f"the recording {path}", 3 * total)
    found = {}
    for info in chosen:
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as member:
            version = npy.read_magic(member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(member)
            if dtype.kind not in "biuf":
                raise UserError(f"{path}: {name} has the type {dtype}; it must hold plain numbers")
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size > info.file_size:
                raise UserError(f"{path} is damaged ({name} says {size:,} bytes and has {info.file_size:,})")
            data = member.read(size)
        if len(data) != size:
            raise UserError(f"{path} is damaged ({name} ends after {len(data):,} of {size:,} bytes)")
        found[name] = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return found


def _checked(arrays: dict[str, NDArray[Any]], path: Path) -> Recording:
    """The recording, in our types, once everything about the arrays is as it must be."""
    observations, actions, starts = (arrays[name] for name in NAMES[:3])
    rewards = arrays.get("rewards", np.zeros(len(actions) if actions.ndim else 0))
    counts = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or counts["actions"] < 1:
        said = ", ".join(f"{name} {arrays[name].shape}" for name in arrays)
        raise UserError(f"{path}: all arrays must have one row for each of at least one step ({said})")
    for name, array in (("starts", starts), ("rewards", rewards)):
        if array.ndim != 1:
            raise UserError(f"{path}: {name} has the shape {array.shape}; it must be ({len(actions)},)")
    if actions.ndim > 2:
        raise UserError(f"{path}: actions has the shape {actions.shape}; it must be (N,) or (N, A)")
    if observations[0].size < 1 or actions[0].size < 1:
        raise UserError(f"{path}: observations and actions must have at least one number a step")
    if not np.isin(starts, (0, 1)).all():
        raise UserError(f"{path}: starts holds {starts[~np.isin(starts, (0, 1))][0]}; it must hold true and false")
    if not starts[0]:
        raise UserError(f"{path}: starts is false for the first step, with which an episode must begin")
    with np.errstate(over="ignore"):
        observations = observations.reshape(len(observations), -1).astype(np.float32)
        rewards = rewards.astype(np.float32)
        if actions.dtype.kind in "iub":
            if actions.ndim == 2 and actions.shape[1] != 1:
                raise UserError(f"{path}: actions are integers {actions.shape}; discrete actions must be (N,)")
            actions = actions.reshape(-1)
            least, most = int(actions.min()), int(actions.max())
            if least < 0 or most >= 10**6:
                raise UserError(
                    f"{path}: actions lie between {least} and {most}; discrete actions count from 0, to 999,999 at most"
                )
            actions = actions.astype(np.int64)
        else:
            actions = actions.reshape(len(actions), -1).astype(np.float32)
    for name, array in (("observations", observations), ("actions", actions), ("rewards", rewards)):
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds a number that is not finite in single precision")
    return Recording(observations, actions, starts.astype(bool), rewards)
