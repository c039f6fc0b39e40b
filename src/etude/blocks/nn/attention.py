"""Scaled dot-product attention, multi-head attention, and the key-value cache that makes decoding incremental.

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 1 and section 3.2.

Legend: B batch, H heads, T queries, S keys, d width of one head, D = H·d width of the model.
One mask convention everywhere: a boolean mask is **True where a query may look**, a floating mask is added to
the scores. (`nn.MultiheadAttention` reads booleans the other way round.)
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.affine import Linear, affine

__all__ = [
    "Cache",
    "MultiHeadAttention",
    "Text",
    "attend",
    "attention_weights",
    "causal_mask",
    "join_masks",
    "text_mask",
]


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Who may look where when nobody may look ahead: (T, S) bool, True = may look.

    The queries are the **last** T of the S positions, so query i stands at position S − T + i. With T = S this is
    the lower triangle; with T < S it is the mask of a decoder that has the first S − T positions in its cache.
    """
    if queries > keys:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {keys} keys, {queries} queries")
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def text_mask(pads: Tensor, keys: int) -> Tensor:
    """Which of the S keys are text where `pads` (B,) padding tokens stand before each row: (B, 1, 1, S) bool."""
    return (torch.arange(keys, device=pads.device) >= pads[:, None])[:, None, None]


def join_masks(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Both masks at once; boolean and additive masks may be mixed (the result is boolean only if both are)."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        a, b = b, a
    return a.masked_fill(~b, -torch.inf) if b.dtype == torch.bool else a + b


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    """The definition: α = softmax(q·kᵀ·scale) over the keys that the mask lets through, (..., T, S).

    Args:
        q: (..., T, d) queries; k: (..., S, d) keys.
        mask: broadcastable to (..., T, S), see the convention above.
        scale: factor on the scores; None means 1/√d (erratum E57: the notes leave it out, which is `scale=1.0`).
        causal: also forbid every key that comes after the query, see `causal_mask`.

    A query that may look nowhere gets weight 0 everywhere (softmax of −∞ alone would be NaN).
    """
    scores = q @ k.transpose(-2, -1) * (1 / sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        mask = join_masks(mask, causal_mask(q.shape[-2], k.shape[-2], q.device))
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`attention_weights(...) @ v` through PyTorch's fused kernels: (..., T, e) from v (..., S, e).

    Same arguments and same result as the definition (a query that may look nowhere returns zeros); `dropout` is the
    probability with which each weight is dropped, the rest being scaled up (pass 0 when evaluating).
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if queries == 1:
        causal = False  # the only query is the newest position: it may look everywhere
    if causal and (mask is not None or queries != keys):
        mask, causal = join_masks(mask, causal_mask(queries, keys, q.device)), False
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)
    # The kernels disagree about rows without any key (zeros or NaN), so such rows are opened and blanked afterwards.
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    else:
        mask = mask.to(q.dtype)
        blind = mask.amax(-1, keepdim=True) == -torch.inf
        mask = mask.masked_fill(blind, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.masked_fill(blind, 0.0)


class Cache:
    """Keys and values of the positions already read, in buffers allocated once (no growth, no copy per token).

    `keys` and `values` are (L layers, B, H, S capacity, d); the first `length` positions are filled. A model calls
    `extend` once a layer with the new positions' keys and values and `length += T` once all layers are done.
    `length = 0` empties it. `pads` (B,) says how many of the first positions of each row are padding (None: of no row).
    `packed` is room for weights laid out for `batch` rows (`blocks.nn.transformer.pack`).
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, batch, heads, capacity, head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.pads: Tensor | None = None
        self.packed: dict[nn.Module, Tensor | None] = {}

    @property
    def capacity(self) -> int:
        """The number of positions the buffers hold."""
        return self.keys.shape[3]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, d) after the filled positions of `layer`; views (B, H, length + T, d) of both."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions and position {end - 1} does not fit")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Text(NamedTuple):
    """Which places of a padded batch hold text, so that only these R are computed (all but the attention itself)."""

    mask: Tensor
    """(B, T) bool, True where there is text."""
    places: Tensor
    """(R,) int64: those places of the flat B·T."""

    @classmethod
    def of(cls, mask: Tensor) -> Text:
        """From the mask alone."""
        return cls(mask, mask.flatten().nonzero()[:, 0])

    def take(self, x: Tensor) -> Tensor:
        """(B, T, D) → (R, D), the text alone."""
        return x.flatten(0, 1).index_select(0, self.places)

    def put(self, x: Tensor) -> Tensor:
        """(R, D) → (B, T, D), 0 where there is no text."""
        return x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.places, x).view(*self.mask.shape, -1)


class MultiHeadAttention(nn.Module):
    """Attention in H subspaces at once, then an output projection: concat_h(attend(QW_q, KW_k, VW_v))·W_O.

    Parameters carry the names and shapes of `nn.MultiheadAttention` (in_proj_weight (3D, D), in_proj_bias (3D),
    out_proj.weight (D, D), out_proj.bias (D)), so its weights load. Each head has its own W_q, W_k, W_v (rows of
    in_proj_weight) and the concatenation is multiplied by W_O (erratum E61: the notes stop at the concatenation).

    Args:
        width: D, divisible by `heads`.
        heads: H.
        dropout: probability of dropping an attention weight while training.
        bias: whether the four projections have biases.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.width, self.heads, self.dropout = width, heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width)) if bias else None
        self.out_proj = Linear(width, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
        value: Tensor | None = None,
        text: Text | None = None,
        memory_text: Text | None = None,
    ) -> Tensor:
        """(B, T, D) from query (B, T, D) looking at memory (B, S, D); without memory it looks at itself.

        `mask` is (T, S), (B, T, S) or (B, H, T, S); `key_mask` (B, S) is False at padding; `value` (B, S, D) only
        when values come from elsewhere than keys. With `text` the query, and the answer, are (R, D), its places alone; so is
        the memory with `memory_text`.
        """
        q, k, v, mask = self._project(query, memory, value, mask, key_mask, text, memory_text)
        out = attend(q, k, v, mask, causal=causal, dropout=self.dropout if self.training else 0.0)
        return self._joined(out, text)

    def weights(
        self,
        query: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Who looks where, (B, H, T, S), for the same arguments as `forward` (without dropout): for pictures."""
        q, k, _, mask = self._project(query, memory, None, mask, key_mask)
        return attention_weights(q, k, mask, causal=causal)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, d) of a memory (B, S, D): what `look` needs of it, projected once for many looks."""
        k, v = self._heads(memory, slice(self.width, None))
        return k, v

    def look(self, query: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) from query (B, T, D) looking at what `read` gave; `forward` with the memory already projected."""
        (q,) = self._heads(query, slice(self.width))
        return self._joined(attend(q, keys, values, None if key_mask is None else key_mask[:, None, None, :]))

    def advance(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal self-attention of positions x (B, T, D) that follow those of `past`: (B, T, D), and the new past.

        The past is keys and values (B, H, S, d) of all positions so far, None before the first.
        """
        q, k, v = self._heads(x, slice(None))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self._joined(attend(q, k, v, causal=True)), (k, v)

    def _project(
        self,
        query: Tensor,
        memory: Tensor | None,
        value: Tensor | None,
        mask: Tensor | None,
        key_mask: Tensor | None,
        text: Text | None = None,
        memory_text: Text | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        width = self.width
        if memory is None and value is None:
            q, k, v = self._heads(query, slice(None), text)
        else:
            memory = query if memory is None else memory
            (q,) = self._heads(query, slice(width), text)
            if value is None:
                k, v = self._heads(memory, slice(width, None), memory_text)
            else:
                (k,) = self._heads(memory, slice(width, 2 * width), memory_text)
                (v,) = self._heads(value, slice(2 * width, None), memory_text)
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        if key_mask is not None:
            mask = join_masks(mask, key_mask[:, None, None, :])
        return q, k, v, mask

    def _heads(self, x: Tensor, rows: slice, text: Text | None = None) -> list[Tensor]:
        """The projections by these rows of in_proj_weight, of D each: a list of (B, H, T, d)."""
        bias = self.in_proj_bias
        x = affine(x, self.in_proj_weight[rows].t(), None if bias is None else bias[rows])
        x = x if text is None else text.put(x)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.split(self.width, dim=-1)]

    def _joined(self, out: Tensor, text: Text | None = None) -> Tensor:
        """(B, H, T, d) → (B, T, D), or (R, D): heads side by side, then W_O."""
        out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out if text is None else text.take(out))
