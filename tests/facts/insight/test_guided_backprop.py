"""Facts about guided backpropagation: the rule at each ReLU, however the model spells it, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.insight.guided_backprop import explain, guided_backprop
from etude.insight.saliency import saliency
from etude.vision.lenet import LeNet


def by_hand(weights: list[Tensor], x: Tensor, target: int) -> Tensor:
    """The definition for x (n,) through W_L relu(… relu(W_1 x)), layer by layer, without autograd."""
    below, inputs = x, []
    for weight in weights[:-1]:
        inputs.append(weight @ below)
        below = inputs[-1].clamp(min=0)
    delta = weights[-1][target]
    for weight, u in zip(reversed(weights[:-1]), reversed(inputs)):
        delta = weight.T @ (delta * (u > 0) * (delta > 0))
    return delta


def layers(weights: list[Tensor]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight.data = weight.clone()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def test_three_layers_by_hand() -> None:
    """Numbers worked out on paper: W₁x = (1, 2, −1), so u = (1, 2, −1); W₂h = (3, 1); δ = (2, −1)."""
    weights = [
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]),
        torch.tensor([[1.0, 1.0, 4.0], [-1.0, 1.0, 4.0]]),
        torch.tensor([[2.0, -1.0], [0.0, 0.0]]),
    ]
    x = torch.tensor([1.0, 1.0])
    # second ReLU: (2, −1) → (2, 0); W₂ᵀ gives (2, 2, 8); first ReLU: u₃ < 0 → (2, 2, 0); W₁ᵀ gives (2, 4)
    assert guided_backprop(layers(weights), x[None], 0)[0].tolist() == [2.0, 4.0]
    assert by_hand(weights, x, 0).tolist() == [2.0, 4.0]
    # the plain gradient lets −1 pass: (2, −1) → W₂ᵀ (3, 1, 4) → (3, 1, 0) → (3, 2)
    assert saliency(layers(weights), x[None], 0)[0].tolist() == [3.0, 2.0]


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_random_networks_equal_the_definition(depth: int) -> None:  # E44: both gates at every ReLU
    weights = [torch.randn(7 if i < depth - 1 else 3, 6 if i == 0 else 7, dtype=torch.float64) for i in range(depth)]
    model, x = layers(weights), torch.randn(20, 6, dtype=torch.float64)
    for target in range(3):
        expected = torch.stack([by_hand(weights, one, target) for one in x])
        torch.testing.assert_close(guided_backprop(model, x, target), expected, rtol=1e-12, atol=1e-12)


def test_positive_weights_make_it_the_plain_gradient() -> None:
    """When every δ is positive the rule changes nothing."""
    model = layers([torch.rand(8, 5), torch.rand(6, 8), torch.rand(2, 6)])
    x = torch.randn(9, 5)
    assert torch.equal(guided_backprop(model, x, 1), saliency(model, x, 1))


def test_it_is_nonnegative_behind_a_first_relu() -> None:
    """A ReLU on the pixels themselves lets only positive values out."""
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 1, 4, 4)
    maps = guided_backprop(model, x, 0)
    assert bool((maps >= 0).all())
    assert bool((maps[x <= 0] == 0).all())
    assert bool((saliency(model, x, 0) < 0).any())


class Net(nn.Module):
    """Two layers under any spelling of ReLU."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.three = (nn.Linear(a, b, dtype=torch.float64) for a, b in ((5, 9), (9, 9), (9, 3)))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.relu(self.two(self.relu(self.one(x)))))


def _ignoring(x: Tensor) -> Tensor:
    """In place, the result thrown away."""
    F.relu(x, inplace=True)
    return x


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "one module used twice": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "in place, result ignored": _ignoring,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_relu(spelling: str) -> None:
    model = Net(SPELLINGS[spelling])
    plain = nn.Sequential(model.one, nn.ReLU(), model.two, nn.ReLU(), model.three)
    x = torch.randn(11, 5, dtype=torch.float64)
    assert torch.equal(guided_backprop(model, x, 2), guided_backprop(plain, x, 2))
    assert not torch.allclose(guided_backprop(model, x, 2), saliency(model, x, 2))


def test_a_skip_connection_sums_before_the_gate() -> None:
    """The output of a ReLU that is used twice: δ is the sum of both, and the gate sees that sum."""

    class Skip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(x)
            return torch.stack([3 * h[:, 0] - 2 * h[:, 0], -h[:, 1]], 1)

    x = torch.ones(1, 2)
    assert guided_backprop(Skip(), x, 0).tolist() == [[1.0, 0.0]]
    assert guided_backprop(Skip(), x, 1).tolist() == [[0.0, 0.0]]


def test_a_model_without_relu_is_refused() -> None:
    with pytest.raises(ValueError, match="no ReLU is seen in LeNet"):
        guided_backprop(LeNet(3, style="1998"), torch.rand(1, 1, 28, 28))


def test_explain_takes_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    figure = explain(model, torch.rand(2, 3, 8, 8))
    assert len(figure.axes) == 8
    assert model.training
