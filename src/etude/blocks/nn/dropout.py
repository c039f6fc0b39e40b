"""Dropout: train with a random half of the units switched off, test with all of them scaled to match

Paper: Hinton, Srivastava, Krizhevsky, Sutskever & Salakhutdinov, Improving neural networks by preventing co-adaptation
of feature detectors, 2012, arXiv:1207.0580; Srivastava et al., Dropout, JMLR 2014, section 4.

Equation: with mask m_i ~ Bernoulli(q), q = 1 − p the probability of *keeping* a unit,
    classic     training  y = m ⊙ x         testing  y = q x    (as multiplying the outgoing weights by q)
    inverted    training  y = m ⊙ x / q     testing  y = x
Either way E[training output] = test output behind a linear layer. A classic network with weights W is the inverted
network with weights q W: same outputs, in training and testing, for the same masks.

Differences:
- E24: the notes multiply the weights by 1/p (their p keeps) at test. They must *shrink*: times q at test, or the
  activations ÷ q in training, which the notes' next sentence has right.
- `p` is the probability of *dropping*, as in torch; the papers' and the notes' p is the probability of keeping.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["inverted", "classic"]


def keep_mask(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """m like `x` in shape, dtype and device: each element 1 with probability 1 − p, else 0."""
    return torch.empty_like(x, requires_grad=False).bernoulli_(1 - p, generator=generator)


def inverted(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """m ⊙ x / (1 − p): what to do in training; nothing is left to do at test. All zeros at p = 1."""
    return x * keep_mask(x, p, generator).div_(max(1 - p, torch.finfo(x.dtype).tiny))


def classic(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """m ⊙ x: what to do in training; at test multiply by 1 − p."""
    return x * keep_mask(x, p, generator)


class Dropout(nn.Module):
    """Dropout of any tensor, element by element, with the probability `p` of dropping in [0, 1].

    `forward(x, generator)` draws the mask from `generator` (on x's device), or from torch's global stream without one;
    from equal streams the masks equal `nn.Dropout`'s. Raises ValueError for a `p` or `form` out of range.
    """

    def __init__(self, p: float = 0.5, form: Form = "inverted"):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"the probability of dropping must be in [0, 1], got {p}")
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        self.p, self.form = p, form

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.form == "classic":
            return classic(x, self.p, generator) if self.training else x * (1 - self.p)
        if not self.training:
            return x
        return F.dropout(x, self.p) if generator is None else inverted(x, self.p, generator)

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form!r}"
