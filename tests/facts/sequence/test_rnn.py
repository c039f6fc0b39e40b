"""The plain recurrent network: torch's numbers, back-propagation through time by hand, one matrix for all times."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from etude.blocks.nn.recurrent import Recurrent
from etude.core.errors import UserError
from etude.sequence.parts import steps
from etude.sequence.parts.text import Tracks

cells = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_cells.py")))
text = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_text.py")))
writing = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_writing.py")))


@pytest.mark.parametrize("engine", ["loop", "written", "torch"])
@pytest.mark.parametrize(("layers", "both", "packed"), [(1, False, False), (2, True, False), (2, True, True)])
@pytest.mark.parametrize("bent", ["tanh", "relu"])
def test_it_equals_torch(engine, layers, both, packed, bent):
    cells.parity("rnn" if bent == "tanh" else "rnn_relu", nn.RNN, engine, layers, both, packed, nonlinearity=bent)


@pytest.mark.parametrize("engine", ["loop", "torch"])
def test_padding_is_not_read(engine):
    cells.padding_is_not_read("rnn", engine)


def test_second_derivatives_are_refused():
    cells.second_derivatives_are_refused("rnn", "written")


def test_dropout_stands_between_layers():
    cells.dropout_stands_between_layers("rnn", nn.RNN, "written")


def test_back_propagation_through_time_adds_up_the_steps_of_one_matrix():
    """E49, E50: with U a separate leaf at each t, the gradient of the one U is the sum of theirs; δ_t as in the equation."""
    torch.manual_seed(0)
    net = Recurrent("rnn", 2, 3, engine="written").double()
    x, v = torch.randn(1, 4, 2).double(), torch.randn(4, 3).double()
    (net(x)[0][0] * v).sum().backward()
    w, u, b, c = (p.detach() for p in net.parameters())
    copies = [u.clone().requires_grad_() for _ in range(4)]
    h, hs = torch.zeros(3).double(), []
    for t in range(4):
        h = torch.tanh(w @ x[0, t] + b + copies[t] @ h + c)
        hs.append(h)
    sum((h * v[t]).sum() for t, h in enumerate(hs)).backward()
    found = net.weight_hh_l0.grad
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, sum(copy.grad for copy in copies[1:]), rtol=1e-12, atol=1e-14)
    delta, total = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for t in (3, 2, 1, 0):
        delta = (1 - hs[t].detach() ** 2) * (v[t] + u.t() @ delta)
        if t:
            total += torch.outer(delta, hs[t - 1].detach())
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-14)


def test_a_gradient_ends_where_the_chunk_begins():
    """Truncation after k steps: over T ≤ k steps it is the whole gradient, over more it is not."""
    torch.manual_seed(0)
    net = Recurrent("rnn", 2, 3).double()
    x = torch.randn(1, 6, 2).double()

    def gradient(cut: int) -> torch.Tensor:
        net.zero_grad()
        _, state = net(x[:, :cut]) if cut else (None, None)
        state = None if state is None else tuple(part.detach() for part in state)
        net(x[:, cut:], state)[0][:, -1].sum().backward()
        return net.weight_hh_l0.grad.clone()

    whole = gradient(0)
    assert not torch.allclose(whole, gradient(3), rtol=0.01)
    short = x[:, 3:]
    net.zero_grad()
    net(short)[0][:, -1].sum().backward()
    alone = net.weight_hh_l0.grad.clone()
    assert not torch.allclose(alone, gradient(3))  # the state is carried, only its gradient is not


def test_rows_are_read_from_left_to_right():
    ids, offsets = torch.arange(101), {0: 0, 1: 3}
    tracks = Tracks(ids, slice(0, 4), 4, 5, offsets.__getitem__)
    assert tracks.chunks == 4  # 25 a row; the last offset, 4, still leaves 4 chunks and a target
    for step in range(8):
        x, y, fresh = tracks(step)
        begin = offsets[step // 4] + step % 4 * 5
        assert torch.equal(x, torch.arange(0, 100, 25)[:, None] + begin + torch.arange(5))
        assert torch.equal(y, x + 1)
        assert fresh == (step % 4 == 0)
    second = Tracks(ids, slice(2, 4), 4, 5, offsets.__getitem__)  # another rank's rows
    assert torch.equal(second(1)[0], tracks(1)[0][2:])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("plain", {}, {}),
        ("layers", {"layers": 2, "dropout": 0.4, "engine": "loop"}, {}),
        ("relu", {"activation": "relu", "carry": False, "clip_norm": 100.0}, {"nonlinearity": "relu"}),
    ],
)
def test_loop_equals_a_plain_one(name, settings, theirs, tmp_path):
    result = text.run("rnn", tmp_path, **settings)
    text.replay("rnn", nn.RNN, result, theirs, **settings)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    text.reported("rnn", tmp_path)


def test_prompts_are_continued_as_each_alone(tmp_path):
    text.written("rnn", tmp_path, layers=2)


@pytest.mark.usefixtures("_float64")
def test_engines_give_one_run(tmp_path):
    losses = [
        [row["loss"] for row in text.rows(text.run("rnn", tmp_path / engine, engine=engine))]
        for engine in ("loop", "written", "torch", "auto")
    ]
    assert all(one == pytest.approx(losses[0], rel=1e-10) for one in losses)


def test_short_texts_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="3 rows of it have 10 tokens each, and chunks of 7"):
        text.run("rnn", tmp_path, "abcdefghijklm " * 2 + "abcdefg")
    with pytest.raises(UserError, match="too short: a text to learn has 11 characters"):
        text.run("rnn", tmp_path, "abc")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_in_machine_code_is_that_of_the_cells(cell, layers):
    writing.step_equals_cells(cell, layers, steps.loop)
    writing.step_equals_cells(cell, layers, None)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu"])
def test_texts_in_machine_code_are_those_of_the_cells(cell, monkeypatch):
    writing.texts_equal_cells(cell, monkeypatch)


def test_machine_code_reads_the_weights_as_they_are(monkeypatch):
    writing.weights_are_those_of_now("rnn", monkeypatch)


def test_a_character_falls_with_its_probability():
    """20,000 draws from seven logits, each share within four standard deviations of the softmax."""
    logits, draws = np.linspace(-2, 1.5, 7, dtype=np.float32), 20_000
    noise = np.random.default_rng(0).exponential(size=(draws, 7)).astype(np.float32)
    found = np.bincount([steps.choose(logits, row, 0.8, steps.DRAWN) for row in noise], minlength=7) / draws
    p = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    assert (np.abs(found - p) < 4 * np.sqrt(p * (1 - p) / draws)).all()
    assert steps.choose(logits, noise[0], 0.8, steps.GREEDY) == 6


def test_the_quick_tanh_is_right_to_float32():
    x = np.concatenate([np.linspace(-20, 20, 4001), np.geomspace(1e-20, 1, 500), [0.0, -0.0]]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    steps.bend_quickly(bent := x.copy())
    assert (np.abs(bent - exact) <= 3 * np.spacing(np.abs(exact).astype(np.float32))).all()
    with np.errstate(invalid="ignore"):
        steps.bend_quickly(lost := np.array([np.nan], np.float32))
    assert np.isnan(lost).all()
