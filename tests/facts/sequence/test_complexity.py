"""Counts against torch's FlopCounterMode and brute force, layers against torch's, paths against the gradients of whole stacks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import etude
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.sequence import complexity as of
from etude.sequence.complexity import KINDS, Config
from etude.sequence.parts import nulls

ODD = Config(width=6, kernel=3, window=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "config"), [(9, ODD), (16, Config(width=4, kernel=4, window=3))])
def test_products_are_half_of_torchs_flops(kind, n, config):
    """torch counts a multiplication and an addition; with numbers or without content the count is the same."""
    x, by = torch.randn(n, config.width), of.weights(config, "cpu")
    with FlopCounterMode(display=False) as theirs:
        of.layer_of(kind, config)(x, by)
    with of.Products() as ours:
        of.layer_of(kind, config)(x, by)
    assert ours.by.total() * 2 == theirs.get_total_flops()
    assert of.measured(kind, n, config)[0] == ours.by.total() == of.closed(kind, n, config)[0]


def test_products_by_hand():
    """(2, 3) by (3, 5) is 30, also with a bias; two of them at once 60; a kernel of 3 over 4 places, 2 to 5 channels, 120."""
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    for run, expected in (
        (lambda: a @ b, 30),
        (lambda: torch.addmm(torch.ones(5), a, b), 30),
        (lambda: torch.bmm(a.expand(2, 2, 3), b.expand(2, 3, 5)), 60),
        (lambda: torch.baddbmm(torch.ones(2, 2, 5), a.expand(2, 2, 3), b.expand(2, 3, 5)), 60),
        (lambda: F.conv1d(torch.ones(1, 2, 6), torch.ones(5, 2, 3)), 120),
        (lambda: a * 2 + a.softmax(1), 0),
    ):
        with of.Products() as counter:
            run()
        assert counter.by.total() == expected


def test_layers_are_torchs():
    by, x = of.weights(ODD, "cpu", torch.float64), torch.randn(9, 6, dtype=torch.float64)
    q, k, v = (x @ by[name] for name in "qkv")
    assert torch.allclose(of.attention(x, by), F.scaled_dot_product_attention(q[None], k[None], v[None])[0] @ by["o"])
    place = torch.arange(9)
    near = (place[:, None] - place).abs() <= 2
    banded = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=near)[0] @ by["o"]
    assert torch.allclose(of.restricted(x, by, 5), banded)
    for kind, module, names in (("recurrence", nn.RNN, ("w", "u")), ("gated", nn.LSTM, ("w4", "u4"))):
        theirs = module(6, 6, bias=False).double()
        matrices = [by[name].t() for name in names]
        if kind == "gated":  # torch has the gates in the order i, f, g, o
            matrices = [torch.cat([m[:12], m[18:], m[12:18]]) for m in matrices]
        theirs.load_state_dict(dict(zip(("weight_ih_l0", "weight_hh_l0"), matrices)))
        assert torch.allclose(of.layer_of(kind, ODD)(x, by), theirs(x)[0])
    for apart in (1, 3):
        expected = torch.zeros(9, 6, dtype=torch.float64)
        for t in range(9):
            for j in range(3):
                if (s := t - (2 - j) * apart) >= 0:
                    expected[t] += by["kernel"][:, :, j] @ x[s]
        assert torch.allclose(of.convolution(x, by, apart), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_and_paths_have_their_closed_forms(kind):
    for config in (ODD, Config(width=3, kernel=2, window=3), Config(width=2, kernel=5, window=7)):
        for n in (8, 11, 20):
            products, rounds, path = of.closed(kind, n, config)
            assert of.measured(kind, n, config) == (products, rounds)
            assert of.path(kind, n, config) == path


def test_chain_counts_what_waits():
    a, b = (torch.ones(3, 3, requires_grad=True) for _ in range(2))
    assert of.chain((a @ b) + (b @ a)) == 1
    assert of.chain((a @ b).tanh() @ (b @ a)) == 2
    x = a
    for _ in range(2000):  # deeper than a recursion could go
        x = (x @ b).tanh()
    assert of.chain(x) == 2000


@pytest.mark.parametrize("kind", ["attention", "restricted", "convolution", "dilated"])
@pytest.mark.parametrize("n", [8, 13])
def test_a_stack_of_that_many_layers_is_the_first_that_gets_through(kind, n):
    """∂y_n/∂x_1 of the whole stack is exactly 0 with one layer fewer, and is not with as many as the path has."""
    by, count = of.weights(ODD, "cpu", torch.float64), of.path(kind, n, ODD)
    for layers in (count - 1, count):
        x = torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
        h = x
        for layer in range(layers):
            h = of.convolution(h, by, 3**layer) if kind == "dilated" else of.layer_of(kind, ODD)(h, by)
        first = torch.autograd.grad(h[-1].square().sum(), x)[0][0]
        assert bool((first != 0).any()) == (layers == count)


@pytest.mark.parametrize("n", [3, 8])
def test_a_recurrence_passes_its_state_on_n_minus_1_times(n):
    """Along the graph from the last output to the first input: one tanh more than there are steps between them."""
    x = torch.randn(n, 6, dtype=torch.float64)
    rows = [row.clone().requires_grad_() for row in x.split(1)]
    out = of.recurrence(torch.cat(rows), of.weights(ODD, "cpu", torch.float64))[-1]

    def shortest(node):
        """tanh's on the way to the first row, over the state alone."""
        count = 0
        while node is not None:
            count += node.name() == "TanhBackward0"
            behind = [one for one, _ in node.next_functions if one is not None]
            behind = [
                one for one in behind if one.name() in ("MmBackward0", "AddBackward0", "TanhBackward0", "CatBackward0")
            ]
            node = behind[-1] if node.name() in ("CatBackward0", "AddBackward0") else behind[0] if behind else None
        return count

    assert shortest(out.grad_fn) == n == of.path("recurrence", n, ODD) + 1


@pytest.mark.parametrize("width", [4, 7])
def test_crossings_are_the_least_lengths(width):
    """E67: 2n²d has caught up with the recurrence at d, the projections at 2d, the LSTM at 4d, the rest of a layer at 6d."""
    found, d = of.crossings(Config(width=width)), width
    rest = {"recurrence": 2, "projections": 4, "gated": 8, "layer": 12}
    for name, factor in rest.items():
        n = next(n for n in range(1, 1000) if 2 * n * n * d >= factor * n * d * d)
        assert found[name] == n / d
    assert found == {"recurrence": 1.0, "projections": 2.0, "gated": 4.0, "layer": 6.0}


def run(folder, longest=16, **settings):
    return etude.run(
        "sequence/complexity", preset="tiny", out=folder / "run", threads=1, quiet=True, longest=longest, **settings
    )


def test_loop_fills_the_table(tmp_path):
    """Every entry and every logged number, by torch's counter and the closed forms; paths only as far as they are followed."""
    result = run(tmp_path, width=5, kernel=4, window=7, longest=40, traced=16)
    entries = checkpoint.load(result.folder / "checkpoints")[1]["table"]["entries"]
    config = Config(width=5, kernel=4, window=7)
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert entries.shape == (6, 3, 3)
    for column, n in enumerate((8, 16, 32)):
        for row, kind in enumerate(KINDS):
            with FlopCounterMode(display=False) as theirs:
                of.layer_of(kind, config)(torch.ones(n, 5), of.weights(config, "cpu"))
            _, rounds, path = of.closed(kind, n, config)
            expected = (theirs.get_total_flops() // 2, rounds, path if n <= 16 else -1)
            assert tuple(entries[row, column].tolist()) == expected
            assert logged[column][f"products_{kind}"] == expected[0]


def test_reported_numbers(tmp_path, monkeypatch):
    """No wrong entry; with a fault in the layers as many as differ; n²d alone fits no length but the one it is fitted to."""
    result = run(tmp_path)
    assert result.metrics == {
        "wrong_entries": 0.0, "table_1_wrong_entries": 1.0, "crossing_recurrence": 1.0, "crossing_projections": 2.0,
        "crossing_gated": 4.0, "crossing_layer": 6.0,
    }  # fmt: skip
    monkeypatch.setattr(of, "dilation", nulls.undilated)
    assert run(tmp_path / "b").metrics["wrong_entries"] == 2.0  # the paths at 8 and 16
    monkeypatch.setattr(of, "windows", nulls.wider_windows)
    assert (
        run(tmp_path / "c").metrics["wrong_entries"] == 2.0 + 2.0 + 1.0
    )  # both counts, and the path at 16: 3 becomes 2


def test_what_is_said_of_the_table(tmp_path):
    entries = np.arange(36).reshape(6, 2, 3)
    entries[:, 1, 2] = -1
    told = of.listed(entries, [8, 16]).splitlines()
    assert len(told) == 13
    assert told[1].split() == ["self-attention", "8", "0", "1", "2"]
    assert told[2].split() == ["self-attention", "16", "3", "4"]
    with pytest.raises(UserError, match="--window is 4; it must be odd"):
        run(tmp_path, window=4)
