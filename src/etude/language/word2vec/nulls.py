"""What a control puts into word2vec's place: pairs without the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etude.language.word2vec.pairs import neighbours

__all__ = ["strangers"]


def strangers(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """`neighbours`, but the contexts of a batch are dealt out to its centres anew."""
    centre, targets = neighbours(*arguments, **named)
    dealt = torch.randperm(len(centre), generator=torch.Generator().manual_seed(len(centre)))
    return centre, torch.cat([targets[dealt, :1], targets[:, 1:]], 1)
