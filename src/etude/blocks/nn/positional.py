"""Telling attention where a token stands: sinusoids, learned tables, and the step number itself.

Papers: Vaswani et al., 2017, arXiv:1706.03762, section 3.5 (sinusoids); Gehring et al., 2017, arXiv:1705.03122
(learned positions). Without one of these, self-attention is permutation equivariant: it sees a set.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["LearnedPositions", "append_step", "check_positions", "sinusoids"]


def sinusoids(length: int, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """PE(t, 2i) = sin(t / base^(2i/d)), PE(t, 2i+1) = cos(t / base^(2i/d)), i = 0 … d/2 − 1: (length, width).

    Sines and cosines alternate as in the paper, and the first frequency is 1, so the first pair has period 2π
    (erratum E60: the notes start at i = 1 and call the first dimension an even-odd indicator). Moving by k positions
    rotates every pair by a fixed angle, so relative offsets are linear in the table. Computed in float64.

    Raises ValueError for an odd width: sines and cosines come in pairs.
    """
    if width < 2 or width % 2:
        raise ValueError(f"sinusoidal positions need an even width, got {width}")
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(dtype)


def append_step(x: Tensor, length: int, start: int = 0) -> Tensor:
    """[x; t/length]: (B, T, D) → (B, T, D + 1), the step number (scaled to [0, 1)) as one more feature."""
    check_positions(x.shape[1], start, length)
    step = torch.arange(start, start + x.shape[1], dtype=x.dtype, device=x.device) / length
    return torch.cat([x, step[None, :, None].expand(x.shape[0], -1, 1)], dim=-1)


def check_positions(count: int, start: int, context: int) -> None:
    """Raise ValueError unless the positions start … start + count − 1 exist in a table of `context` rows."""
    if start + count > context:
        raise ValueError(
            f"position {start + count - 1} does not exist: this model has {context} positions (0 to {context - 1}); "
            "shorten the input or build the model with a longer context"
        )


class LearnedPositions(nn.Embedding):
    """One learned vector a position: x + P_t (mode "add") or [x; P_t] (mode "concatenate").

    The table is `weight` (context, width), as `nn.Embedding` names it. After a linear layer both modes are the same
    family: [x; p]·W = x·W₁ + p·W₂.
    """

    def __init__(self, context: int, width: int, mode: Literal["add", "concatenate"] = "add") -> None:
        super().__init__(context, width)
        self.mode = mode

    def forward(self, input: Tensor, start: int = 0, pads: Tensor | None = None) -> Tensor:
        """(B, T, D) at positions start … start + T − 1 → (B, T, D), or (B, T, D + width) when concatenating.

        Where `pads` (B,) tokens of padding stand before each row they are not counted: the first token of the text is at
        position 0 (so is the padding, which nobody looks at). Raises ValueError when a position lies outside the table.
        """
        check_positions(input.shape[1], start, self.num_embeddings)
        rows = self.weight[start : start + input.shape[1]]
        if pads is not None:
            place = torch.arange(start, start + input.shape[1], device=pads.device) - pads[:, None]
            rows = self.weight[place.clamp(min=0)]
        if self.mode == "add":
            return input + rows
        return torch.cat([input, rows.expand(input.shape[0], -1, -1)], dim=-1)
