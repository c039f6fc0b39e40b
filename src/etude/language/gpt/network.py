"""The network of GPT-1, GPT-2 and GPT-3 (dense layers), with Hugging Face's parameter names.

Legend: B batch, T time, D width, H heads, d = D/H, V vocabulary, N layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.affine import affine, pack
from etude.blocks.nn.attention import Cache, attend, text_mask
from etude.blocks.nn.positional import LearnedPositions
from etude.blocks.nn.transformer import ACTIVATIONS
from etude.core.errors import UserError

__all__ = ["GPT", "Affine", "Architecture", "next_token_loss", "total_nats"]


@dataclass(frozen=True)
class Architecture:
    """What a GPT is made of; with the weights, all that is needed to run it."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    hidden: int | None = None
    norm_placement: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu"
    dropout: float = 0.0
    epsilon: float = 1e-5


class Affine(nn.Module):
    """x·W + b with W (in, out): the layout of GPT-2's published matrices (Hugging Face calls it Conv1D)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return affine(x, self.weight, self.bias, _packed(self, x, cache))


class Attention(nn.Module):
    """Causal self-attention: one matrix for queries, keys and values of all heads, one output projection."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        if of.width % of.heads:
            raise UserError(f"width {of.width} is not divisible by {of.heads} heads")
        self.heads, self.dropout = of.heads, of.dropout
        self.c_attn = Affine(of.width, 3 * of.width)
        self.c_proj = Affine(of.width, of.width)

    def forward(self, x: Tensor, cache: Cache | None, layer: int, pads: Tensor | None) -> Tensor:
        q, k, v = self.c_attn(x, cache).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, T, d)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        mask = None if pads is None else text_mask(pads, k.shape[2])
        out = attend(q, k, v, mask, causal=True, dropout=self.dropout if self.training else 0.0)
        return self.c_proj(out.transpose(1, 2).flatten(2), cache)


class Network(nn.Module):
    """The position-wise network, 4·D wide unless told otherwise."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        hidden = of.hidden or 4 * of.width
        self.c_fc, self.c_proj = Affine(of.width, hidden), Affine(hidden, of.width)
        self.activation = ACTIVATIONS[of.activation]

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x, cache)), cache)


class GPTBlock(nn.Module):
    """One layer, see the equations on top."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.pre = of.norm_placement == "pre"
        self.ln_1, self.ln_2 = nn.LayerNorm(of.width, of.epsilon), nn.LayerNorm(of.width, of.epsilon)
        self.attn, self.mlp, self.drop = Attention(of), Network(of), nn.Dropout(of.dropout)

    def forward(self, h: Tensor, cache: Cache | None, layer: int, pads: Tensor | None = None) -> Tensor:
        if self.pre:
            h = h + self.drop(self.attn(self.ln_1(h), cache, layer, pads))
            return h + self.drop(self.mlp(self.ln_2(h), cache))
        h = self.ln_1(h + self.drop(self.attn(h, cache, layer, pads)))
        return self.ln_2(h + self.drop(self.mlp(h, cache)))


class GPT(nn.Module):
    """ids (B, T) int64 → logits (B, T, V); also a `Decoder` for `etude.blocks.tokens.decoding`.

    Weights start normal(0, 0.02), the two projections that feed the residual stream 1/√(2N) smaller; biases 0.
    """

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.of, self.context = of, of.context
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(of.vocabulary, of.width),
            "wpe": LearnedPositions(of.context, of.width),
            "drop": nn.Dropout(of.dropout),
            "h": nn.ModuleList(GPTBlock(of) for _ in range(of.layers)),
        }
        if of.norm_placement == "pre":
            parts["ln_f"] = nn.LayerNorm(of.width, of.epsilon)
        self.transformer = nn.ModuleDict(parts)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * of.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, pads: Tensor | None = None) -> Tensor:
        """Logits of the token after each position; raises ValueError when T exceeds the context.

        `pads` (B,) int64: how many tokens at the start of each row are padding (`pad_left`). They are not seen and not
        counted as positions, so the logits behind them are those of the text alone.
        """
        return self._logits(self._hidden(ids, None, pads), None)

    @torch.no_grad()
    def start(self, batch: int) -> Cache:
        """An empty cache for `batch` sequences. It also holds a copy of the weights as they are now, laid out for one
        token a sequence, where that makes a step faster (on a CPU: more than one sequence, or bfloat16)."""
        of, table = self.of, self.transformer["wte"].weight
        cache = Cache(of.layers, batch, of.heads, of.context, of.width // of.heads, table.dtype, table.device)
        cache.packed = {part: pack(part.weight, batch) for part in self.modules() if isinstance(part, Affine)}
        cache.packed[self] = pack(table.t(), batch)
        return cache

    @torch.no_grad()
    def advance(self, ids: Tensor, cache: Cache) -> Tensor:
        """Read ids (B, T) after the positions in the cache; logits (B, V) of the token after the last one.

        Without gradients: the cache is overwritten in place. Its `pads` say how much of each row is padding."""
        return self._logits(self._hidden(ids, cache, cache.pads)[:, -1:], cache)[:, 0]

    def _hidden(self, ids: Tensor, cache: Cache | None, pads: Tensor | None) -> Tensor:
        parts = self.transformer
        h = parts["drop"](parts["wpe"](parts["wte"](ids), 0 if cache is None else cache.length, pads))
        for layer, block in enumerate(parts["h"]):
            h = block(h, cache, layer, pads)
        if cache is not None:
            cache.length += ids.shape[1]
        return parts["ln_f"](h) if "ln_f" in parts else h

    def _logits(self, h: Tensor, cache: Cache | None) -> Tensor:
        return affine(h, self.transformer["wte"].weight.t(), None, _packed(self, h, cache))


def _packed(part: nn.Module, x: Tensor, cache: Cache | None) -> Tensor | None:
    """The part's weights as packed for one token a sequence, if x (B, T, ·) is that."""
    return cache.packed.get(part) if cache is not None and x.shape[1] == 1 else None


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """−mean log p(target) in nats, from logits (B, T, V) and targets (B, T): the token **after** each position."""
    precise = torch.promote_types(logits.dtype, torch.float32)  # a sum over V in bfloat16 would lose digits
    return F.cross_entropy(logits.flatten(0, 1).to(precise), targets.flatten())


@torch.no_grad()
def total_nats(model: GPT, ids: Tensor, batch: int = 64) -> float:
    """−Σ log p of ids[1:], (N,): every token but the first is predicted exactly once, in windows of one context."""
    training = model.training
    model.eval()
    inputs, targets, context = ids[:-1], ids[1:], model.context
    whole = len(inputs) // context * context
    groups = []
    if whole:
        groups += zip(inputs[:whole].view(-1, context).split(batch), targets[:whole].view(-1, context).split(batch))
    if whole < len(inputs):
        groups.append((inputs[None, whole:], targets[None, whole:]))
    total = sum((float(next_token_loss(model(x), y)) * y.numel() for x, y in groups), 0.0)
    model.train(training)
    return total
