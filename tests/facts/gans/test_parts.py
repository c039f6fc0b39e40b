"""The shared parts of the GAN room against SciPy, the published DCGAN layout and hand-made samples."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from etude.blocks.nn.norm import BatchNorm
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.gans.parts.judge import frechet, gaussian, judgement, teach
from etude.gans.parts.networks import Critic, Generator, PointCritic, players
from etude.gans.parts.ring import centres, moments, ring, ring_scores
from etude.vision.lenet import LeNet


def published_generator(nz=100, ngf=64, nc=3):
    """The generator of the DCGAN tutorial of PyTorch, written out."""
    return nn.Sequential(
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(),
        nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(),
        nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def published_discriminator(ndf=64, nc=3):
    return nn.Sequential(
        nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 2), nn.LeakyReLU(0.2),
        nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 4), nn.LeakyReLU(0.2),
        nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 8), nn.LeakyReLU(0.2),
        nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "count", "inputs"),
    [
        (lambda: Generator(3, 64, 100, 64), published_generator, 3_576_704, (2, 100)),
        (lambda: Critic(3, 64, 64), published_discriminator, 2_765_568, (2, 3, 64, 64)),
    ],
)
def test_parity_with_the_published_layout(ours, theirs, count, inputs):  # E114
    torch.manual_seed(0)
    mine, other = ours(), theirs()
    assert sum(p.numel() for p in mine.parameters()) == count
    other.load_state_dict({name.removeprefix("main."): value for name, value in mine.state_dict().items()})
    x = torch.randn(inputs)
    expected = other(x[:, :, None, None] if x.ndim == 2 else x)
    torch.testing.assert_close(mine(x), expected.view_as(mine(x)), rtol=1e-4, atol=1e-5)
    assert mine(x).shape == ((2, 3, 64, 64) if x.ndim == 2 else (2,))


@pytest.mark.parametrize("module", [Generator(1, 32, 64, 32), Critic(1, 32, 32)])
def test_every_batch_norm_has_the_published_eps_and_momentum(module):
    norms = [layer for layer in module.modules() if isinstance(layer, (BatchNorm, nn.modules.batchnorm._BatchNorm))]
    assert len(norms) == (3 if isinstance(module, Generator) else 2)
    assert all((layer.eps, layer.momentum) == (1e-5, 0.1) for layer in norms)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_shapes_range_and_initial_weights(size):
    torch.manual_seed(0)
    generator, critic = players(Spec(shape=(3, size, size)), 64, 32, "batch")
    images = generator(torch.randn(4, 64))
    assert images.shape == (4, 3, size, size)
    assert images.abs().max() <= 1
    assert critic(images).shape == (4,)
    weights = torch.cat([p.detach().flatten() for p in critic.parameters() if p.ndim == 4])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_size_that_doubling_cannot_reach_is_refused():
    with pytest.raises(UserError, match="28"):
        Generator(1, 28, 16, 16)


@pytest.mark.parametrize(
    "critic", [Critic(1, 32, 8, "none"), Critic(1, 32, 8, "layer"), PointCritic(8)], ids=["none", "layer", "points"]
)
def test_a_critic_without_batch_norm_scores_each_sample_by_itself(critic):
    assert not any(isinstance(m, (BatchNorm, nn.modules.batchnorm._BatchNorm)) for m in critic.modules())
    x = torch.randn(4, 2) if isinstance(critic, PointCritic) else torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(critic(x)[:2], critic(torch.cat([x[:2], 5 * x[2:]]))[:2])
    with_norm = Critic(1, 32, 8, "batch")
    y = torch.randn(4, 1, 32, 32)
    assert not torch.allclose(with_norm(y)[:2], with_norm(torch.cat([y[:2], 5 * y[2:]]))[:2])


def test_frechet_against_scipys_matrix_square_root():
    rng = np.random.default_rng(0)
    for d, n in ((3, 50), (20, 200), (12, 8)):  # the last has covariances of less than full rank
        a, b = rng.normal(size=(n, d)), rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 0.3
        means, covariances = zip(*(gaussian(torch.from_numpy(x)) for x in (a, b)))
        np.testing.assert_allclose(covariances[0].numpy(), np.cov(a.T), rtol=1e-12, atol=1e-14)
        s1, s2 = np.cov(a.T), np.cov(b.T)
        root = linalg.sqrtm(s1 @ s2 + (1e-13 * np.eye(d) if n < d else 0)).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
        assert frechet(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected, rel=1e-5)


def test_frechet_closed_forms():
    eye, zero = torch.eye(4).double(), torch.zeros(4).double()
    assert frechet(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet(zero, eye, zero + 3, eye) == pytest.approx(36)
    assert frechet(zero, 4 * eye, zero, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)
    assert frechet(zero, 0 * eye, zero + 1, 0 * eye) == pytest.approx(4)


def test_ring_has_the_stated_moments():
    x = ring(80_000, torch.Generator().manual_seed(0))
    which = torch.cdist(x, centres()).argmin(1)
    assert torch.bincount(which).float().div(80_000).sub(1 / 8).abs().max() < 0.01
    offsets = x - centres()[which]
    assert offsets.std().item() == pytest.approx(0.05, rel=0.01)
    torch.testing.assert_close(centres().norm(dim=1), torch.full((8,), 2.0))
    for ours, seen in zip(moments(), gaussian(x)):
        torch.testing.assert_close(ours, seen, atol=0.03, rtol=0)
    scores = ring_scores(x)
    assert scores["modes"] == 8
    assert scores["share"] == pytest.approx(1 - math.exp(-4.5), abs=2e-3)
    assert torch.equal(ring(10, torch.Generator().manual_seed(3)), ring(10, torch.Generator().manual_seed(3)))


def test_ring_scores_count_only_what_is_near_and_enough():
    c = centres()
    assert ring_scores(c.repeat(10, 1)) == {"modes": 8.0, "share": 1.0}
    assert ring_scores(c[:3].repeat(10, 1)) == {"modes": 3.0, "share": 1.0}
    assert ring_scores(torch.zeros(10, 2)) == {"modes": 0.0, "share": 0.0}
    assert ring_scores(c * (1 + 0.16 / 2)) == {"modes": 0.0, "share": 0.0}  # just outside 3σ
    assert ring_scores(c * (1 + 0.14 / 2)) == {"modes": 8.0, "share": 1.0}
    few = torch.cat([c[:1].repeat(97, 1), c[1:2].repeat(3, 1)])  # 3 of 100 are less than 100/32
    assert ring_scores(few)["modes"] == 1
    assert ring_scores(torch.cat([few, c[1:2].repeat(1, 1)]))["modes"] == 2


def test_judge_is_taught_alike_for_every_seed_and_knows_digits():
    from etude import data

    digits = data.images("digits", 32)
    judges = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        judge = LeNet(10, digits.spec.mean, digits.spec.std, size=32)
        teach(judge, digits.train.x, digits.train.y, torch.device("cpu"), steps=40)
        judges.append(judge)
    for a, b in zip(*(judge.parameters() for judge in judges)):
        assert torch.equal(a, b)
        assert not a.requires_grad
    features, classes = judgement(judges[0], digits.test.x)
    assert features.shape == (360, 84)
    assert (features >= 0).all()
    assert (classes == digits.test.y).double().mean() > 0.85  # measured 0.92
    again, _ = judgement(judges[0], digits.test.x.float() / 255)
    torch.testing.assert_close(again, features)
    real, half = gaussian(features), gaussian(features[:180])
    noise = gaussian(judgement(judges[0], torch.rand(360, 1, 32, 32))[0])
    assert frechet(*real, *half) < 0.1 * frechet(*real, *noise)
