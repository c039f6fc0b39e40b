"""The LSTM: torch's numbers, the equation written out, peepholes, and what the forget gate keeps."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from etude.blocks.nn.recurrent import Recurrent
from etude.core.spec import Spec
from etude.sequence.lstm import Config, build
from etude.sequence.parts import steps

cells = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_cells.py")))
text = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_text.py")))
writing = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_writing.py")))


@pytest.mark.parametrize("engine", ["loop", "written", "torch"])
@pytest.mark.parametrize(("layers", "both", "packed"), [(1, False, False), (2, True, False), (2, True, True)])
def test_it_equals_torch(engine, layers, both, packed):
    cells.parity("lstm", nn.LSTM, engine, layers, both, packed)


def test_padding_is_not_read():
    for cell, engine in (("lstm", "loop"), ("lstm", "torch"), ("lstm_peephole", "auto")):
        cells.padding_is_not_read(cell, engine)


def test_dropout_stands_between_layers():
    cells.dropout_stands_between_layers("lstm", nn.LSTM, "written")


def plain(net, x, tanh=True):
    """The equation for one row, gate by gate: h of every time, and (f, c) beside it."""
    w, u, b, c = (p.detach() for p in list(net.parameters())[:4])
    p = getattr(net, "peepholes_l0", torch.zeros(3, 5).double()).detach()
    h, cell, told, inner = torch.zeros(5).double(), torch.zeros(5).double(), [], []
    for at in x[0]:
        i, f, g, o = (w @ at + b + u @ h + c).view(4, 5)
        i, f = torch.sigmoid(i + p[0] * cell), torch.sigmoid(f + p[1] * cell)
        cell = f * cell + i * torch.tanh(g)
        h = torch.sigmoid(o + p[2] * cell) * (torch.tanh(cell) if tanh else cell)
        told.append(h)
        inner.append((f, cell))
    return torch.stack(told), inner


@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole"])
def test_the_equation_has_a_tanh_behind_the_cell(cell):
    """E52: h = o⊙tanh(c); without the tanh, as the notes print it, it is another network."""
    torch.manual_seed(0)
    net = Recurrent(cell, 3, 5).double()
    for p in net.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 6, 3).double()
    torch.testing.assert_close(net(x)[0][0], plain(net, x)[0], rtol=1e-12, atol=1e-12)
    assert (net(x)[0][0] - plain(net, x, tanh=False)[0]).abs().max() > 0.05


def test_the_cell_forgets_by_the_product_of_its_gates():
    """∂c_T/∂c_0 = Π f where h sends nothing back (U = 0)."""
    torch.manual_seed(0)
    net = Recurrent("lstm", 3, 5, engine="written").double()
    nn.init.zeros_(net.weight_hh_l0)
    x, c = torch.randn(1, 7, 3).double(), torch.zeros(1, 1, 5).double().requires_grad_()
    _, (_, last) = net(x, (torch.zeros(1, 1, 5).double(), c))
    last.sum().backward()
    product = torch.stack([f for f, _ in plain(net, x)[1]]).prod(0)
    torch.testing.assert_close(c.grad[0, 0], product, rtol=1e-12, atol=1e-12)


def test_forget_bias_is_added_to_that_gate_alone():
    made = []
    for bias in (0.0, 1.5):
        torch.manual_seed(0)
        config = Config(layers=2, width=4, embedding=3, forget_bias=bias)
        made.append(build(config, Spec(extra={"vocabulary": 5}))["model"].state_dict())
    for name, before in made[0].items():
        added = torch.zeros_like(before)
        if "bias_hh" in name:
            added[4:8] = 1.5
        torch.testing.assert_close(made[1][name], before + added)


def test_machine_code_equals_the_loop():
    cells.machine_code_equals_the_loop("lstm")


def test_what_does_not_fit_is_refused():
    cells.what_does_not_fit_is_refused("lstm")


def test_tokens_outside_a_table_are_refused():
    cells.tokens_outside_a_table_are_refused("lstm")


def test_tables_and_engines():
    cells.tables_and_engines("lstm", ["compiled", "torch", "torch", "torch"])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("settings", [{}, {"layers": 2, "dropout": 0.4}, {"carry": False, "clip_norm": 100.0}])
def test_loop_equals_a_plain_one(settings, tmp_path):
    result = text.run("lstm", tmp_path, **settings)
    text.replay("lstm", nn.LSTM, result, **settings)


def test_loop_with_peepholes_moves_them(tmp_path):
    """They begin at 0 and are learned; with them the run is another one."""
    first, second = (text.run("lstm", tmp_path / str(p), peephole=p) for p in (False, True))
    one, two = ([row["loss"] for row in text.rows(result)] for result in (first, second))
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    assert one[-1] != pytest.approx(two[-1], rel=1e-6)


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    text.reported("lstm", tmp_path)


@pytest.mark.parametrize("peephole", [False, True])
def test_prompts_are_continued_as_each_alone(peephole, tmp_path):
    text.written("lstm", tmp_path, peephole=peephole)


@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_in_machine_code_is_that_of_the_cells(cell, layers):
    writing.step_equals_cells(cell, layers, steps.loop)
    writing.step_equals_cells(cell, layers, None)
    writing.step_equals_cells(cell, layers, None, torch.float32, 1e-4)


@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole"])
def test_texts_in_machine_code_are_those_of_the_cells(cell, monkeypatch):
    writing.texts_equal_cells(cell, monkeypatch)


def test_machine_code_reads_the_weights_as_they_are(monkeypatch):
    writing.weights_are_those_of_now("lstm", monkeypatch)
