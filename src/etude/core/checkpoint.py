"""Checkpoints: safetensors for arrays, JSON for the rest; written aside, synced, renamed; never a pickle.

A checkpoint is a folder ``step-000000120/`` with ``tensors.safetensors``, ``state.json`` (the tree of plain values, with
a name where each tensor stood) and ``manifest.json`` (step, bytes and SHA-256 of both). It is built under a temporary name
and renamed when whole, so a kill at any moment leaves either the whole new checkpoint or the previous one. Loading
reads numbers and text only: no code in a file is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from etude.core.errors import UserError

PREFIX = "step-"


ARRAYS = (np.ndarray, torch.Tensor)


class Box:
    """A named set of arrays, tensors, numbers and lists that must survive: ``box = Box(best=0.0, table=np.zeros(9))``.

    Attributes are read and assigned freely; `Run.track` saves and restores them. Arrays and tensors of equal shape and
    dtype are restored in place, so views and kernels that hold them stay valid. One that has room for more along one
    axis than what was saved (a row a step, in a run that is made longer) takes it at its beginning.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    if TYPE_CHECKING:  # any name may be assigned

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this Box holds {', '.join(self.__dict__) or 'nothing'}, not '{name}'")

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            held: Any = self.__dict__.get(name)
            if _has_room(held, value):
                with torch.no_grad():
                    held[tuple(map(slice, value.shape))] = value
            else:
                self.__dict__[name] = value


def _has_room(held: Any, value: Any) -> bool:
    """Whether an array is of the kind, dtype and shape of another, or longer along one axis."""
    if not any(isinstance(held, kind) and isinstance(value, kind) for kind in ARRAYS):
        return False
    if held.dtype != value.dtype or held.ndim != value.ndim:
        return False
    more = [a - b for a, b in zip(held.shape, value.shape) if a != b]
    return not more or (len(more) == 1 and more[0] > 0)


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step` under `folder`, keep the newest `keep`, and return its folder.

    `state` is a tree of dict, list, tuple, str, int, float, bool, None, tensors and numpy arrays. Raises OSError when
    the disk refuses (the older checkpoints are untouched and the half-written one is removed) and TypeError,
    naming the place, for a value of another type.
    """
    final = folder / f"{PREFIX}{step:09d}"
    part = folder / f".part-{PREFIX}{step:09d}"
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors, {})
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write_tensors(part / "tensors.safetensors", tensors)
        _write(part / "state.json", json.dumps(tree).encode())
        files = {name: _fingerprint(part / name) for name in ("tensors.safetensors", "state.json")}
        _write(part / "manifest.json", json.dumps({"format": 1, "step": step, "files": files}).encode())
        _sync_folder(part)
        _remove(final)  # there is one when a run goes on from before a damaged checkpoint and comes to its step again
        part.replace(final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    # newer ones were passed over as damaged when the run was resumed; half-written ones were left by a kill
    found = list_checkpoints(folder)
    at = found.index(final) + 1
    for old in [*found[: max(at - keep, 0)], *found[at:], *folder.glob(".part-*")]:
        _remove(old)
    return final


def load(folder: Path) -> tuple[int, dict[str, Any], list[str]]:
    """Return (step, state, complaints) of the newest whole checkpoint under `folder`.

    A truncated, altered or foreign checkpoint is passed over with a complaint and the one before is taken. Raises
    UserError when none is whole.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return step_of(path), read(path), complaints
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError("; ".join(complaints) + "; no whole checkpoint is left, so start the run again")
    raise UserError(f"{folder.parent} has no checkpoint yet; 'etude resume {folder.parent}' runs it from the start")


def read(path: Path) -> dict[str, Any]:
    """Return the state in one checkpoint folder, after checking sizes and SHA-256 of its files."""
    import safetensors
    import safetensors.torch

    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        whole = manifest["step"] == step_of(path) and all(
            _fingerprint(path / name) == manifest["files"][name] for name in ("tensors.safetensors", "state.json")
        )
        if not whole:
            raise UserError(f"checkpoint {path} is damaged (its checksum does not match)")
        tensors = safetensors.torch.load_file(path / "tensors.safetensors")
        state = _decode(json.loads((path / "state.json").read_bytes()), tensors)
        if not isinstance(state, dict):
            raise UserError(f"checkpoint {path} is damaged (its state.json holds no object)")
        return state
    except UserError:
        raise
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint of etude ({error})") from error


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first (half-written ones have another name and are not among them)."""
    names = {path: path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")}
    return sorted(path for path, digits in names.items() if digits.isascii() and digits.isdigit() and len(digits) < 20)


def state_of(thing: Any) -> Any:
    """The saved form of a tracked object: its `state_dict()` with plain names, or the value itself.

    Names that torch.compile adds (``_orig_mod.``) are taken out, so compiled and plain modules exchange checkpoints.
    Sharded tensors (FSDP2) are gathered whole: every rank must call this in the same order.
    """
    state = thing.state_dict() if hasattr(thing, "state_dict") else thing
    if isinstance(thing, torch.nn.Module):
        state = {_plain(name): value for name, value in state.items()}
    return _gather(state)


def restore(thing: Any, state: Any) -> None:
    """Put a saved state back into a tracked object, in place. Raises UserError when it does not fit."""
    try:
        _restore(thing, state)
    except (
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # torch says which shapes differ
        if isinstance(error, UserError):
            raise
        what = f"the checkpoint does not fit this {type(thing).__name__} ({' '.join(str(error).split())})"
        raise UserError(f"{what}; was the method's file changed?") from error


def _restore(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.nn.Module):
        own = thing.state_dict()
        actual = {_plain(name): name for name in own}
        unknown = sorted(set(state) ^ set(actual))
        if unknown:
            raise UserError(
                f"the checkpoint and the network disagree on '{unknown[0]}'; was the method's file changed?"
            )
        thing.load_state_dict({actual[name]: _scatter(value, own[actual[name]]) for name, value in state.items()})
    elif isinstance(thing, torch.optim.Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        slots = {
            index: {name: _scatter(value, parameters[index]) for name, value in slot.items()}
            for index, slot in state["state"].items()
        }
        thing.load_state_dict({**state, "state": slots})
    else:
        thing.load_state_dict(state)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new, never half."""
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


# ---------------------------------------------------------------------------------------------------------- encoding


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor], seen: dict[tuple, str]) -> Any:
    """Replace every array in the tree by its name in `tensors`; two names of one tensor (tied weights) share it."""
    while path in tensors:  # {"a.b": …} beside {"a": {"b": …}}, or 1 beside "1"
        path += "'"
    if isinstance(value, torch.Tensor):
        value = value.detach()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or key not in seen:
            seen[key] = path
            _store(value.cpu().contiguous(), path, tensors, seen)
        coded: dict[str, Any] = {"~tensor": seen[key]}
        dense = torch.empty_like(value, device="meta").stride() == value.stride()
        if dense and not value.is_contiguous():  # channels_last moments must come back channels_last
            coded["stride"] = list(value.stride())
        return coded
    if isinstance(value, np.ndarray):
        if not _is_number(value.dtype):
            raise TypeError(f"a checkpoint holds arrays of numbers; '{path}' is an array of {value.dtype}")
        _store(torch.from_numpy(np.require(value, requirements=["C", "W"])).reshape(value.shape), path, tensors, seen)
        return {"~array": path}
    if isinstance(value, np.generic) and _is_number(value.dtype):  # float32 arithmetic must stay float32 arithmetic
        return {"~scalar": [value.dtype.str, value.item()]}
    if isinstance(value, dict):
        inside = f"{path}." if path else ""
        items = [(name, _encode(item, f"{inside}{name}", tensors, seen)) for name, item in value.items()]
        if all(isinstance(name, str) and not name.startswith("~") for name in value):
            return dict(items)
        return {"~items": [[_encode(name, f"{path}.{name}", tensors, seen), item] for name, item in items]}
    if isinstance(value, (list, tuple)):
        parts = [_encode(item, f"{path}.{index}", tensors, seen) for index, item in enumerate(value)]
        return parts if isinstance(value, list) else {"~tuple": parts}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds arrays, numbers, text, lists and dicts; '{path}' is a {type(value).__name__}")


def _is_number(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _store(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor], seen: dict[tuple, str]) -> None:
    if value.dtype == torch.complex128:
        raise TypeError(f"a checkpoint holds real arrays; '{path}' is a tensor of {value.dtype}")
    home = ("storage", value.untyped_storage().data_ptr())
    tensors[path] = value.clone() if home in seen else value  # safetensors refuses views that overlap
    seen[home] = path


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "~tensor" in value:
        tensor = tensors[value["~tensor"]]
        if "stride" in value:
            return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
        return tensor
    if "~array" in value:
        return tensors[value["~array"]].numpy()
    if "~scalar" in value:
        kind, number = value["~scalar"]
        return np.dtype(kind).type(number)
    if "~tuple" in value:
        return tuple(_decode(item, tensors) for item in value["~tuple"])
    if "~items" in value:
        return {_decode(name, tensors): _decode(item, tensors) for name, item in value["~items"]}
    return {name: _decode(item, tensors) for name, item in value.items()}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _gather(value: Any) -> Any:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: _gather(item) for name, item in value.items()}
    return value


def _scatter(value: Any, like: torch.Tensor) -> Any:
    """Shard a whole tensor as `like` is sharded; anything else passes through."""
    if not hasattr(like, "device_mesh") or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- files


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    import safetensors
    import safetensors.torch

    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        number = _errno_in(str(error))
        raise OSError(number, os.strerror(number), str(path)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _errno_in(text: str) -> int:
    """The operating system's error number that safetensors quotes in its message (``os error 28``), or EIO."""
    import errno
    import re

    found = re.search(r"os error (\d+)", text)
    return int(found.group(1)) if found else errno.EIO


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a checkpoint folder, or a file that stands where one should."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems refuse to open or sync a folder; the rename is still atomic there
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
