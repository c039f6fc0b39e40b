"""What a control puts into a method's place in this room."""

from __future__ import annotations

import torch
from torch import Tensor

from etude.language.parts.wordpiece import WordPiece

__all__ = ["nothing_hidden"]


def nothing_hidden(ids: Tensor, tokens: WordPiece, share: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """`hide` of BERT in training; where it is scored all chosen tokens are [MASK], of which it then has learned nothing."""
    special = torch.isin(ids, tokens.specials)
    chosen = (torch.rand(ids.shape, generator=stream) < share) & ~special
    chosen[:, 1] = True
    hidden = ids if torch.is_grad_enabled() else ids.masked_fill(chosen, tokens.mask)
    return hidden, chosen.flatten().nonzero()[:, 0]
