"""Facts about saliency: the weight row of a linear model, finite differences, and what the run says of its maps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import etude
from etude.blocks.looking.attribution import heat, rank_correlation
from etude.insight.saliency import explain, saliency
from etude.vision.lenet import LeNet


def test_a_linear_model_shows_its_weight_row() -> None:
    """∂(Wx + b)_c / ∂x = W_c, for every image alike."""
    linear = nn.Linear(12, 4, dtype=torch.float64)
    model, x, target = (
        nn.Sequential(nn.Flatten(), linear),
        torch.rand(5, 3, 2, 2, dtype=torch.float64),
        torch.tensor([3, 0, 1, 1, 2]),
    )
    assert torch.equal(saliency(model, x, target), linear.weight[target].view(5, 3, 2, 2))
    assert torch.equal(saliency(model, x, 2), linear.weight[2].view(1, 3, 2, 2).expand(5, 3, 2, 2))
    assert torch.equal(saliency(model, x), linear.weight[model(x).argmax(1)].view(5, 3, 2, 2))


def test_finite_differences() -> None:
    """Central differences of the logit, in pixel units: the standardisation inside is a part of the derivative."""
    model = LeNet(4, mean=(0.2,), std=(0.25,), style="1998").double()
    x, target, h = torch.rand(2, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 3]), 1e-5
    maps = saliency(model, x, target)
    for row, column in [(3, 4), (14, 14), (27, 0), (9, 21)]:
        step = torch.zeros_like(x)
        step[:, :, row, column] = h
        with torch.no_grad():
            difference = ((model(x + step) - model(x - step)) / (2 * h)).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(maps[:, 0, row, column], difference, rtol=1e-6, atol=1e-9)


def test_it_is_the_logit_and_not_the_probability() -> None:
    """A constant added to all logits of an image that depends on x changes the map; the softmax would not see it."""

    class Shifted(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.linear, self.by = nn.Linear(3, 2), by

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.by * x.sum(1, keepdim=True)

    one, two = Shifted(0.0), Shifted(2.0)
    two.load_state_dict(one.state_dict())
    x = torch.rand(4, 3)
    torch.testing.assert_close(saliency(two, x, 1) - saliency(one, x, 1), torch.full((4, 3), 2.0))


def test_explain_takes_any_module() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    figure = explain(model, torch.rand(3, 3, 8, 8), names=("a", "b", "c", "d", "e"))
    assert len(figure.axes) == 9
    assert any(text.get_text().startswith("before:") for text in figure.texts)


def test_a_run_on_a_linear_network_shows_the_weights(tmp_path: Path) -> None:
    """`--network softmax`: the map says exactly how far the logit falls, and loses all likeness with all weights shuffled."""
    done = etude.run(
        "insight/saliency", preset="tiny", out=tmp_path / "run", seed=0, quiet=True, network="softmax", train_steps=400
    )
    assert abs(done.metrics["sanity_all"]) < 0.3
    assert done.metrics["faithfulness"] == pytest.approx(1, abs=1e-2)  # ties are broken by rounding
    assert done.metrics["faithfulness_centre"] < 0.6
    assert done.metrics["test_accuracy"] > 0.8
    assert {"maps"} <= {item["name"] for item in json.loads((done.folder / "artifacts" / "index.json").read_text())}


def test_randomised_weights_destroy_the_map() -> None:
    """Adebayo et al.: on a network with other weights of the same distribution, |M| ranks the pixels otherwise."""
    one, two, x = LeNet(4), LeNet(4), torch.rand(8, 1, 28, 28)
    maps = heat(saliency(one, x, 0))
    assert float(rank_correlation(maps, heat(saliency(one, x, 0))).min()) == pytest.approx(1)
    assert float(rank_correlation(maps, heat(saliency(two, x, 0))).mean()) < 0.5
