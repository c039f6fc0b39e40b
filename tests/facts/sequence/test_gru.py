"""The GRU: torch's numbers, both places of the reset gate written out, and what the update gate keeps."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from etude.blocks.nn.recurrent import Recurrent
from etude.sequence.parts import steps

cells = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_cells.py")))
text = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_text.py")))
writing = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_writing.py")))


@pytest.mark.parametrize("engine", ["loop", "written", "torch"])
@pytest.mark.parametrize(("layers", "both", "packed"), [(1, False, False), (2, True, False), (2, True, True)])
def test_it_equals_torch(engine, layers, both, packed):
    cells.parity("gru", nn.GRU, engine, layers, both, packed)


def test_padding_is_not_read():
    for cell, engine in (("gru", "loop"), ("gru", "torch"), ("gru_cho", "auto")):
        cells.padding_is_not_read(cell, engine)


def test_machine_code_equals_the_loop():
    cells.machine_code_equals_the_loop("gru")


def test_second_derivatives_are_refused():
    cells.second_derivatives_are_refused("gru", "compiled")


def test_what_does_not_fit_is_refused():
    cells.what_does_not_fit_is_refused("gru")


def test_tokens_outside_a_table_are_refused():
    cells.tokens_outside_a_table_are_refused("gru")


def test_tables_and_engines():
    cells.tables_and_engines("gru", ["compiled"] * 4)


def test_dropout_stands_between_layers():
    cells.dropout_stands_between_layers("gru", nn.GRU, "written")


def plain(net, x, before):
    """The equation for one row, gate by gate; the reset gate before or after the matrix."""
    w, u, b, c = (p.detach() for p in list(net.parameters())[:4])
    (wr, wz, wn), (ur, uz, un), h, told = (w @ x[0].t()).t().split(5, 1), u.split(5), torch.zeros(5).double(), []
    (br, bz, bn), (cr, cz, cn) = b.split(5), c.split(5)
    for t in range(x.shape[1]):
        r, z = torch.sigmoid(wr[t] + br + ur @ h + cr), torch.sigmoid(wz[t] + bz + uz @ h + cz)
        n = torch.tanh(wn[t] + bn + (un @ (r * h) + cn if before else r * (un @ h + cn)))
        h = (1 - z) * n + z * h
        told.append(h)
    return torch.stack(told)


@pytest.mark.parametrize("cell", ["gru", "gru_cho"])
def test_the_equation_is_that_of_its_paper(cell):
    torch.manual_seed(0)
    net = Recurrent(cell, 3, 5).double()
    for p in net.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 6, 3).double()
    torch.testing.assert_close(net(x)[0][0], plain(net, x, cell == "gru_cho"), rtol=1e-12, atol=1e-12)
    assert (net(x)[0][0] - plain(net, x, cell == "gru")).abs().max() > 0.05


def test_one_gate_keeps_and_lets_in():
    """E53: z → 1 keeps h as it is and lets nothing in; an LSTM's output gate could not do that to its state."""
    net = Recurrent("gru", 3, 5).double()
    with torch.no_grad():
        net.bias_ih_l0[5:10] = 1e3
    h = torch.randn(1, 2, 5).double()
    torch.testing.assert_close(net(torch.randn(2, 6, 3).double(), (h,))[1][0], h, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        net.bias_ih_l0[5:10] = -1e3  # z → 0: h is the candidate, whatever it was
        net.bias_ih_l0[:5] = -1e3  # r → 0: which the past does not reach
    x = torch.randn(2, 1, 3).double()
    one, two = (net(x, (state,))[0] for state in (h, -3 * h))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("settings", [{}, {"layers": 2, "dropout": 0.4}, {"carry": False, "clip_norm": 100.0}])
def test_loop_equals_a_plain_one(settings, tmp_path):
    result = text.run("gru", tmp_path, **settings)
    text.replay("gru", nn.GRU, result, **settings)


def test_loop_with_the_reset_gate_before_the_matrix(tmp_path):
    first, second = (text.run("gru", tmp_path / reset, reset=reset) for reset in ("after", "before"))
    one, two = ([row["loss"] for row in text.rows(result)] for result in (first, second))
    assert one != pytest.approx(two, rel=1e-6)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    text.reported("gru", tmp_path)


@pytest.mark.parametrize("reset", ["after", "before"])
def test_prompts_are_continued_as_each_alone(reset, tmp_path):
    text.written("gru", tmp_path, reset=reset)


@pytest.mark.parametrize("cell", ["gru", "gru_cho"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_in_machine_code_is_that_of_the_cells(cell, layers):
    writing.step_equals_cells(cell, layers, steps.loop)
    writing.step_equals_cells(cell, layers, None)


@pytest.mark.parametrize("cell", ["gru", "gru_cho"])
def test_texts_in_machine_code_are_those_of_the_cells(cell, monkeypatch):
    writing.texts_equal_cells(cell, monkeypatch)


def test_machine_code_reads_the_weights_as_they_are(monkeypatch):
    writing.weights_are_those_of_now("gru", monkeypatch)
