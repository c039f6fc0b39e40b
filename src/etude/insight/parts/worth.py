"""What a map is worth: does it say how far a logit falls when pixels are erased?

A map M of ∂z_c/∂x claims something that can be measured: where the pixels S of an image are replaced by a fill μ, the logit
falls by about Σ_{i∈S} M_i (x_i − μ_i). Faithfulness is the correlation of this sum with the true fall, over random sets S
(Bhatt, Weller, Moura, Evaluating and Aggregating Feature-based Model Explanations, 2020, arXiv:2005.00631, with Pearson's;
here Spearman's). Any other map, put in M's place in the very same sum, is a null: it knows as much about the ink that was
erased, and where it lay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude.blocks.looking.attribution import erase, logits, rank_correlation


def expected_falls(maps: Tensor, x: Tensor, fill: Tensor) -> Tensor:
    """How far the logit falls, by the map, with each pixel that `fill` replaces: (N, C, H, W) twice → (N, H, W)."""
    return (maps * (x - fill)).sum(1)


def faithfulness(
    model: nn.Module,
    x: Tensor,
    aim: Tensor,
    maps: Mapping[str, Tensor],
    share: float,
    subsets: int,
    fill: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of each of the `maps` (N, C, H, W), the rank correlation of expected and true falls of the logit `aim`: (N,).

    The falls are those of `subsets` random sets of ⌈share·H·W⌉ pixels for each image, equal for all maps. x is (N, C, H, W)
    in [0, 1], `fill` broadcasts to it. A correlation over fewer than three sets says nothing.
    """
    whole, column = logits(model, x), aim[:, None]
    expected: dict[str, list[Tensor]] = {name: [] for name in maps}
    true = []
    for _ in range(subsets):
        chance = torch.rand((len(x), *x.shape[2:]), generator=generator).to(x.device)
        without = erase(x, chance, share, fill)
        true.append((whole - logits(model, without)).gather(1, column)[:, 0])
        for name, values in maps.items():
            expected[name].append((values * (x - without)).flatten(1).sum(1))
    fell = torch.stack(true, 1)
    return {name: rank_correlation(torch.stack(values, 1), fell) for name, values in expected.items()}
