"""Who looks where: the attention of every layer and head over one sentence and its translation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etude.blocks.pictures.panels import panels
from etude.blocks.pictures.plots import INK
from etude.sequence.parts.translating import BOS, EOS, Special, padded
from etude.sequence.transformer.network import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_figures"]

MOST = 24
"""Tokens of a side that are drawn."""


def attention_figures(model: Transformer, tokens: Special, source: str, target: str) -> dict[str, Figure]:
    """A figure each of the encoder's, the decoder's and the cross-attention: a row a layer, a column a head.

    The target is given, as in training. A row of a map is a query and adds up to 1; the first `MOST` tokens of a side are drawn.
    """
    training = model.training
    device = next(model.parameters()).device
    batch = padded([(tokens.encode(source)[:MOST], tokens.encode(target)[:MOST])]).to(device)
    found = model.eval().looks(batch.source, batch.lengths, batch.before)
    model.train(training)
    read, written = _names(tokens, batch.source[0]), _names(tokens, batch.before[0])
    sides = {"encoder": (read, read), "decoder": (written, written), "cross": (written, read)}
    return {name: _maps(torch.stack(found[name])[:, 0].float().cpu(), *both) for name, both in sides.items()}


def _maps(weights: Tensor, queries: list[str], keys: list[str]) -> Figure:
    """weights (N, H, T, S)."""
    layers, heads, rows, columns = weights.shape
    cell = min(0.2, 2.6 / max(rows, columns))
    wide, high = heads * (cell * columns + 0.75), layers * (cell * rows + 0.9)
    figure, plots = panels(heads, layers, width=max(wide, 3.0), height=high)
    for place, axes in enumerate(plots):
        layer, head = divmod(place, heads)
        axes.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks(range(columns), keys, fontsize=6, rotation=90, parse_math=False)
        axes.set_yticks(range(rows), queries, fontsize=6, parse_math=False)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", loc="left", fontsize=8, color=INK)
    return figure


def _names(tokens: Special, ids: Tensor) -> list[str]:
    """How each token is written; the two that are no text get a name."""
    special = {BOS: "‹begin›", EOS: "‹end›"}
    return [special.get(i) or tokens.inner.decode([i - EOS - 1]).replace(" ", "␣") or "·" for i in ids.tolist()]
