"""The Transformer's network: an encoder, a decoder that looks at its last layer, one table for both languages and the softmax.

Legend: B sentences, S source and T target tokens, R places of a batch that hold text, D width, H heads, V vocabulary, N layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from etude.blocks.nn.affine import Linear, affine
from etude.blocks.nn.attention import Text
from etude.blocks.nn.positional import LearnedPositions, append_step, sinusoids
from etude.blocks.nn.transformer import Block
from etude.core.errors import UserError
from etude.sequence.parts.translating import PAD
from etude.sequence.transformer import steps
from etude.sequence.transformer.steps import State

__all__ = ["Architecture", "Positions", "State", "Transformer"]

Kind = Literal["sinusoidal", "learned", "concatenated", "appended", "none"]


@dataclass(frozen=True)
class Architecture:
    """What a Transformer is made of; with the weights, all that is needed to run it."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    positions: Kind = "sinusoidal"
    norm_placement: Literal["post", "pre"] = "post"
    dropout: float = 0.1


class Positions(nn.Module):
    """Tells each vector of (B, T, D) where it stands; the answer has D features too.

    sinusoidal: x + PE_t, any t; learned: x + P_t; concatenated: [x; P_t]·W + b; appended: [x; t/context]·W + b; none: x.
    Learned and appended ones, and those that stand beside, are `context` many, and a later one raises ValueError.
    """

    def __init__(self, kind: Kind, context: int, width: int) -> None:
        super().__init__()
        self.kind, self.context, self.width = kind, context, width
        if kind in ("learned", "concatenated"):
            self.table = LearnedPositions(context, width, "add" if kind == "learned" else "concatenate")
        if kind in ("concatenated", "appended"):
            self.join = Linear(2 * width if kind == "concatenated" else width + 1, width)
        self._waves = torch.empty(0, width)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """(B, T, D) at positions start … start + T − 1."""
        if self.kind == "sinusoidal":
            return x + self._rows(start + x.shape[1], x)[start:]
        if self.kind == "appended":
            return self.join(append_step(x, self.context, start))
        if self.kind == "none":
            return x
        x = self.table(x, start)
        return x if self.kind == "learned" else self.join(x)

    def _rows(self, count: int, like: Tensor) -> Tensor:
        waves = self._waves
        if len(waves) < count or waves.dtype != like.dtype or waves.device != like.device:
            rows = sinusoids(max(64, 2 * count), self.width, dtype=torch.float64)
            self._waves = waves = rows.to(like.device, like.dtype)
        return waves[:count]


class Transformer(nn.Module):
    """Source and target ids → logits of the token after each one of the target; a `Translator` (`sequence.parts.translating`).

    Matrices start as Glorot's, biases 0, the table of tokens normal(0, 1/√D), so that a vector times √D has elements of size 1.
    """

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        if of.width % of.heads:
            raise UserError(f"width {of.width} is not divisible by {of.heads} heads")
        if of.width % 2 and of.positions == "sinusoidal":
            raise UserError(f"sinusoidal positions need an even width, sines and cosines, and it is {of.width}")
        self.of = of
        self.embedding = nn.Embedding(of.vocabulary, of.width)
        self.source_positions, self.target_positions = (Positions(of.positions, of.context, of.width) for _ in range(2))
        settings = {"norm": of.norm_placement, "dropout": of.dropout}
        self.encoder = nn.ModuleList(Block(of.width, of.heads, **settings) for _ in range(of.layers))
        self.decoder = nn.ModuleList(
            Block(of.width, of.heads, causal=True, cross=True, **settings) for _ in range(of.layers)
        )
        last = nn.LayerNorm if of.norm_placement == "pre" else lambda _: nn.Identity()
        self.encoder_norm, self.decoder_norm = last(of.width), last(of.width)
        self.dropout = nn.Dropout(of.dropout)
        for name, parameter in self.named_parameters():
            if name == "embedding.weight":
                nn.init.normal_(parameter, std=of.width**-0.5)
            elif name.endswith("table.weight"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, source: Tensor, lengths: Tensor, before: Tensor, flat: bool = False) -> Tensor:
        """Logits (B, T, V), 0 at padding; `flat`: (R, V) of the text alone, in the order of `before[before != PAD]`.

        source (B, S) and before (B, T) int64, PAD behind the text; lengths (B,) of the sources. Padding costs nothing but in the
        attention.
        """
        self.require(before.shape[1])
        memory, seen = self.encode(source, lengths)
        text = Text.of(before != PAD)
        h = self.dropout(text.take(self.target_positions(self._embed(before))))
        for block in self.decoder:
            h = block(h, memory, text=text, memory_text=seen)
        logits = self._logits(h)
        return logits if flat else text.put(logits)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Text]:
        """The last encoder layer at the R places of the source's text, (R, D), and where these are."""
        self.require(source.shape[1])
        text = Text.of(torch.arange(source.shape[1], device=source.device) < lengths.to(source.device)[:, None])
        h = self.dropout(text.take(self.source_positions(self._embed(source))))
        for block in self.encoder:
            h = block(h, text=text)
        return self.encoder_norm(h), text

    @torch.no_grad()
    def begin(self, source: Tensor, lengths: Tensor) -> State:
        """The source read, and nothing written."""
        memory, text = self.encode(source, lengths)
        return steps.begin(self._written, text.put(memory), text.mask)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads the token written last, (R,): logits (R, V) of the next, from the keys and values of those before it."""
        h = self.target_positions(self._embed(tokens[:, None]), state.place)[:, 0]
        layout = steps.laid_out(self._written, self.embedding.weight, len(tokens), state)
        h, state = steps.advance(self._written, h, state, layout)
        return layout.table(self.decoder_norm(h)), state

    @torch.no_grad()
    def looks(self, source: Tensor, lengths: Tensor, before: Tensor) -> dict[str, list[Tensor]]:
        """Who looks where, a tensor a layer: "encoder" (B, H, S, S), "decoder" (B, H, T, T) and "cross" (B, H, T, S)."""
        found: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}
        mask = torch.arange(source.shape[1], device=source.device) < lengths.to(source.device)[:, None]
        h = self.dropout(self.source_positions(self._embed(source)))
        for block in self.encoder:
            found["encoder"].append(block.looks(h, key_mask=mask)["self"])  # type: ignore[operator]
            h = block(h, key_mask=mask)
        memory, h = self.encoder_norm(h), self.dropout(self.target_positions(self._embed(before)))
        for block in self.decoder:
            both = block.looks(h, memory, memory_key_mask=mask)  # type: ignore[operator]
            found["decoder"].append(both["self"])
            found["cross"].append(both["cross"])
            h = block(h, memory, memory_key_mask=mask)
        return found

    @property
    def _written(self) -> list[Block]:
        return [*self.decoder]  # type: ignore[list-item]

    def require(self, count: int) -> None:
        """Raise UserError where there are fewer than `count` positions."""
        if self.of.positions not in ("sinusoidal", "none") and count > self.of.context:
            raise UserError(
                f"a sentence of {count} tokens is longer than the {self.of.context} {self.of.positions} positions that there "
                "are; shorten it, train with a larger --context, or with --positions sinusoidal"
            )

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.of.width)

    def _logits(self, h: Tensor) -> Tensor:
        return affine(self.decoder_norm(h), self.embedding.weight.t())
