"""Normalisers: parity in values, gradients and buffers with torch and scikit-learn (E15, E63)."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import nn

from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm, LayerNorm, Moments, Standardise, batch_norm, layer_norm, moments, normalise
from etude.optim.newton import newton_step


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed)) * 3 + 1


# -------------------------------------------------------------------------------------------------- Standardise


def test_standardise_equals_scikit_learn_from_the_training_split_only():  # E26
    x = load_breast_cancer().data
    train, test = torch.from_numpy(x[:400]), torch.from_numpy(x[400:])
    scaler = StandardScaler().fit(x[:400])
    layer = Standardise.fit(train)
    np.testing.assert_allclose(layer(test).numpy(), scaler.transform(x[400:]), rtol=1e-9, atol=1e-11)
    assert layer(train).mean(0).abs().max() < 1e-12
    assert layer(test).mean(0).abs().max() > 0.1  # its own statistics were not used


def test_uint8_pixels_are_divided_by_255_first():
    pixels = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8, generator=seeded())
    layer = Standardise.fit(pixels)
    out = layer(pixels)
    assert out.dtype == torch.float32
    assert out.shape == pixels.shape
    torch.testing.assert_close(out, layer(pixels.float() / 255))
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.var((0, 2, 3), correction=0), 1, rtol=1e-5)
    explicit = Standardise((0.5, 0.25, 0.1), (0.5, 0.1, 1.0))(pixels)
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.25, 0.1), (0.1, 1.0))):
        torch.testing.assert_close(explicit[:, channel], (pixels[:, channel].float() / 255 - mean) / std)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, 255.0])
def test_a_constant_feature_becomes_zero_not_nan(value):
    x = torch.rand(100, 2, generator=seeded())
    x[:, 1] = value
    layer = Standardise.fit(x)
    assert torch.equal(layer(x)[:, 1], torch.zeros(100))
    assert torch.equal(Standardise((0.5, 0.5), (0.1, 0.0))(x)[:, 1], torch.zeros(100))
    digits = torch.from_numpy(load_digits().data)  # 3 of its 64 pixels never change
    out = Standardise.fit(digits)(digits)
    assert out.isfinite().all()
    assert (out == 0).all(dim=0).sum() == 3


def test_standardise_is_no_part_of_the_state_dict_and_gradients_reach_pixels():
    net = nn.Sequential(Standardise((0.5,), (0.25,)), nn.Flatten(), nn.Linear(4, 2))
    assert list(net.state_dict()) == ["2.weight", "2.bias"]
    net.load_state_dict(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4, 2)).state_dict())
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    net[0](x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
    assert net.double()[0].mean.dtype == torch.float64
    assert next(iter(copy.deepcopy(net).buffers())).tolist() == [0.5]


def test_standardise_names_mistakes():
    with pytest.raises(ValueError, match="one length"):
        Standardise((0.1, 0.2), (1.0,))
    with pytest.raises(ValueError, match="std must be >= 0"):
        Standardise((0.1,), (-1.0,))
    with pytest.raises(ValueError, match=r"expected \(N, 3, ...\), got shape \(2, 1, 4, 4\)"):
        Standardise((0.1,) * 3, (1.0,) * 3)(torch.zeros(2, 1, 4, 4))


def test_standardising_makes_gradient_descent_at_least_ten_times_shorter():
    """Logistic regression on breast cancer, two raw features of different scale, each at its rate 1/λ_max(H): within
    ten times the steps that take the standardised problem to 1e-3 of its minimum (measured 12) the raw one is not
    there (measured: nor after 6,000)."""
    data = load_breast_cancer()
    raw, y = torch.from_numpy(data.data[:, [0, 4]]), torch.from_numpy(data.target).double()

    def gaps(x, steps):
        """Loss minus minimum after each step of gradient descent."""
        x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)

        def loss(w):
            return nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 5e-3 * (w @ w)

        best = torch.zeros(3, dtype=torch.float64)
        for _ in range(30):
            best = newton_step(loss, best)
        rate = 1 / (0.25 * torch.linalg.eigvalsh(x.T @ x / len(x))[-1] + 1e-2)
        w, found = torch.zeros(3, dtype=torch.float64), []
        for _ in range(steps):
            w = w - rate * torch.func.grad(loss)(w)
            found.append((loss(w) - loss(best)).item())
        return found

    quick = next(k for k, gap in enumerate(gaps(Standardise.fit(raw)(raw), 200), start=1) if gap < 1e-3)
    assert gaps(raw, 10 * quick)[-1] > 1e-3


# ---------------------------------------------------------------------------------------------------- BatchNorm

SHAPES = {"(N, C)": (6, 4), "(N, C, L)": (5, 4, 7), "(N, C, H, W)": (3, 4, 5, 6), "(N, C, D, H, W)": (2, 4, 3, 2, 2)}
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fused", [False, True], ids=["moments", "kernel"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_equals_torch_in_values_gradients_and_buffers(shape, fused, momentum, affine, tracked):
    """Several training batches, then evaluation, then training again; every output, gradient and buffer."""
    settings = {"eps": 1e-3, "momentum": momentum, "affine": affine, "track_running_stats": tracked}
    ours = BatchNorm(4, fused=fused, **settings).double()
    theirs = TORCH[len(shape)](4, **settings).double()
    if affine:
        for module in (ours, theirs):
            module.weight.data, module.bias.data = draw(4, seed=1), draw(4, seed=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for i, training in enumerate((True, True, True, False, True, False)):
        ours.train(training)
        theirs.train(training)
        mine = draw(*shape, seed=10 + i).requires_grad_()
        other = mine.detach().clone().requires_grad_()
        weights = draw(*shape, seed=20 + i)
        y, expected = ours(mine), theirs(other)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-11, msg=name)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, theirs.get_buffer(name), rtol=1e-12, atol=1e-13)
            assert buffer.grad_fn is None
            assert not buffer.requires_grad
    other = TORCH[len(shape)](4, **settings).double()
    other.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_the_running_variance_is_unbiased_and_the_normalising_one_is_not(fused):
    """E15: batch {0, 2}: biased variance 1 (outputs ∓1), unbiased 2."""
    layer = BatchNorm(1, eps=1e-12, momentum=1.0, fused=fused)
    out = layer(torch.tensor([[0.0], [2.0]]))
    assert out.flatten().tolist() == [-1.0, 1.0]
    assert layer.running_mean.item() == 1.0
    assert layer.running_var.item() == 2.0
    assert layer.num_batches_tracked.item() == 1
    layer.eval()
    assert layer(torch.tensor([[1.0]])).item() == 0.0
    assert layer.num_batches_tracked.item() == 1
    layer.reset_running_stats()
    assert (layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()) == (0.0, 1.0, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_without_momentum_the_running_mean_is_the_average_over_batches(fused):
    layer = BatchNorm(2, momentum=None, fused=fused).double()
    batches = [draw(5, 2, 3, 3, seed=i) for i in range(7)]
    for batch in batches:
        layer(batch)
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)  # N·H·W − 1
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.running_var, variance, rtol=1e-13, atol=0)


def test_one_value_per_channel_is_refused_in_training_only():
    for fused in (False, True):
        layer = BatchNorm(3, fused=fused)
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(torch.zeros(1, 3))
        layer(torch.zeros(1, 3, 2, 1))
        assert layer.eval()(torch.zeros(1, 3)).shape == (1, 3)
        with pytest.raises(ValueError, match=r"expected \(N, 3, ...\)"):
            layer(torch.zeros(2, 4))


def test_the_functional_form_goes_through_torch_func():
    """Per-task gradients by vmap equal a loop: what meta-learning needs, where `F.batch_norm` under vmap is off."""
    tasks, weight, bias = draw(3, 8, 2, 4, 4), draw(2, seed=1), draw(2, seed=2)

    def loss(w, b, x):
        return (batch_norm(x, w, b)[0].tanh() ** 2).sum()

    together = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(None, None, 0))(weight, bias, tasks)
    for i, task in enumerate(tasks):
        leaves = [t.clone().requires_grad_() for t in (weight, bias, task)]
        y = torch.nn.functional.batch_norm(leaves[2], None, None, leaves[0], leaves[1], training=True)
        (y.tanh() ** 2).sum().backward()
        for mine, leaf in zip(together, leaves, strict=True):
            torch.testing.assert_close(mine[i], leaf.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_gradcheck(fused):
    torch.manual_seed(0)  # gradgradcheck draws
    layer = BatchNorm(2, track_running_stats=False, fused=fused).double()
    x = draw(3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("normalised", [True, False])
def test_twenty_sigmoid_layers_learn_only_with_batch_norm(normalised):
    """20 layers of 64 sigmoids on the bundled digits, 60 steps: measured 0.97 with, 0.10 without."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    layers, width = [], 64
    for _ in range(20):
        layers += [nn.Linear(width, 64), BatchNorm(64) if normalised else nn.Identity(), nn.Sigmoid()]
    net = initialise(nn.Sequential(*layers, nn.Linear(64, 10)), "glorot")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.randperm(len(x), generator=seeded(step))[:256]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    accuracy = (net(x).argmax(1) == y).double().mean().item()
    assert (accuracy > 0.8) if normalised else (accuracy < 0.2)


# ---------------------------------------------------------------------------------------------------- LayerNorm


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("fused", [False, True], ids=["moments", "kernel"])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True)])
def test_layer_norm_equals_torch_in_values_and_gradients(shape, fused, affine):
    """E63: γ and β are vectors of the normalised shape, and ε is there."""
    settings = {"eps": 1e-3, "elementwise_affine": affine[0], "bias": affine[1]}
    ours, theirs = LayerNorm(shape, fused=fused, **settings).double(), nn.LayerNorm(shape, **settings).double()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data = draw(*shape, seed=4)
        q.data = p.data.clone()
    mine = draw(2, 3, 4, 5).requires_grad_()
    other = mine.detach().clone().requires_grad_()
    weights = draw(2, 3, 4, 5, seed=5)
    for training in (True, False):
        y, expected = ours.train(training)(mine), theirs.train(training)(other)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-11)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm_ignores_each_examples_shift_and_scale_and_its_neighbours(fused):
    layer = LayerNorm(16, eps=0.0, fused=fused).double()
    x = draw(6, 16)
    scale, shift = torch.arange(1.0, 7)[:, None].double(), torch.arange(-3.0, 3)[:, None].double()
    torch.testing.assert_close(layer(scale * x + shift), layer(x), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-12, atol=1e-13)
    assert LayerNorm(4, fused=fused)(torch.full((2, 4), 3.0)).abs().max() == 0  # E63: ε saves a constant row
    with pytest.raises(ValueError, match=r"expected \(..., 16\), got shape \(2, 8\)"):
        layer(torch.zeros(2, 8).double())


def test_moments_and_normalise_are_the_common_factor():
    """Instance norm (style statistics) as one line over them, against torch."""
    x, scale, shift = draw(2, 3, 4, 5), draw(2, 3, 1, 1, seed=1), draw(2, 3, 1, 1, seed=2)
    expected = nn.functional.instance_norm(x) * scale + shift
    torch.testing.assert_close(normalise(x, moments(x, (2, 3)), 1e-5, scale, shift), expected, rtol=1e-11, atol=1e-12)
    assert isinstance(moments(x, (0,)), Moments)
    assert moments(x, (0, 2, 3)).variance.shape == (1, 3, 1, 1)
    torch.testing.assert_close(layer_norm(x, 2), nn.functional.layer_norm(x, (4, 5)), rtol=1e-11, atol=1e-12)
