"""Checkpoints give back exactly what they were given, in place; and say where a value of a wrong type stands."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from etude.core import checkpoint
from etude.core.checkpoint import Box, load, restore, save, state_of
from etude.core.errors import UserError
from etude.optim import Adam, flatten


def there_and_back(folder: Path, state: dict) -> dict:
    save(folder, 1, state)
    step, found, complaints = load(folder)
    assert (step, complaints) == (1, [])
    return found


def same(one: object, other: object) -> bool:
    """Equal in type, dtype, strides, value (NaN equals NaN) and structure."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return (
            one.dtype == other.dtype
            and one.stride() == other.stride()
            and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        )
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


TENSORS = [
    torch.arange(6, dtype=kind).reshape(2, 3)
    for kind in (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
]
ARRAYS = [
    np.arange(6, dtype=kind).reshape(2, 3)
    for kind in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
]


@pytest.mark.parametrize(
    "value",
    [
        *TENSORS,
        *ARRAYS,
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.empty(0),
        torch.empty(0, 3, dtype=torch.int64),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4).t(),
        np.array(2.5),
        np.zeros((0, 2)),
        np.arange(12).reshape(3, 4)[::-1, ::2].copy(),
        np.array([True, False]),
        [np.float32(0.1), np.float64(0.1), np.float16(0.5), np.int32(-7), np.uint64(2**64 - 1), np.bool_(True)],
        {
            "n": None,
            "t": True,
            "i": 2**70,
            "f": 1e-320,
            "inf": math.inf,
            "nan": math.nan,
            "s": "ü\n\"'",
            "e": {},
            "l": [],
            "u": (),
        },
        {(1, "a"): 1, 3: 2, "3": 4, None: 0, 2.5: 6, True: 7},
        {3: torch.zeros(2), "3": torch.ones(2)},
        {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}, "~tensor": "a", "~items": [1]},
        {np.int64(5): (1, (2, [3]))},
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_every_value_comes_back_as_it_was(tmp_path, value) -> None:
    assert same(there_and_back(tmp_path, {"x": value})["x"], value)


def test_views_come_back_with_their_values(tmp_path) -> None:
    base, array = torch.arange(10.0), np.arange(10.0)
    array.flags.writeable = False
    state = {
        "whole": base, "part": base[2:5], "strided": base[::3], "wide": torch.ones(1).expand(4),
        "array": array, "again": array, "half": array[::2], "back": array[::-1],
    }  # fmt: skip
    found = there_and_back(tmp_path, state)
    for name, value in state.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(value)), name


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        ({"a": [1, {"b": {1, 2}}]}, "x.a.1.b", "set"),
        ({"a": (0, object())}, "x.a.1", "object"),
        (lambda: 0, "x", "function"),
        ({"a": np.array(["text"])}, "x.a", "array of <U4"),
        ({"a": np.array([object()])}, "x.a", "array of object"),
        ({"a": np.zeros(2, ">f8")}, "x.a", "array of >f8"),
        ({"a": np.zeros(2, np.complex64)}, "x.a", "array of complex64"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "x.a", "tensor of torch.complex128"),
        ({"a": b"bytes"}, "x.a", "bytes"),
        ({"a": 1j}, "x.a", "complex"),
        ({b"k": 1}, "x.b'k'", "bytes"),
    ],
)
def test_a_wrong_type_names_the_place(tmp_path, value, place, kind) -> None:
    save(tmp_path, 1, {"x": 1})
    with pytest.raises(TypeError) as caught:
        save(tmp_path, 2, {"x": value})
    assert f"'{place}' is a" in str(caught.value)
    assert kind in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    path = save(tmp_path, 1, {"model": state_of(model)})
    assert (path / "tensors.safetensors").stat().st_size < 1.5 * 50 * 8 * 4
    other = Tied()
    restore(other, load(tmp_path)[1]["model"])
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def convolution() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("flat", [False, True])
def test_optimizer_moments_resume_bit_for_bit(tmp_path, flat) -> None:
    """channels_last moments keep their strides; parameters that are views of one vector stay views of it."""

    def make() -> tuple[nn.Module, torch.Tensor, torch.optim.Optimizer]:
        model, x = convolution()
        return model, x, Adam([flatten(model)] if flat else model.parameters(), lr=1e-2)

    def advance(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    one = make()
    advance(*one, 3)
    save(tmp_path, 3, {"model": state_of(one[0]), "optimizer": state_of(one[2])})
    two = make()
    _, state, _ = load(tmp_path)
    restore(two[0], state["model"])
    restore(two[2], state["optimizer"])
    assert same(two[2].state_dict(), one[2].state_dict())
    for model in (one, two):
        advance(*model, 3)
    assert all(
        torch.equal(a, b) and a.stride() == b.stride()
        for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True)
    )
    if flat:
        vector = two[2].param_groups[0]["params"][0]
        assert {p.untyped_storage().data_ptr() for p in two[0].parameters()} == {vector.untyped_storage().data_ptr()}


def test_compiled_modules_save_plain_names_and_exchange_checkpoints(tmp_path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    plain, compiled = make(0), torch.compile(make(1), backend="eager")
    x = torch.randn(5, 3)
    compiled(x)
    assert list(state_of(compiled)) == list(plain.state_dict())
    assert "_orig_mod." in next(iter(compiled.state_dict()))
    save(tmp_path / "compiled", 1, {"model": state_of(compiled)})
    restore(plain, load(tmp_path / "compiled")[1]["model"])
    assert torch.equal(plain(x), compiled(x))
    inner = make(2)
    inner[0] = torch.compile(inner[0], backend="eager")
    save(tmp_path / "plain", 1, {"model": state_of(make(3))})
    for thing in (compiled, inner):
        restore(thing, load(tmp_path / "plain")[1]["model"])
        assert torch.equal(thing(x), make(3)(x))


def test_a_box_is_restored_in_place() -> None:
    array, tensor = np.zeros(3), torch.zeros(2)
    view = array[1:]
    box = Box(array=array, tensor=tensor, best=0.0, grown=np.zeros(2))
    box.load_state_dict(
        {"array": np.arange(3.0), "tensor": torch.ones(2), "best": 2.5, "grown": np.ones(4), "new": [1]}
    )
    assert box.array is array
    assert view.tolist() == [1, 2]
    assert box.tensor is tensor
    assert tensor.tolist() == [1, 1]
    assert (box.best, box.grown.shape, box.new) == (2.5, (4,), [1])
    with pytest.raises(AttributeError, match="this Box holds array, tensor, best, grown, new, not 'bset'"):
        _ = box.bset
    longer = Box(
        rows=np.full((2, 5), np.nan), steps=torch.zeros(4), other=np.zeros((3, 3))
    )  # a run that is made longer
    longer.load_state_dict({"rows": np.ones((2, 3)), "steps": torch.ones(2), "other": np.ones((2, 2))})
    assert np.isnan(longer.rows[:, 3:]).all()
    assert (longer.rows[:, :3] == 1).all()
    assert longer.steps.tolist() == [1, 1, 0, 0]
    assert longer.other.shape == (2, 2)
    parameter = nn.Parameter(torch.zeros(2))
    Box(p=parameter).load_state_dict({"p": torch.ones(2)})
    assert parameter.tolist() == [1, 1]


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="disagree on 'extra'"):
        restore(nn.Linear(2, 2), {**nn.Linear(2, 2).state_dict(), "extra": torch.ones(1)})
    with pytest.raises(
        UserError, match=r"does not fit this Linear .*size mismatch.*was the method's file changed"
    ) as caught:
        restore(nn.Linear(2, 2), nn.Linear(3, 2).state_dict())
    assert "\n" not in str(caught.value)
    two, one = (Adam(nn.Linear(2, 2, bias=bias).parameters(), lr=0.1) for bias in (True, False))
    with pytest.raises(UserError, match="does not fit this Adam"):
        restore(two, one.state_dict())


def test_keeps_the_newest_and_what_a_damaged_one_needs(tmp_path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, {"step": step})
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000000020", "step-000000030"]
    (tmp_path / "step-000000030" / "state.json").write_text("{}")
    step, state, (complaint,) = load(tmp_path)
    assert (step, state) == (20, {"step": 20})
    assert complaint == f"checkpoint {tmp_path}/step-000000030 is damaged (its checksum does not match)"
    (tmp_path / ".part-step-000000024").mkdir()
    save(tmp_path, 25, {"step": 25})  # the run goes on from 20; the damaged one must not push 20 out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000025"]
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(tmp_path / "none")


@pytest.mark.parametrize("fails", ["_write_tensors", "_write", "_sync_folder", "_fingerprint"])
def test_a_refusing_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch, fails) -> None:
    save(tmp_path, 10, {"step": 10})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, fails, refuse)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 20, {"step": 20, "x": torch.ones(3)})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert load(tmp_path)[1] == {"step": 10}


def test_write_text_replaces_in_one_step(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_text(path, "new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]
