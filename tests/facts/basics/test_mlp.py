"""The feed-forward network against torch.nn.Sequential and scikit-learn's forward pass."""

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import nn

from etude.basics.mlp import MLP, Config, build
from etude.core.spec import Spec


def test_parity_with_plain_sequential():
    torch.manual_seed(0)
    model = MLP(12, (7, 5), 3, (0.5,), (0.25,), "tanh").double()
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    plain.load_state_dict({name.removeprefix("layers."): value for name, value in model.state_dict().items()})
    x = torch.rand(6, 1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain((x - 0.5) / 0.25), rtol=1e-12, atol=1e-12)


def test_forward_parity_with_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    theirs = MLPClassifier((8, 4), max_iter=3000, tol=1e-2, random_state=0).fit(x, y)
    model = MLP(6, (8, 4), 3, (0.0,), (1.0,)).double()
    with torch.no_grad():
        for layer, weight, bias in zip(
            (m for m in model.layers if isinstance(m, nn.Linear)), theirs.coefs_, theirs.intercepts_
        ):
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.copy_(torch.from_numpy(bias))
    ours = model(torch.from_numpy(x).view(40, 1, 6)).softmax(1).detach().numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x), rtol=1e-9, atol=1e-12)


def test_no_hidden_layer_is_softmax_regression():
    spec = Spec(shape=(1, 8, 8), classes=tuple("0123456789"), mean=(0.3,), std=(0.3,))
    model = build(Config(widths=()), spec)["model"]
    assert sum(p.numel() for p in model.parameters()) == 650


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = MLP(4, (64,), 2, dropout=0.5)
    x = torch.rand(8, 1, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
