"""`Recurrent` against torch's modules: the same weights, outputs, states and gradients. Brought into tests by `runpy.run_path`."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from etude.blocks.nn.recurrent import Recurrent

LENGTHS = torch.tensor([4, 6, 1, 3])


def pair(cell, kind, engine, layers, bidirectional, dropout=0.0, **rest):
    torch.manual_seed(1)
    theirs = kind(3, 5, layers, batch_first=True, bidirectional=bidirectional, dropout=dropout, **rest).double()
    torch.manual_seed(1)
    ours = Recurrent(cell, 3, 5, layers, bidirectional=bidirectional, dropout=dropout, engine=engine).double()
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b  # the names, the shapes and the first values are torch's
        assert torch.equal(p, q)
    return ours, theirs


def parity(cell, kind, engine, layers, bidirectional, packed, **rest):
    ours, theirs = pair(cell, kind, engine, layers, bidirectional, **rest)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    shape = (layers * (1 + bidirectional), 4, 5)
    state = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for _ in ours.zeros(4)]
    assert all(part.shape == shape and not part.any() for part in ours.zeros(4))
    given = tuple(state) if len(state) > 1 else state[0]
    if packed:
        out, last = theirs(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), given)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=6)
    else:
        out, last = theirs(x, given)
    last = last if isinstance(last, tuple) else (last,)
    mine, mine_last = ours(x, tuple(state), LENGTHS if packed else None)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    found = []
    for value, ends, module in ((out, last, theirs), (mine, mine_last, ours)):
        score = (value * weight).sum() + sum(((k + 2) * part.square()).sum() for k, part in enumerate(ends))
        found.append([value, *ends, *torch.autograd.grad(score, [x, *state, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def padding_is_not_read(cell, engine="auto"):
    """Other numbers behind a row's end change nothing, and each row gives what it gives alone, in both directions."""
    torch.manual_seed(0)
    net = Recurrent(cell, 3, 5, 2, bidirectional=True, engine=engine).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    out, last = net(x, None, LENGTHS)
    filled = torch.where(torch.arange(6)[:, None] < LENGTHS[:, None, None], x, 1e3)
    again, last_again = net(filled, None, LENGTHS)
    torch.testing.assert_close([again, *last_again], [out, *last], rtol=0, atol=0)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, ends = net(x[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], rtol=1e-12, atol=1e-12)
        assert not out[row, length:].any()
        for a, b in zip(last, ends):
            torch.testing.assert_close(a[:, row], b[:, 0], rtol=1e-12, atol=1e-12)


def dropout_stands_between_layers(cell, kind, engine, **rest):
    """The same random numbers as torch's module: of the lower layer's outputs, and only in training."""
    ours, theirs = pair(cell, kind, engine, 2, False, dropout=0.5, **rest)
    x = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2):
        found = []
        for module in (ours, theirs):
            torch.manual_seed(seed)
            found.append(module(x)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], ours(x)[0])


def machine_code_equals_the_loop(cell):
    """float32 against `scan` in float64: values, states and all gradients, of vectors and of tokens that a table stands for."""
    torch.manual_seed(0)
    slow = Recurrent(cell, 3, 21, 2, bidirectional=True, engine="loop").double()
    fast = Recurrent(cell, 3, 21, 2, bidirectional=True, engine="compiled")
    with torch.no_grad():
        for p in slow.parameters():
            p.mul_(3)  # gates that open and close
    fast.load_state_dict(slow.state_dict())
    x, table, tokens = torch.randn(4, 6, 3).double(), torch.randn(5, 3).double(), torch.randint(4, (4, 6))
    state = [torch.randn(4, 4, 21).double() for _ in slow.zeros(4)]
    weight = torch.randn(4, 6, 42).double()
    for by_table in (False, True):
        found = []
        for net, kind in ((slow, torch.float64), (fast, torch.float32)):
            leaves = [part.to(kind, copy=True).requires_grad_() for part in (table if by_table else x, *state)]
            given = (tokens, leaves[1:], None, leaves[0]) if by_table else (leaves[0], leaves[1:])
            out, ends = net(*given)
            score = (out * weight.to(kind)).sum() + sum(((k + 2) * part.square()).sum() for k, part in enumerate(ends))
            found.append([out, *ends, *torch.autograd.grad(score, [*leaves, *net.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b.double(), a, rtol=2e-5, atol=2e-5 * float(a.detach().abs().max()))
        if by_table:
            assert not found[1][len(ends) + 1][4].any()  # no token reads the last row


def what_does_not_fit_is_refused(cell):
    """Machine code and torch's kernels do not look where they read and write."""
    net, x = Recurrent(cell, 3, 5, 2), torch.randn(2, 6, 3)
    for shape in ((4, 4, 5), (4, 2, 4), (1, 2, 5), (2, 5)):
        for engine in ("auto", "loop", "compiled", "torch"):
            net.engine = engine
            with pytest.raises(ValueError, match="the state has a part of the shape"):
                net(x, tuple(torch.zeros(shape) for _ in net.zeros(2)))
    with pytest.raises(ValueError, match="argument 2 is"):
        net(x, (*net.zeros(2), torch.zeros(2, 2, 5)))
    with pytest.raises(ValueError, match=r"x has the shape \(6, 3\)"):
        net(x[0])
    for kind in (torch.uint8, torch.float32):
        with pytest.raises(ValueError, match="tokens of a table are int64"):
            net(torch.ones(2, 9, dtype=kind), table=torch.randn(7, 3))
    net.engine, tokens = "compiled", torch.ones(2, 9).long()
    out, _ = net(tokens, table=torch.randn(7, 3, requires_grad=True))
    tokens.fill_(2)  # as a loader does that uses one buffer again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def tokens_outside_a_table_are_refused(cell):
    """Machine code does not look where it reads."""
    net, table = Recurrent(cell, 3, 5, engine="compiled"), torch.randn(7, 3)
    for tokens in (torch.full((2, 9), 7), torch.full((2, 9), -1)):
        with pytest.raises(IndexError, match="and the table has 7 rows"):
            net(tokens, table=table)
    torch.testing.assert_close(net(torch.ones(2, 9).int(), table=table), net(table[torch.ones(2, 9).long()]))
    assert net(torch.zeros(0, 4, 3))[0].shape == (0, 4, 5)
    assert net(torch.zeros(0, 4).long(), table=table)[0].shape == (0, 4, 5)
    slope = torch.func.grad(lambda x: Recurrent(cell, 3, 5)(x)[0].sum())(torch.randn(2, 4, 3))  # by torch's kernels
    assert slope.shape == (2, 4, 3)


def second_derivatives_are_refused(cell, engine):
    """They would be wrong without a word; by the loop they are those of finite differences."""
    torch.manual_seed(0)
    for made, kind in ((engine, torch.float32), ("auto", torch.float32), ("loop", torch.float64)):
        net, x = Recurrent(cell, 3, 5, engine=made).to(kind), torch.randn(2, 4, 3, dtype=kind, requires_grad=True)
        if made == "loop":
            torch.autograd.gradgradcheck(lambda x, net=net: net(x)[0], x)
        else:
            with pytest.raises(RuntimeError, match="first derivatives only: take engine='loop' or 'torch'"):
                torch.autograd.grad(net(x)[0].sum(), x, create_graph=True)


def tables_and_engines(cell, compiled):
    """Tokens of a table are the vectors that it holds, for every engine; which of them `auto` takes for 32 and for 8 rows."""
    torch.manual_seed(0)
    for engine in ("loop", "torch", "auto"):
        net = Recurrent(cell, 3, 5, engine=engine).double()
        table, tokens = torch.randn(7, 3).double(), torch.randint(7, (2, 9))
        torch.testing.assert_close(net(tokens, table=table), net(table[tokens]), rtol=1e-12, atol=1e-12)
    net, table = Recurrent(cell, 3, 5), torch.randn(7, 3)
    chosen = [net._choose(torch.zeros(rows, 9), None, given) for given in (table, None) for rows in (32, 8)]
    assert chosen == compiled
    lengths = torch.full((32,), 9)
    assert net._choose(torch.zeros(32, 9), lengths, table) == net.eval().double()._choose(
        torch.zeros(32, 9), None, table
    )
    net.float()
    with torch.no_grad():
        assert net._choose(torch.zeros(32, 9), None, table) == "torch"
    net.engine = "compiled"
    assert net._choose(torch.zeros(32, 9), lengths, table) == "loop"
    net.engine = "auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert net._choose(torch.zeros(32, 9), None, table) == "torch"
    with torch.autocast("cpu"):
        assert net._choose(torch.zeros(32, 9), None, table) == "torch"


__all__ = [
    "dropout_stands_between_layers",
    "machine_code_equals_the_loop",
    "nn",
    "padding_is_not_read",
    "pair",
    "parity",
    "second_derivatives_are_refused",
    "tables_and_engines",
    "tokens_outside_a_table_are_refused",
    "what_does_not_fit_is_refused",
]
