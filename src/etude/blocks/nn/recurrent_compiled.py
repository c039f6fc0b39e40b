"""lstm and gru over time for float32 tensors on a CPU: products by torch, the rest in machine code, gradients written out.

The equations are those of `recurrent`; σ(x) = ½ + ½ tanh(x/2). Back-propagation through time sends back from step t

    lstm  dc = dc' + dh⊙o⊙(1 − tanh²c);  δ_i, δ_f, δ_g = dc⊙(g, c_{t−1}, i)⊙slope,  δ_o = dh⊙tanh(c)⊙slope;
          dh_{t−1} = δU,  dc_{t−1} = dc⊙f
    gru   δ_n = dh⊙(1 − z)⊙(1 − n²),  δ_z = dh⊙(h_{t−1} − n)⊙z(1 − z),  δ_r = δ_n⊙(Uh + c)_n⊙r(1 − r);
          dh_{t−1} = dh⊙z + (δ_r, δ_z, r⊙δ_n)U

and the gradient of U is one product over all times. A compiled step costs a few microseconds where tensors take ten dispatches.
What a step reads of Wx + b are rows of a matrix (N, G): those of its own time, or, for tokens, those of the kinds that it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.blocks.nn.tanh import bend

__all__ = ["COMPILED", "Compiled", "first_derivatives_only"]

COMPILED = ("lstm", "gru")


def _gates(row, scaled):
    """σ of the first `scaled` numbers of a row, in place."""
    for d in range(scaled):
        row[d] *= np.float32(0.5)
    bend(row[:scaled])
    for d in range(scaled):
        row[d] = np.float32(0.5) * row[d] + np.float32(0.5)


def lstm_forward(given, at, gates, c, new, tanh, h):
    """Uh in `gates` (B, 4D) and rows `at` (B,) of Wx + b + c become i, f, g, o; new cell (B, D), its tanh, h are written."""
    batch, width = c.shape
    for b in range(batch):
        row, own, bent = gates[b], given[at[b]], tanh[b]
        for d in range(4 * width):
            row[d] += own[d]
        _gates(row, 2 * width)
        bend(row[2 * width : 3 * width])
        _gates(row[3 * width :], width)
        for d in range(width):
            new[b, d] = row[width + d] * c[b, d] + row[d] * row[2 * width + d]
            bent[d] = new[b, d]
        bend(bent)
        for d in range(width):
            h[b, d] = row[3 * width + d] * bent[d]


def lstm_backward(gates, c, tanh, outward, dh, dc, delta):
    """From dh, dc (B, D), which step t + 1 sends back, to `delta` (B, 4D) and, in place, the dc that t sends back."""
    one, (batch, width) = np.float32(1), c.shape
    for b in range(batch):
        row, up, t = gates[b], delta[b], tanh[b]
        for d in range(width):
            i, f, g, o = row[d], row[width + d], row[2 * width + d], row[3 * width + d]
            whole = outward[b, d] + dh[b, d]
            along = dc[b, d] + whole * o * (one - t[d] * t[d])
            up[d] = along * g * i * (one - i)
            up[width + d] = along * c[b, d] * f * (one - f)
            up[2 * width + d] = along * i * (one - g * g)
            up[3 * width + d] = whole * t[d] * o * (one - o)
            dc[b, d] = along * f


def gru_forward(given, at, u, h, gates, new):
    """From rows `at` (B,) of Wx + b and Uh + c in `u` (B, 3D): r, z, n, written to `gates`, and the next h (B, D)."""
    batch, width = h.shape
    for b in range(batch):
        row, own, back = gates[b], given[at[b]], u[b]
        for d in range(2 * width):
            row[d] = own[d] + back[d]
        _gates(row, 2 * width)
        for d in range(2 * width, 3 * width):
            row[d] = own[d] + row[d - 2 * width] * back[d]
        bend(row[2 * width :])
        for d in range(width):
            n = row[2 * width + d]
            new[b, d] = n + row[width + d] * (h[b, d] - n)


def gru_backward(gates, u, h, outward, dh, delta, through):
    """From dh (B, D), which step t + 1 sends back, to what reaches Wx + b and Uh + c (B, 3D); dh becomes dh⊙z."""
    one, (batch, width) = np.float32(1), h.shape
    for b in range(batch):
        row, own, up, back = gates[b], u[b], delta[b], through[b]
        for d in range(width):
            r, z, n = row[d], row[width + d], row[2 * width + d]
            whole = outward[b, d] + dh[b, d]
            dn = whole * (one - z) * (one - n * n)
            up[d] = dn * own[2 * width + d] * r * (one - r)
            up[width + d] = whole * (h[b, d] - n) * z * (one - z)
            up[2 * width + d] = dn
            back[d], back[width + d], back[2 * width + d] = up[d], up[width + d], dn * r
            dh[b, d] = whole * z


def first_derivatives_only() -> None:
    """A gradient that is itself to be differentiated (create_graph) would lack what its saved tensors depend on."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this engine of Recurrent gives first derivatives only: take engine='loop' or 'torch' for create_graph=True"
        )


class Compiled(torch.autograd.Function):
    """`recurrent.scan` of lstm or gru, without lengths.

    Takes Wx + b (N, G), which of its rows is meant at (T, B), int64, or None for all in their order; U; the bias c, which an lstm
    has in Wx + b already; h (B, D), and the lstm's c (B, D). Gives h (T, B, D) and the last state.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, given: Tensor, at: Tensor | None, matrix: Tensor, bias: Tensor | None, *state: Tensor
    ) -> tuple[Tensor, ...]:
        (batch, width), across = state[0].shape, matrix.t()
        if at is not None and at.numel() and not (int(at.min()) >= 0 and int(at.max()) < len(given)):
            raise IndexError(f"tokens go from {int(at.min())} to {int(at.max())}, and the table has {len(given)} rows")
        rows = torch.arange(len(given)).view(-1, batch) if at is None else at.long()
        time = len(rows)
        hs, gates = given.new_empty(time + 1, batch, width), given.new_empty(time, batch, given.shape[1])
        hs[0] = state[0]
        x, of, g, h = given.contiguous().numpy(), rows.numpy(), gates.numpy(), hs.numpy()
        if cell == "lstm":
            cs, tanhs, step = torch.empty_like(hs), torch.empty_like(hs[1:]), _machine_code("lstm_forward")
            cs[0], kept = state[1], (cs, tanhs)
            c, bent = cs.numpy(), tanhs.numpy()
            for t in range(time):
                torch.mm(hs[t], across, out=gates[t])
                step(x, of[t], g[t], c[t], c[t + 1], bent[t], h[t + 1])
        else:
            assert bias is not None
            us, step = torch.empty_like(gates), _machine_code("gru_forward")
            u, kept = us.numpy(), (us,)
            for t in range(time):
                torch.addmm(bias, hs[t], across, out=us[t])
                step(x, of[t], u[t], h[t], g[t], h[t + 1])
        ctx.cell, ctx.count = cell, len(given)
        ctx.save_for_backward(at, matrix, hs, gates, *kept)
        return (hs[1:], hs[-1].clone(), *(part[-1].clone() for part in kept[:1] if cell == "lstm"))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        first_derivatives_only()
        at, matrix, hs, gates, *kept = ctx.saved_tensors
        outward, behind = upstream[0].contiguous(), upstream[1].clone(memory_format=torch.contiguous_format)
        through = deltas = torch.empty_like(gates)
        g, out, dh, delta = (part.numpy() for part in (gates, outward, behind, deltas))
        last: tuple[Tensor, ...] = ()
        if ctx.cell == "lstm":
            along, step = upstream[2].clone(memory_format=torch.contiguous_format), _machine_code("lstm_backward")
            c, bent, dc = kept[0].numpy(), kept[1].numpy(), along.numpy()
            for t in reversed(range(len(gates))):
                step(g[t], c[t], bent[t], out[t], dh, dc, delta[t])
                torch.mm(deltas[t], matrix, out=behind)
            last = (along,)
        else:
            through, step = torch.empty_like(gates), _machine_code("gru_backward")
            u, h, back = kept[0].numpy(), hs.numpy(), through.numpy()
            for t in reversed(range(len(gates))):
                step(g[t], u[t], h[t], out[t], dh, delta[t], back[t])
                behind.addmm_(through[t], matrix)
        flat, change = through.flatten(0, 1), deltas.flatten(0, 1)
        if at is not None:
            change = change.new_zeros(ctx.count, change.shape[1]).index_add_(0, at.long().flatten(), change)
        own = flat.sum(0) if ctx.cell == "gru" else None  # the lstm's goes by Wx + b
        return None, change, None, (hs[:-1].flatten(0, 1).t() @ flat).t(), own, behind, *last


@functools.cache
def _machine_code(name: str) -> Callable[..., None]:
    """One of the steps above (some seconds the first time ever, then from numba's cache)."""
    from numba import njit
    from numba.extending import register_jitable

    for part in (bend, _gates):
        register_jitable(part)
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    }
    try:
        return njit(cache=True, **options)(globals()[name])
    except RuntimeError:  # no writable place for the cache
        return njit(**options)(globals()[name])
