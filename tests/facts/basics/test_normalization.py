"""Twenty sigmoid layers: both networks against torch, gradients through depth, probing leaves no trace (E15)."""

import numpy as np
import pytest
import torch
from torch import nn

from etude.basics.normalization import Config, Sigmoids, build, probe
from etude.core.spec import Spec

SPEC = Spec(shape=(1, 4, 4), classes=("a", "b", "c"), mean=(0.25,), std=(0.5,))


def batch(count=32):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 4, 4, generator=draw), torch.randint(3, (count,), generator=draw)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_network_equals_torchs_layers(normalised):
    """E15: in training by the batch's moments, in evaluation by the running ones, after two batches."""
    torch.manual_seed(0)
    ours = Sigmoids(SPEC, 3, 8, normalised).double()
    theirs = nn.Sequential()
    for layer in ours.hidden:
        linear = nn.Linear(layer[0].in_features, 8, bias=not normalised).double()
        linear.load_state_dict(layer[0].state_dict())
        theirs.extend([linear, *([nn.BatchNorm1d(8).double()] if normalised else []), nn.Sigmoid()])
    theirs.append(ours.output)
    x = (batch()[0].double() - 0.25) / 0.5
    for part in x.flatten(1).split(16):
        torch.testing.assert_close(ours(part.view(-1, 1, 4, 4) * 0.5 + 0.25), theirs(part), rtol=1e-10, atol=1e-12)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x * 0.5 + 0.25), theirs(x.flatten(1)), rtol=1e-10, atol=1e-12)


def test_batch_norm_keeps_spread_and_gradient_at_every_depth():
    """Without it both fall by orders of magnitude; layer 20's units hardly tell two images apart."""
    torch.manual_seed(0)
    found = {name: probe(model, *batch(128)) for name, model in build(Config(), SPEC).items()}
    with_, without = found["with"], found["without"]
    assert with_["spread"].min() > 0.15
    assert without["spread"][0] > 0.05
    assert without["spread"][-1] < 1e-6
    assert with_["slope"][0] > 0.2 * with_["slope"][-1]
    assert without["slope"][0] < 1e-8 * without["slope"][-1]
    # each layer passes at most a quarter of the weight matrix's norm
    net = build(Config(), SPEC)["without"]
    factors = [0.25 * torch.linalg.matrix_norm(layer[0].weight, 2).item() for layer in net.hidden[1:]]
    slopes = probe(net, *batch(128))["slope"]
    assert (slopes[:-1] <= slopes[1:] * np.array(factors) * (1 + 1e-5)).all()


def test_probing_leaves_no_trace():
    torch.manual_seed(0)
    model = build(Config(depth=2, width=8), SPEC)["with"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, *batch())
    assert found["histogram"].sum(1).tolist() == [32 * 8] * 2
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
