"""Recurrent networks: one scan over time, for any cell, both directions, several layers and rows of different lengths.

Papers: Elman, "Finding Structure in Time", 1990; Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber,
Cummins, 2000 (forget gate) and Gers and Schmidhuber, 2000 (peepholes); Cho et al., 2014, arXiv:1406.1078 (GRU); Schuster and
Paliwal, 1997 (two directions). Weights have the names, shapes and first values of `torch.nn.RNN`, `LSTM` and `GRU`.

Equation:
    rnn            h' = tanh(Wx + b + Uh + c)          (rnn_relu: max(0, ·))
    lstm           i, f, o = σ(…), g = tanh(…), each of Wx + b + Uh + c;  c' = f⊙c + i⊙g,  h' = o⊙tanh(c')
    lstm_peephole  as lstm, and i, f also see p⊙c, o sees p⊙c'
    gru            r, z = σ(…), n = tanh(Wx + b + r⊙(Uh + c));  h' = (1 − z)⊙n + z⊙h
    gru_cho        as gru, but n = tanh(Wx + b + U(r⊙h) + c): the reset gate acts before the matrix

Legend: B rows, T time, I inputs, D width, G gates times D, L layers, S states of a cell (2 for the lstm, else 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.recurrent_compiled import COMPILED, Compiled, first_derivatives_only

__all__ = ["CELLS", "Cell", "Engine", "Recurrent", "Weights", "scan"]

Cell = Literal["rnn", "rnn_relu", "lstm", "lstm_peephole", "gru", "gru_cho"]
Engine = Literal["auto", "loop", "written", "compiled", "torch"]
State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """What a cell uses at each step, the same at every t: U (G, D), its bias (G,), and the peepholes (3, D)."""

    matrix: Tensor
    bias: Tensor
    peepholes: Tensor | None = None


def rnn(given: Tensor, state: State, by: Weights) -> State:
    return (torch.tanh(given + F.linear(state[0], by.matrix, by.bias)),)


def rnn_relu(given: Tensor, state: State, by: Weights) -> State:
    return (torch.relu(given + F.linear(state[0], by.matrix, by.bias)),)


def lstm(given: Tensor, state: State, by: Weights) -> State:
    h, c = state
    i, f, g, o = (given + F.linear(h, by.matrix, by.bias)).chunk(4, -1)
    if by.peepholes is not None:
        i, f = i + by.peepholes[0] * c, f + by.peepholes[1] * c
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if by.peepholes is not None:
        o = o + by.peepholes[2] * c
    return o.sigmoid() * c.tanh(), c


def gru(given: Tensor, state: State, by: Weights) -> State:
    h = state[0]
    (r, z, n), (ur, uz, un) = given.chunk(3, -1), F.linear(h, by.matrix, by.bias).chunk(3, -1)
    r, z = (r + ur).sigmoid(), (z + uz).sigmoid()
    n = (n + r * un).tanh()
    return (n + z * (h - n),)


def gru_cho(given: Tensor, state: State, by: Weights) -> State:
    h, width = state[0], state[0].shape[-1]
    r, z, n = given.chunk(3, -1)
    ur, uz = F.linear(h, by.matrix[: 2 * width], by.bias[: 2 * width]).chunk(2, -1)
    r, z = (r + ur).sigmoid(), (z + uz).sigmoid()
    n = (n + F.linear(r * h, by.matrix[2 * width :], by.bias[2 * width :])).tanh()
    return (n + z * (h - n),)


CELLS: dict[str, Callable[[Tensor, State, Weights], State]] = {
    "rnn": rnn,
    "rnn_relu": rnn_relu,
    "lstm": lstm,
    "lstm_peephole": lstm,
    "gru": gru,
    "gru_cho": gru_cho,
}
"""The step of each cell: (Wx + b (B, G), state, weights) → the next state, whose first part is h (B, D)."""

_MODES = {"rnn": "RNN_TANH", "rnn_relu": "RNN_RELU", "lstm": "LSTM", "gru": "GRU"}


def scan(
    cell: str, given: Tensor, state: State, by: Weights, lengths: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, State]:
    """One layer in one direction: Wx + b of all times (T, B, G) and a state of S × (B, D) → h (T, B, D) and the last state.

    With `lengths` (B,) a row stands still outside its own length: its outputs there are 0, its last state is the one at its
    own end, and in `reverse` it begins there.
    """
    step, outputs = CELLS[cell], [given.new_empty(0)] * len(given)
    for t in reversed(range(len(given))) if reverse else range(len(given)):
        new = step(given[t], state, by)
        if lengths is None:
            state, outputs[t] = new, new[0]
        else:
            alive = (t < lengths)[:, None]
            state = tuple(torch.where(alive, a, b) for a, b in zip(new, state))
            outputs[t] = torch.where(alive, new[0], 0.0)
    return torch.stack(outputs), state


class _Written(torch.autograd.Function):
    """`scan` of rnn, rnn_relu, lstm and gru with its gradient written out: back-propagation through time.

    What reaches h_t is the sum of what the readout at t and step t + 1 send back; slopes are computed for all t at once, the
    loop over time does only what must wait, and the matrix's gradient is one product over all times.
    """

    @staticmethod
    def forward(ctx: Any, cell: str, given: Tensor, matrix: Tensor, bias: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        time, batch, width = len(given), given.shape[1], matrix.shape[1]
        hs = given.new_empty(time + 1, batch, width)
        hs[0] = state[0]
        across = matrix.t()
        extra: list[Tensor] = []
        if cell in ("rnn", "rnn_relu"):
            shifted, gates = given + bias, hs[1:]
            for t in range(time):
                torch.addmm(shifted[t], hs[t], across, out=hs[t + 1])
                hs[t + 1].tanh_() if cell == "rnn" else hs[t + 1].relu_()
        elif cell == "lstm":
            gates, cs, tanhs = given + bias, torch.empty_like(hs), torch.empty_like(hs[1:])
            cs[0] = state[1]
            for t in range(time):
                gate = gates[t].addmm_(hs[t], across)
                i, f, g, o = gate.chunk(4, -1)
                gate[:, : 2 * width].sigmoid_()
                g.tanh_()
                o.sigmoid_()
                torch.mul(f, cs[t], out=cs[t + 1]).addcmul_(i, g)
                torch.mul(o, torch.tanh(cs[t + 1], out=tanhs[t]), out=hs[t + 1])
            extra += [cs, tanhs]
        else:
            gates, us = given.clone(), torch.empty_like(given)
            for t in range(time):
                u = torch.addmm(bias, hs[t], across, out=us[t])
                rz, n = gates[t, :, : 2 * width], gates[t, :, 2 * width :]
                rz.add_(u[:, : 2 * width]).sigmoid_()
                n.addcmul_(rz[:, :width], u[:, 2 * width :]).tanh_()
                torch.lerp(n, hs[t], rz[:, width:], out=hs[t + 1])
            extra += [us]
        ctx.cell = cell
        ctx.save_for_backward(matrix, hs, gates, *extra)
        return (hs[1:], hs[-1].clone(), extra[0][-1].clone()) if cell == "lstm" else (hs[1:], hs[-1].clone())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        first_derivatives_only()
        matrix, hs, gates, *extra = ctx.saved_tensors
        width, outward = matrix.shape[1], upstream[0]
        behind, cell = upstream[1], ctx.cell  # what step t + 1 sends back to h_t
        time, last = len(gates), ()
        if cell in ("rnn", "rnn_relu"):
            deltas = 1 - gates.square() if cell == "rnn" else (gates > 0).to(gates.dtype)
            for t in reversed(range(time)):
                behind = deltas[t].mul_(outward[t] + behind) @ matrix
            through = deltas
        elif cell == "lstm":
            (cs, tanhs), along = extra, upstream[2]
            i, f, g, o = gates.chunk(4, -1)
            deltas = gates * (1 - gates)
            deltas[..., 2 * width : 3 * width] = 1 - g.square()
            for part, factor in zip(deltas.chunk(4, -1), (g, cs[:-1], i, tanhs)):
                part.mul_(factor)
            inward = o * (1 - tanhs.square())  # ∂h/∂c
            for t in reversed(range(time)):
                dh = outward[t] + behind
                dc = torch.addcmul(along, dh, inward[t])
                deltas[t].view(-1, 4, width)[:, :3].mul_(dc[:, None])
                deltas[t][:, 3 * width :].mul_(dh)
                behind, along = deltas[t] @ matrix, dc * f[t]
            through, last = deltas, (along,)
        else:
            r, z, n = gates.chunk(3, -1)
            deltas, reset = gates * (1 - gates), torch.empty_like(hs[1:])
            deltas[..., :width].mul_(extra[0][..., 2 * width :])
            deltas[..., width : 2 * width].mul_(hs[:-1] - n)
            deltas[..., 2 * width :] = (1 - z) * (1 - n.square())
            for t in reversed(range(time)):
                dh, delta = outward[t] + behind, deltas[t]
                dn = delta[:, 2 * width :].mul_(dh)
                delta[:, :width].mul_(dn)
                delta[:, width : 2 * width].mul_(dh)
                torch.mul(dn, r[t], out=reset[t])
                behind = torch.addmm(dh.mul_(z[t]), delta[:, : 2 * width], matrix[: 2 * width])
                behind.addmm_(reset[t], matrix[2 * width :])
            through = torch.cat([deltas[..., : 2 * width], reset], -1)
        flat = through.flatten(0, 1)
        return None, deltas, flat.t() @ hs[:-1].flatten(0, 1), flat.sum(0), behind, *last


class Recurrent(nn.RNNBase):
    """x (B, T, I) → h of the last layer (B, T, D) (2D in two directions) and the last state, S × (L·directions, B, D).

    Args:
        cell: see the equations on top.
        inputs, width, layers: I, D, L. A layer reads the outputs of the one below it.
        bidirectional: each layer reads its input forwards and, independently, backwards, and lays both side by side.
        dropout: of the outputs of every layer but the last.
        engine: "loop" is `scan`, differentiated by autograd; "written" the same with its gradient written out (not for
            peepholes, Cho's form and `lengths`); "compiled" that in machine code (lstm and gru, float32 on a CPU); "torch" the
            kernels of torch.nn; "auto" the fastest of them that fits. Second derivatives (create_graph) are had by "loop".
    """

    def __init__(
        self,
        cell: Cell,
        inputs: int,
        width: int,
        layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        engine: Engine = "auto",
    ) -> None:
        if cell not in get_args(Cell):
            raise ValueError(f"no cell {cell!r}; there are {', '.join(get_args(Cell))}")
        dropout = dropout if layers > 1 else 0.0
        mode = _MODES[cell.split("_p")[0].split("_c")[0]]
        super().__init__(
            mode, inputs, width, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
        )  # torch names and draws the weights
        self.cell, self.width, self.engine = cell, width, engine
        if cell == "lstm_peephole":
            for name in self._names():
                self.register_parameter(f"peepholes{name}", nn.Parameter(torch.zeros(3, width)))

    def zeros(self, batch: int) -> State:
        """The state that knows nothing yet."""
        first = self._parts("_l0")[0]
        shape = (self.num_layers * (1 + self.bidirectional), batch, self.width)
        return tuple(first.new_zeros(shape) for _ in range(2 if self.cell.startswith("lstm") else 1))

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What the network says of x, from `state` on.

        Args:
            lengths: (B,) int64 on the CPU, from 1 to T: what stands behind a row's end is not read, and 0 is returned there.
            table: (V, I); x (B, T) int64 are then rows of it, and where they are more than V, each row meets W only once.

        Raises:
            ValueError: a state or tokens that do not fit; torch's kernels would read foreign memory.
        """
        state = self._fitting(x, state, table)
        engine = self._choose(x, lengths, table)
        if table is not None and (engine == "torch" or x.numel() < len(table)):
            x, table = F.embedding(x, table), None
        if engine == "torch":
            return self._torch(x, state, lengths)
        x, ends = x.transpose(0, 1), None if lengths is None else lengths.to(x.device)
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            source, at = (x, None) if table is None or layer else (table, x)
            outputs = []
            for direction in range(1 + self.bidirectional):
                matrix, bias = self._parts(f"_l{layer}{'_reverse' * direction}")
                by, begun = self._weights(layer, direction), tuple(part[len(finals)] for part in state)
                if engine == "compiled":
                    merged = self.cell == "lstm"  # its two biases are added
                    given, rows = F.linear(source, matrix, bias + by.bias if merged else bias), at
                    if direction:
                        given, rows = (given.flip(0), None) if rows is None else (given, rows.flip(0))
                    own = None if merged else by.bias
                    out, *last = Compiled.apply(self.cell, given.flatten(0, -2), rows, by.matrix, own, *begun)  # type: ignore[misc]
                    out = out.flip(0) if direction else out
                else:
                    given = F.linear(source, matrix, bias)
                    given = given if at is None else F.embedding(at, given)
                    if engine == "written":
                        given = given.flip(0) if direction else given
                        out, *last = _Written.apply(self.cell, given, by.matrix, by.bias, *begun)  # type: ignore[misc]
                        out = out.flip(0) if direction else out
                    else:
                        out, last = scan(self.cell, given, begun, by, ends, bool(direction))
                outputs.append(out)
                finals.append(tuple(last))
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1), tuple(torch.stack(parts) for parts in zip(*finals))

    def _fitting(self, x: Tensor, state: State | None, table: Tensor | None) -> State:
        """`state`, or the empty one, where x, it and the table have the shapes and kinds that they must have."""
        if table is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens of a table are int64, not {x.dtype}")
        if x.dim() != (3 if table is None else 2):
            raise ValueError(f"x has the shape {tuple(x.shape)}: (B, T, I) is read, or tokens (B, T) with a table")
        empty = self.zeros(len(x))
        if state is None:
            return empty
        for part, like in zip(state, empty, strict=True):
            if part.shape != like.shape:
                raise ValueError(
                    f"the state has a part of the shape {tuple(part.shape)}, and {tuple(like.shape)} is needed"
                )
        return tuple(state)

    def _choose(self, x: Tensor, lengths: Tensor | None, table: Tensor | None) -> str:
        if self.cell not in _MODES:
            return "loop"
        plain = x.device.type == "cpu" and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
        plain = plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        plain = x.device.type == "cpu" and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
        plain = plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        compiles = self.cell in COMPILED and plain and self.weight_hh_l0.dtype == torch.float32
        if self.engine == "compiled":
            return "compiled" if compiles and lengths is None else "loop"
        if self.engine != "auto":
            fits = self.engine != "written" or (lengths is None and not torch.is_autocast_enabled(x.device.type))
            return self.engine if fits else "loop"
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if not learns or not plain or lengths is not None:
            return "torch"
        if self.cell in ("rnn", "rnn_relu"):  # for which torch has no kernel there, only a loop
            return "written"
        wide = len(x) >= 32 and self.width <= 4 * len(x) and table is not None and x.numel() >= len(table)
        return "compiled" if compiles and (self.cell == "gru" or wide) else "torch"  # else torch's lstm is faster

    def _torch(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        kernel = {"rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "lstm": torch.lstm, "gru": torch.gru}[self.cell]
        begun: Any = state if self.cell == "lstm" else state[0]
        rules = (True, self.num_layers, float(self.dropout), self.training, bool(self.bidirectional))
        if lengths is None:
            out, *last = kernel(x, begun, self._flat_weights, *rules, True)  # type: ignore[call-overload]
            return out, tuple(last)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        begun = tuple(part.index_select(1, order) for part in state)  # type: ignore[arg-type]
        begun = begun if self.cell == "lstm" else begun[0]
        flat, *last = kernel(packed.data, packed.batch_sizes, begun, self._flat_weights, *rules)  # type: ignore[call-overload]
        whole = nn.utils.rnn.PackedSequence(flat, packed.batch_sizes, order, back)
        out, _ = nn.utils.rnn.pad_packed_sequence(whole, batch_first=True, total_length=x.shape[1])
        return out, tuple(part.index_select(1, back) for part in last)  # type: ignore[arg-type]

    def _names(self) -> list[str]:
        return [f"_l{layer}{'_reverse' * d}" for layer in range(self.num_layers) for d in range(1 + self.bidirectional)]

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"weight_ih{name}"), getattr(self, f"bias_ih{name}")

    def _weights(self, layer: int, direction: int) -> Weights:
        name = f"_l{layer}{'_reverse' * direction}"
        return Weights(
            getattr(self, f"weight_hh{name}"), getattr(self, f"bias_hh{name}"), getattr(self, f"peepholes{name}", None)
        )
