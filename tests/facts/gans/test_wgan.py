"""The Wasserstein critic against SciPy's distance in one dimension, and what clipping holds."""

import sys
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import nn

import etude
from etude.blocks.nn.init import initialise
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.gans import wgan
from etude.gans.wgan import Config, build, clip, gap
from etude.optim import RMSProp, flatten

sys.path.insert(0, str(Path(__file__).parent))
import gan_oracle as oracle


def clipped_critic(real, fake, c=0.5, steps=500, layers=None):
    """A perceptron (or `layers`) trained by lines 4-6 on two fixed samples."""
    torch.manual_seed(0)
    f = nn.Sequential(*(layers or (nn.Linear(real.shape[1], 16), nn.ReLU(), nn.Linear(16, 1))), nn.Flatten(0))
    initialise(f, "he")
    w = flatten(f)
    optimizer = RMSProp([w], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-gap(f(real), f(fake))).backward()
        optimizer.step()
        clip(w, c)
        assert all(p.abs().max() <= c for p in f.parameters())
    return f


def test_gap_is_the_difference_of_means():
    assert gap(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])).item() == 1.5


@pytest.mark.parametrize("shift", [1.5, -3.0, 6.0])
def test_the_estimate_in_one_dimension(shift):  # E117, E119
    """A perceptron with slope at most K estimates between K·W/2 and K·W; a linear critic, the best for a shift, c·W."""
    g = torch.Generator().manual_seed(1)
    real, fake = torch.randn(400, 1, generator=g), shift + torch.randn(400, 1, generator=g)
    W = wasserstein_distance(real[:, 0].numpy(), fake[:, 0].numpy())
    f = clipped_critic(real, fake)
    xs = torch.linspace(-12, 12, 4001)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(f(xs).sum(), xs)
    K = slope.abs().max().item()
    estimate = gap(f(real), f(fake)).item()
    assert 0.5 * K * W < estimate <= K * W * (1 + 1e-4)  # Kantorovich-Rubinstein; measured 0.77, 0.60, 0.62 of K·W
    line = clipped_critic(real, fake, c=0.01, steps=50, layers=(nn.Linear(1, 1),))
    assert gap(line(real), line(fake)).item() == pytest.approx(0.01 * W, rel=2e-3)


def test_the_estimate_is_bounded_in_the_plane_too():
    """Against the optimal assignment of 200 points to 200 points, and an upper bound of the Lipschitz constant."""
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(200, 2, generator=g), 0.5 * torch.randn(200, 2, generator=g) + torch.tensor([2.0, -1.0])
    cost = torch.cdist(real, fake).numpy()
    rows, columns = linear_sum_assignment(cost)
    W = float(cost[rows, columns].mean())
    f = clipped_critic(real, fake)
    with torch.no_grad():
        K = (torch.linalg.svdvals(f[0].weight)[0] * torch.linalg.svdvals(f[2].weight)[0]).item()
        estimate = gap(f(real), f(fake)).item()
    assert 0 < estimate <= K * W
    (slope,) = torch.autograd.grad(f(real.requires_grad_()).sum(), real)
    assert estimate > 0.6 * slope.norm(dim=1).max().item() * W  # measured 0.79


def test_disjoint_samples_keep_a_slope():  # E118: where the best D of a GAN has none
    real, fake = torch.zeros(64, 1), torch.full((64, 1), 50.0)
    f = clipped_critic(real, fake, steps=100)
    fake.requires_grad_()
    (slope,) = torch.autograd.grad(-f(fake).mean(), fake)
    assert (slope > 1e-4).all()  # descending it moves every sample down, towards the data


@pytest.mark.parametrize("spec", [Spec((2,)), Spec((1, 16, 16), ("a", "b"), (0.5,), (0.2,))], ids=["points", "images"])
def test_clipping_reaches_every_parameter(spec):
    f = build(Config(width=8, size=16), spec)["critic"]
    w = flatten(f)
    with torch.no_grad():
        w.normal_(0, 1)
    clip(w, 0.01)
    assert all(p.abs().max() <= 0.01 for p in f.parameters())
    assert max(p.abs().max().item() for p in f.parameters()) == pytest.approx(0.01)


# ----------------------------------------------------------------------------------------------------- the whole run

TINY = {"steps": 4, "batch": 8, "width": 6}
DIGITS = {"data": "digits", "size": 16, "steps": 3, "batch": 6, "width": 3, "latent": 5, "learning_rate": 1e-3}
RUNS = {
    "ring": TINY | {"evaluate_every": 1},
    "one critic step": TINY | {"critic_steps": 1, "weight_clip": 0.5, "schedule": "cosine", "latent": 3},
    "digits": DIGITS | {"critic_steps": 2, "weight_clip": 0.02, "schedule": "constant", "evaluate_every": 1},
}


@pytest.mark.parametrize("case", RUNS)
def test_loop_is_the_plain_one(case, tmp_path, monkeypatch):
    config = wgan.Config(**RUNS[case])
    with oracle.small(monkeypatch):
        result = oracle.run("gans/wgan", tmp_path, RUNS[case])
        images, built = oracle.start(wgan, config)
        G = oracle.plain_generator(built["generator"], config)
        f = oracle.plain_critic(built["critic"], config, bias=False)
        G_rms, f_rms = (torch.optim.RMSprop(net.parameters()) for net in (G, f))
        seen = []
        for step in range(config.steps):
            torch.manual_seed(fold(oracle.SEED, step, 0, "step"))
            oracle.set_rate((G_rms, f_rms), config, step)
            samples = G(torch.randn(config.critic_steps * config.batch, config.latent)).detach()
            real = oracle.batches(images, config, step, config.critic_steps)
            for x, y in zip(real, samples.split(config.batch), strict=True):
                loss = f(x).mean().neg() + f(y).mean()
                f_rms.zero_grad()
                loss.backward()
                f_rms.step()
                with torch.no_grad():
                    for p in f.parameters():
                        p.clamp_(-config.weight_clip, config.weight_clip)
            G_loss = -f(G(torch.randn(config.batch, config.latent))).mean()
            G_rms.zero_grad()
            G_loss.backward()
            G_rms.step()
            seen.append((-loss.item(), G_loss.item()))
        oracle.agree(etude.load(result.folder), generator=G, critic=f)
        torch.testing.assert_close(oracle.logged(result.folder, "distance", "generator"), torch.tensor(seen).T)
        clipped = [(p.abs() == config.weight_clip).any() for p in f.parameters()]
        assert any(clipped), "no weight has come to the bound: the case shows nothing of clipping"


@pytest.mark.parametrize("case", ["ring", "digits"])
def test_reported_numbers_are_those_of_the_saved_state(case, tmp_path, monkeypatch):
    with oracle.small(monkeypatch):
        result = oracle.run("gans/wgan", tmp_path, RUNS[case])
        oracle.check_reported(wgan, result, critic="critic")
