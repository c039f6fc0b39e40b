"""Writing in machine code against loops over torch's cells. Brought into tests by `runpy.run_path`."""

import pytest
import torch
from torch import nn

from etude.blocks.nn.recurrent import Recurrent
from etude.blocks.tokens.decoding import pad_left
from etude.core.errors import UserError
from etude.sequence.parts import steps
from etude.sequence.parts.text import CharacterModel

KNOWN, EMBEDDING, WIDTH, ROWS = 11, 4, 9, 3  # nine inputs: eight at a time, and one


def model_of(cell, layers=2, kind=torch.float64):
    torch.manual_seed(3)
    model = CharacterModel(KNOWN, EMBEDDING, Recurrent(cell, EMBEDDING, WIDTH, layers)).to(kind).eval()
    for part in model.parameters():
        part.data.mul_(1 if cell == "rnn_relu" else 3)  # far into the curves; texts that do not soon end in a circle
        if part.shape == (3, WIDTH):
            part.data.normal_()
    return model


class Peephole(nn.Module):
    """Graves, 2013, equations 7 to 11, gate by gate."""

    def forward(self, x, state):
        h, c = state
        sums = [
            x @ w.t() + b + h @ u.t() + d
            for w, b, u, d in zip(
                *(part.chunk(4) for part in (self.weight_ih, self.bias_ih, self.weight_hh, self.bias_hh))
            )
        ]
        i, f = torch.sigmoid(sums[0] + self.peepholes[0] * c), torch.sigmoid(sums[1] + self.peepholes[1] * c)
        c = f * c + i * torch.tanh(sums[2])
        return torch.sigmoid(sums[3] + self.peepholes[2] * c) * torch.tanh(c), c


class Cho(nn.Module):
    """Cho et al., 2014, equations 5 to 8 with z of torch's sense: the reset gate stands before the matrix."""

    def forward(self, x, h):
        (wr, wz, wn), (br, bz, bn) = self.weight_ih.chunk(3), self.bias_ih.chunk(3)
        (ur, uz, un), (dr, dz, dn) = self.weight_hh.chunk(3), self.bias_hh.chunk(3)
        r, z = torch.sigmoid(x @ wr.t() + br + h @ ur.t() + dr), torch.sigmoid(x @ wz.t() + bz + h @ uz.t() + dz)
        return (1 - z) * torch.tanh(x @ wn.t() + bn + (r * h) @ un.t() + dn) + z * h


CELLS = {
    "rnn": lambda i: nn.RNNCell(i, WIDTH),
    "rnn_relu": lambda i: nn.RNNCell(i, WIDTH, nonlinearity="relu"),
    "lstm": lambda i: nn.LSTMCell(i, WIDTH),
    "gru": lambda i: nn.GRUCell(i, WIDTH),
    "lstm_peephole": lambda i: Peephole(),
    "gru_cho": lambda i: Cho(),
}


def stepper(model, cell):
    """(tokens (B,), states) → logits (B, V), states, by one cell a layer."""
    cells = []
    for layer in range(model.recurrent.num_layers):
        single = CELLS[cell](EMBEDDING if layer == 0 else WIDTH).to(model.readout.weight.dtype)
        for name, value in model.recurrent.named_parameters():
            if name.endswith(f"_l{layer}"):
                single.register_parameter(name.removesuffix(f"_l{layer}"), nn.Parameter(value.detach().clone()))
        cells.append(single)

    @torch.no_grad()
    def step(tokens, states):
        x, new = model.embedding(tokens), []
        for single, state in zip(cells, states, strict=True):
            new.append(single(x, state))
            x = new[-1][0] if isinstance(new[-1], tuple) else new[-1]
        return model.readout(x), new

    return step


def nothing(model, cell, rows):
    zeros = model.embedding.weight.new_zeros(rows, WIDTH)
    return [(zeros, zeros) if cell.startswith("lstm") else zeros] * model.recurrent.num_layers


def by_cells(model, cell, prompt, count, choose):
    """prompt (P,) and `count` characters, chosen from logits (1, V)."""
    step, said, states = stepper(model, cell), prompt.tolist(), nothing(model, cell, 1)
    for token in said[:-1]:
        _, states = step(torch.tensor([token]), states)
    for _ in range(count):
        logits, states = step(torch.tensor(said[-1:]), states)
        said.append(int(choose(logits)))
    return torch.tensor(said)


def step_equals_cells(cell, layers, run, kind=torch.float64, gap=1e-12):
    """Logits and states after each of 20 given characters a row, from a state that is not 0; `run` is `steps.loop` or None."""
    model, draw = model_of(cell, layers, kind), torch.Generator().manual_seed(1)
    peer = stepper(model, cell)
    parts = [torch.randn(layers, ROWS, WIDTH, generator=draw, dtype=kind) for _ in model.recurrent.zeros(1)]
    states = [tuple(p[layer] for p in parts) if len(parts) > 1 else parts[0][layer] for layer in range(layers)]
    mine, by = [part.clone().numpy() for part in parts], steps.laid_out(model)
    sizes = (by.across.shape[2], by.across.shape[2], WIDTH, KNOWN)
    room = steps.Room(*(mine[0].repeat(20).reshape(-1)[: ROWS * size].reshape(ROWS, size).copy() for size in sizes))
    noise = torch.ones(1, ROWS, KNOWN).numpy()
    for _ in range(20):
        tokens = torch.randint(KNOWN, (2, ROWS), generator=draw)
        logits, states = peer(tokens[0], states)
        given = (by, mine[0], mine[-1], room, tokens.numpy())
        (run or steps._compiled())(steps._CELLS[cell], kind == torch.float64, steps.GIVEN, 1.0, noise, *given)
        torch.testing.assert_close(torch.from_numpy(room.logits), logits, rtol=gap, atol=gap)
        for layer, state in enumerate(states):
            for a, b in zip(mine, state if isinstance(state, tuple) else (state,), strict=True):
                torch.testing.assert_close(torch.from_numpy(a[layer]), b, rtol=gap, atol=gap)


def texts_equal_cells(cell, monkeypatch, count=150):
    """Prompts of all lengths side by side, greedy and drawn: each row as its prompt alone, by cells and torch's multinomial."""
    monkeypatch.setattr(steps, "FEW", 1)
    model = model_of(cell)
    prompts = [torch.tensor(ids) for ids in ([1, 2, 3, 4, 5], [6], [7, 8, 9])]
    ids, pads = pad_left(prompts)

    def rows(made):
        return [row[pad:] for row, pad in zip(made, pads.tolist())]

    told = rows(steps.generate(model, ids, count, pads=pads, greedy=True))
    for row, prompt in zip(told, prompts, strict=True):
        assert torch.equal(row, by_cells(model, cell, prompt, count, lambda logits: logits.argmax()))
    assert len({tuple(row[-count:].tolist()) for row in told}) > 1
    for rules in ({"temperature": 0.7}, {"temperature": 0.9, "top_k": 4}):

        def dice():
            return [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]

        whole = steps.generate(model, ids, count, pads=pads, generator=dice(), **rules)
        streamed = torch.stack(list(steps.stream(model, ids, count, pads=pads, generator=dice(), **rules)), 1)
        assert torch.equal(streamed, whole[:, ids.shape[1] :])
        for row, prompt, one in zip(rows(whole), prompts, dice(), strict=True):

            def drawn(logits, one=one, rules=rules):
                p = (logits[0].float() / rules["temperature"]).softmax(-1)
                if "top_k" in rules:
                    p = torch.where(p >= p.sort(descending=True)[0][3], p, 0.0)
                    p = p / p.sum()
                return torch.multinomial(p, 1, generator=one)

            assert torch.equal(row, by_cells(model, cell, prompt, count, drawn))


def weights_are_those_of_now(cell, monkeypatch):
    """A changed model writes what it says now; pieces of any size give one text; what cannot be computed so is torch's."""
    monkeypatch.setattr(steps, "FEW", 1)
    model, prompt = model_of(cell), torch.tensor([[1, 2], [3, 4]])

    def told(**rules):
        return steps.generate(model, prompt, 40, generator=torch.Generator().manual_seed(2), **rules)

    before = told()
    monkeypatch.setattr(steps, "AT_ONCE", 3 * 2 * KNOWN)
    assert torch.equal(told(), before)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "FEW", 1000)
        assert torch.equal(told(), before)  # torch's own, from one generator for both rows
    for part in model.parameters():
        part.data.mul_(-0.7)
    after = told()
    assert not torch.equal(after, before)
    monkeypatch.setattr(steps, "FEW", 1000)
    assert torch.equal(told(), after)
    monkeypatch.setattr(steps, "FEW", 1)
    assert steps.fits(model, 1)
    assert not steps.fits(model, steps.ROWS + 1)
    assert not steps.fits(model.half(), 1)
    model.double().dropout.p = 0.5
    assert steps.fits(model, 1)
    assert not steps.fits(model.train(), 1)
    model.eval().readout.bias.data[2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        told(greedy=True)
