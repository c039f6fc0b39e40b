"""Recorded episodes: nothing crosses a reset, a file comes back as it went, and every damaged one is answered."""

import contextlib
import io
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from torch import nn

from etude.blocks.acting.recording import Recording, joined, load, policy_of, record, written
from etude.blocks.acting.worlds import Transition, Worlds
from etude.core.errors import UserError


class Counters:
    """World w counts 100 w, 100 w + 1, … and ends after w + 2 steps; its one array is reused for every observation."""

    def __init__(self, count):
        self.t = np.zeros(count, int)
        self.observation = np.zeros((count, 1), np.float32)
        self._fill()

    def _fill(self):
        self.observation[:, 0] = 100 * np.arange(len(self.t)) + self.t

    def step(self, action):
        before = self.observation.copy()
        self.t += 1
        over = self.t == np.arange(len(self.t)) + 2
        self.t[over] = 0  # the next episode begins at once
        self._fill()
        cut = over & (np.arange(len(self.t)) % 2 == 0)
        return Transition(
            before, action, np.ones(len(before), np.float32), before, over & ~cut, cut, np.arange(len(before))
        )


def test_one_whole_episode_of_each_world_and_no_more():
    done = record(Counters(3), lambda seen: seen[:, 0].astype(np.int64) % 7, 50)
    assert done.observations[:, 0].tolist() == [0, 1, 100, 101, 102, 200, 201, 202, 203]
    assert done.actions.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 0]
    assert done.starts.tolist() == [True, False, True, False, False, True, False, False, False]
    assert done.returns.tolist() == [2, 3, 4]
    assert done.first.tolist() == [0, 2, 5]
    assert done.ends.tolist() == [2, 2, 5, 5, 5, 9, 9, 9, 9]
    assert done.longest == 4
    assert record(Counters(3), lambda seen: np.zeros(3, np.int64), 3).returns.tolist() == [2, 3, 3]


def test_rows_spent_on_a_reset_are_not_recorded():
    worlds = Worlds.make("CartPole-v1", 6, 3, "test")  # whose step after the end only resets
    done = record(worlds, lambda seen: np.ones(len(seen), np.int64), 500)
    assert len(done.first) == 6
    assert (done.rewards == 1).all()
    assert np.allclose(done.observations[done.first], Worlds.make("CartPole-v1", 6, 3, "test").observation)
    gaps = np.abs(np.diff(done.observations[:, 0]))[~done.starts[1:]]
    assert gaps.max() < 0.1  # a cart does not jump inside an episode


def test_parts_of_a_recording():
    done = record(Counters(3), lambda seen: seen[:, 0].astype(np.int64), 50)
    assert done.head(3).observations[:, 0].tolist() == [0, 1, 100]
    assert done.head(100).actions.tolist() == done.actions.tolist()
    some = done.episodes(np.array([2, 0]))
    assert some.observations[:, 0].tolist() == [200, 201, 202, 203, 0, 1]
    assert some.returns.tolist() == [4, 2]
    assert joined([some, done]).returns.tolist() == [4, 2, 2, 3, 4]


def small(**changes):
    arrays = {
        "observations": np.arange(8.0).reshape(4, 2),
        "actions": np.array([0, 1, 1, 0]),
        "starts": np.array([1, 0, 1, 0]),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def put(path, **changes):
    np.savez(path, **small(**changes))
    return path


def test_a_file_comes_back_as_it_went(tmp_path):
    done = record(Counters(2), lambda seen: np.stack([seen[:, 0], -seen[:, 0]], 1).astype(np.float32), 9)
    said = written(done, tmp_path / "a.npz")
    assert "2 episodes, 5 steps, returns 2 to 3, mean 2.5" in said
    back = load(tmp_path / "a.npz")
    for name in ("observations", "actions", "starts", "rewards"):
        got, want = getattr(back, name), getattr(done, name)
        assert got.dtype == want.dtype
        assert (got == want).all()


def test_plain_arrays_of_other_types_are_taken(tmp_path):
    found = load(
        put(tmp_path / "a.npz", observations=np.zeros((4, 3, 2), np.uint8), actions=np.zeros((4, 1), np.uint8))
    )
    assert found.observations.shape == (4, 6)
    assert (found.observations.dtype, found.actions.dtype, found.starts.dtype) == (np.float32, np.int64, bool)
    assert found.actions.shape == (4,)
    assert found.rewards.tolist() == [0] * 4
    assert load(put(tmp_path / "b.npz", actions=np.asfortranarray(np.ones((4, 3))))).actions.shape == (4, 3)
    assert load(put(tmp_path / "c.npz", actions=np.ones(4, ">f4"))).actions.tolist() == [[1]] * 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"starts": None}, "has no array 'starts'.*observations, actions and starts"),
        ({"actions": np.array([0, 1, 1])}, "one row for each.*actions \\(3,\\)"),
        ({"actions": np.float64(1)}, "one row for each"),
        (
            {n: np.zeros((0, *([2] if n == "observations" else []))) for n in ("observations", "actions", "starts")},
            "at least one step",
        ),
        ({"actions": np.array([0, -1, 1, 0])}, "between -1 and 1; discrete actions count from 0"),
        ({"actions": np.zeros((4, 2), int)}, "discrete actions must be"),
        ({"actions": np.zeros((4, 2, 2))}, "actions has the shape"),
        ({"observations": np.zeros((4, 0))}, "at least one number"),
        (
            {"observations": np.array([[0.0, 1], [np.nan, 0], [0, 0], [0, 0]])},
            "observations holds a number that is not finite",
        ),
        ({"observations": np.full((4, 1), 1e300)}, "not finite in single precision"),
        ({"actions": np.array([0, np.inf, 0, 0])}, "actions holds a number that is not finite"),
        ({"rewards": np.array([0, np.nan, 0, 0])}, "rewards holds a number"),
        ({"rewards": np.zeros((4, 1))}, "rewards has the shape"),
        ({"starts": np.array([0, 0, 1, 0])}, "starts is false for the first step"),
        ({"starts": np.array([1, 2, 0, 0])}, "starts holds 2"),
        ({"observations": np.array(["a", "b", "c", "d"])}, "observations has the type <U1"),
        ({"observations": np.zeros(4, complex)}, "it must hold plain numbers"),
        ({"observations": np.array([1, None, 2, 3])}, "observations has the type object"),
    ],
)
def test_what_is_no_recording_is_answered(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load(put(tmp_path / "a.npz", **changes))


def test_nothing_pickled_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    put(tmp_path / "a.npz", observations=np.array([Trap()] * 4, dtype=object))
    with pytest.raises(UserError, match="plain numbers"):
        load(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


def npz(path, header, data, declared=None):
    """A file whose observations are `data` behind this header."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in small(observations=None).items():
            held = io.BytesIO()
            npy.write_array(held, array)
            archive.writestr(f"{name}.npy", held.getvalue())
        held = io.BytesIO()
        npy.write_array_header_1_0(held, header)
        archive.writestr("observations.npy", held.getvalue() + data)


def test_damaged_files_are_answered(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    whole = put(path).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or no .npz file"):
            load(path)
    dice = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(whole)
        for place in dice.integers(0, len(whole), 3):
            bad[place] = dice.integers(256)
        path.write_bytes(bytes(bad))
        with contextlib.suppress(UserError):  # anything else is a failure
            load(path)
    npz(path, {"descr": "<f8", "fortran_order": False, "shape": (4, 10**12)}, b"\0" * 64)
    with pytest.raises(UserError, match="says 32,000,000,000,000 bytes"):
        load(path)
    npz(path, {"descr": "<f8", "fortran_order": False, "shape": (4, 2**20)}, b"\0" * (4 * 2**23))
    monkeypatch.setattr("etude.blocks.acting.recording.LARGEST", 2**20)
    with pytest.raises(UserError, match="at most 1,048,576 are read"):
        load(path)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.npz")
    with pytest.raises(UserError, match="cannot be read|not a plain file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="not a plain file"):
        load(tmp_path / "pipe.npz")


def test_the_policy_of_a_run_is_its_best_action():
    def loaded(method=None, **modules):
        return SimpleNamespace(
            method=method, modules=modules, spec=SimpleNamespace(extra={"env": "X"}), folder="f", name="n"
        )

    seen = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]], np.float32)
    assert policy_of(loaded(model=nn.Identity()))(seen).tolist() == [1, 0]

    class Actor(nn.Module):
        def best(self, state):
            return state[:, :2] * 2

    assert policy_of(loaded(critic=nn.Identity(), policy=Actor()))(seen).tolist() == [[0, 6], [4, 0]]
    own = SimpleNamespace(policy=lambda run: lambda state: state[:, 0])
    assert policy_of(loaded(own, model=nn.Identity()))(seen).tolist() == [0, 2]
    with pytest.raises(UserError, match="acts in no world"):
        policy_of(loaded(other=nn.Identity()))
    nothing = loaded(model=nn.Identity())
    nothing.spec.extra = {}
    with pytest.raises(UserError, match="acts in no world"):
        policy_of(nothing)
    assert torch.is_grad_enabled()
    assert isinstance(Recording(seen, seen, np.ones(2, bool), np.zeros(2)), Recording)
