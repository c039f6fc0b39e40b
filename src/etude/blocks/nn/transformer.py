"""The Transformer block: attention and a position-wise network, each with a residual path and a layer norm.

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, sections 3.1 and 3.3; pre-norm:
Xiong et al., 2020, arXiv:2002.04745. Parameter names are those of `nn.TransformerEncoderLayer` (and of
`nn.TransformerDecoderLayer` with `cross=True`), so weights travel both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.affine import Linear
from etude.blocks.nn.attention import MultiHeadAttention, Text

__all__ = ["ACTIVATIONS", "Block", "Past"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


Branch = Callable[[Tensor], Tensor]
Past = tuple[Tensor, Tensor] | None
"""Keys and values (R, H, T, d) of what a causal block has read; None before the first position."""
ACTIVATIONS: dict[str, Branch] = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


class Block(nn.Module):
    """One layer: self-attention, optionally cross-attention, then Linear–activation–Linear at every position alone.

    norm="post" is the 2017 paper, x ← LN(x + Sub(x)); norm="pre" is what later models use, x ← x + Sub(LN(x)), and
    wants one more LN after the last block. (Erratum E64: the notes' x + LN(Sub(x)) is neither.)

    Args:
        width: D; heads: H; hidden: width of the position-wise network, None = 4·D as in the paper.
        norm: where the layer norms stand.
        causal: self-attention sees no later position (a decoder).
        cross: a second attention looks at `memory`, the output of the **last** encoder layer (erratum E65).
        activation: "relu" (the paper), "gelu" (exact) or "gelu_tanh" (GPT-2's approximation).
        dropout: on both attentions' weights, inside the network, and on each branch before it is added.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        causal: bool = False,
        cross: bool = False,
        activation: Literal["relu", "gelu", "gelu_tanh"] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        self.norm_first, self.causal, self.activation = norm == "pre", causal, ACTIVATIONS[activation]
        self.self_attn = MultiHeadAttention(width, heads, dropout)
        self.multihead_attn = MultiHeadAttention(width, heads, dropout) if cross else None
        self.linear1 = Linear(width, hidden or 4 * width)
        self.linear2 = Linear(hidden or 4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width) if cross else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_key_mask: Tensor | None = None,
        text: Text | None = None,
        memory_text: Text | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D); memory (B, S, D) is needed exactly when the block was built with `cross=True`.

        `mask` and `key_mask` (B, T) rule the self-attention, `memory_key_mask` (B, S) the cross-attention; True =
        may be looked at (see `etude.blocks.nn.attention`). With `text` x is (R, D), the text of a padded batch alone, and with
        `memory_text` so is the memory; padding is then not looked at.
        """
        self._expect(memory is not None)
        key_mask = (
            text.mask if text is not None and not self.causal else key_mask
        )  # behind a causal query is no padding
        memory_key_mask = memory_key_mask if memory_text is None else memory_text.mask

        def cross(h: Tensor) -> Tensor:
            return self._cross(h, memory, key_mask=memory_key_mask, text=text, memory_text=memory_text)

        return self._through(
            x, lambda h: self.self_attn(h, mask=mask, key_mask=key_mask, causal=self.causal, text=text), cross
        )

    def advance(
        self, x: Tensor, past: Past, memory: tuple[Tensor, Tensor] | None = None, memory_key_mask: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """`forward` of a causal block for the positions x (R, T, D) behind those that `past` holds: (R, T, D), and the new past.

        `memory` is what `read_memory` gave, of B sentences; R = B·K, the K rows of a sentence side by side.
        Nothing is overwritten.
        """
        if not self.causal:
            raise ValueError(
                "only a causal block can be read step by step: what comes later would change what was said"
            )
        self._expect(memory is not None)
        new: list[Past] = []

        def look(h: Tensor) -> Tensor:
            out, now = self.self_attn.advance(h, past)
            new.append(now)
            return out

        def cross(h: Tensor) -> Tensor:
            assert memory is not None
            together = h.reshape(len(memory[0]), -1, h.shape[-1])  # no query sees another, so K rows are K·T queries
            return self._cross.look(together, *memory, memory_key_mask).view_as(h)

        return self._through(x, look, cross), new[0]

    def read_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, d) that the cross-attention takes from the memory (B, S, D), for `advance`."""
        return self._cross.read(memory)

    def looks(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_key_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Who looks where for the arguments of `forward`: "self" (B, H, T, T), and with a memory "cross" (B, H, T, S)."""
        norm = self.norm1 if self.norm_first else nn.Identity()
        found = {"self": self.self_attn.weights(norm(x), key_mask=key_mask, causal=self.causal)}
        if memory is not None:
            x = self._residual(x, lambda h: self.self_attn(h, key_mask=key_mask, causal=self.causal), self.norm1)
            norm = self.norm2 if self.norm_first else nn.Identity()
            found["cross"] = self._cross.weights(norm(x), memory, key_mask=memory_key_mask)
        return found

    @property
    def _cross(self) -> MultiHeadAttention:
        assert self.multihead_attn is not None
        return self.multihead_attn

    def _expect(self, memory: bool) -> None:
        if memory != (self.multihead_attn is not None):
            raise ValueError("memory goes with cross=True: give it to a block with cross-attention and to no other")

    def _through(self, x: Tensor, look: Branch, cross: Branch) -> Tensor:
        x = self._residual(x, look, self.norm1)
        if self.norm3 is None:
            return self._residual(x, self._network, self.norm2)
        return self._residual(self._residual(x, cross, self.norm2), self._network, self.norm3)

    def _network(self, h: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(h))))

    def _residual(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))
