"""GAN: a generator learns to fool a discriminator, which learns to see through it

Paper: Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio, Generative Adversarial Networks,
    2014, arXiv:1406.2661. Mao et al., Least Squares GAN, 2016, arXiv:1611.04076. Instance noise: Sønderby et al., 2016,
    arXiv:1610.04490; Arjovsky & Bottou, 2017, arXiv:1701.04862. Networks for images: Radford et al., DCGAN, 2015,
    arXiv:1511.06434.

Equation: min_G max_D V(D, G) = E_x log D(x) + E_z log(1 − D(G(z))), with D = sigmoid(a) of a score a. So
    D descends  E ρ(a(x)) + E φ(a(G(z)))   and   G descends  E γ(a(G(z))):
                            ρ                 φ                     γ
        minimax             −log D            −log(1 − D)           log(1 − D)
        non_saturating      −log D            −log(1 − D)           −log D
        least_squares       ½(a − 1)²         ½a²                   ½(a − 1)²
        pearson             ½(a − 1)²         ½(a + 1)²             ½a²
    For data of density p and samples of density q the best D is p/(p + q); for it V = 2·JSD(p, q) − log 4.

Algorithm: (the paper's, with k = `discriminator_steps`)
1. for each step:
2.     k times: take m real images x and noise z; blur x and G(z) by N(0, σ²), if instance noise is on
3.              update D by descending  mean ρ(a(x)) + mean φ(a(G(z)))
4.     take m new z; update G by descending  mean γ(a(G(z))), G(z) blurred as in line 2; D stays as it is

Differences:
- Losses are written on the score: −log sigmoid(a) = softplus(−a), so no logarithm of a rounded 0 appears.
- The paper's G descends log(1 − D), whose slope in a is −D → 0 where D wins; `non_saturating` (default; also the
  paper's, end of section 3) has −(1 − D) → −1 there. Optimizer: Adam, its rate falling linearly on the ring; the
  paper uses momentum.
- E112 (notes 8.6.3): the condition on D* is pointwise, p/D − q/(1 − D) = 0; as a difference of expectations it is
  one number and fixes nothing.
- E113: V(D*, G) = 2·JSD − log 4, not JSD. Its least value is −1.386294, and with disjoint supports it is 0.
- E114: for images, DCGAN's strided and transposed convolutions with batch norm; real and generated images pass
  through D as two batches, so neither is normalised by the other's statistics.
- Instance noise blurs real *and* generated samples in both players' steps; σ falls linearly to 0 (`noise_until`).
  Where the supports are apart, the best D is 1 on data and 0 on samples and minimax leaves G no slope; blurred, the
  divergence falls smoothly with the distance. So minimax against a D of five steps needs it (second line of Expect).
- Curves are scored on noise of their own and, for images, against validation images; the returned `test_…` numbers use
  other noise and the test images, once. The judge of images is a LeNet taught on the training split.

Expect: ring, one thread, 3 to 10 s: 7, 8, 8 modes of 8 and 0.90, 0.90, 0.93 of the samples within 3σ (seeds 0-2).
    Minimax with `--discriminator-steps 5`, 1,500 steps: 8, 8, 8 modes; without instance noise 2, 2, 0. Least squares:
    8, 8, 8 modes; without it 5, 6, 6. MNIST, two threads, 50 s: 9 classes of 10, Fréchet ratio (to the untrained
    generator's distance) 0.066 on the test images (seed 0).
Command: `etude run gans/gan`, `etude run gans/gan --preset mnist`, then `etude sample gans/gan --count 64`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from etude import optim
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Probability, Whole
from etude.core.run import Run
from etude.core.spec import Spec
from etude.gans.parts.draw import Sample as Sample  # this and `sample`: for `etude sample`
from etude.gans.parts.draw import sample as sample
from etude.gans.parts.networks import players
from etude.gans.parts.stages import stage
from etude.vision.lenet import LeNet


@dataclass(frozen=True)
class Config:
    data: str = "ring"
    """ring (eight Gaussians in the plane), a dataset (digits, mnist, …) or a folder of class-named image folders."""
    objective: Literal["non_saturating", "minimax", "least_squares", "pearson"] = "non_saturating"
    """The losses of the two players."""
    instance_noise: NonNegative = 0.5
    """Deviation σ of the noise added to real and generated samples at the start (0: none)."""
    noise_until: Probability = 0.5
    """Share of the steps after which σ has fallen to 0."""
    steps: Count = 3000
    """Number of updates of the generator."""
    discriminator_steps: Few = 1
    """Updates of the discriminator before each of the generator (the paper's k)."""
    batch: Count = 128
    """Samples of each kind in a mini-batch (of each rank)."""
    latent: Count = 2
    """Dimensions of the noise z ~ N(0, I)."""
    width: Count = 64
    """Hidden units (ring), or maps next to the image, doubled towards 4×4 (images)."""
    size: Count = 32
    """Side of the images in pixels: 8, 16, 32, 64, …"""
    learning_rate: Positive = 4e-3
    """Adam's learning rate at the start, of both players; DCGAN uses 2e-4 for images."""
    schedule: optim.Schedule = "linear"
    """Learning rate over the run; linear falls to 0, so that the players come to rest."""
    beta1: Fraction = 0.5
    """Adam's decay of the gradient's mean."""
    beta2: Fraction = 0.999
    """Adam's decay of the gradient's square."""
    evaluate_every: Whole = 500
    """Steps between measurements and pictures (0: only at the end)."""


IMAGES = {"instance_noise": 0.0, "batch": 64, "latent": 64, "width": 32, "learning_rate": 2e-4, "schedule": "constant"}

PRESETS = {
    "tiny": Config(steps=20, batch=32, width=32),
    "default": Config(),  # 10 s → 7-8 modes, 0.92
    "digits": Config(data="digits", size=16, steps=1000, evaluate_every=250, **IMAGES),
    "mnist": Config(data="mnist", steps=1000, evaluate_every=100, **IMAGES),  # 50 s → Fréchet ratio 0.066
}

SETTINGS = {
    "data": {"data": "digits", "size": 16, "width": 4},
    "size": {"size": 16, "data": "digits", "width": 4},
    "evaluate_every": 5,
}

UNTRAINED = Control("one update", flags={"steps": 1})

EXPERIMENTS = (
    Experiment(
        "ring", preset="default", metric="test_modes", bar=7, notes="of 8; covered: 1/32 of the samples within 3σ",
        controls=(UNTRAINED,),
    ),
    Experiment(
        "ring, share", preset="default", metric="test_share", bar=0.886, notes="within 3σ; the data has 0.989",
        controls=(Control("the noise never falls", swap={"anneal": "etude.gans.parts.nulls.never_falls"}),),
    ),
    Experiment(
        "ring, a discriminator that wins", preset="default", metric="test_modes", bar=7,
        flags={"objective": "minimax", "discriminator_steps": 5, "steps": 1500},
        notes="instance noise keeps a slope where the supports of data and samples are apart",
        controls=(Control("no instance noise", flags={"instance_noise": 0.0}),),
    ),
    Experiment(
        "ring, least squares", preset="default", metric="test_modes", bar=7, flags={"objective": "least_squares"},
        controls=(Control("no instance noise", flags={"instance_noise": 0.0}),),
    ),
    Experiment(
        "mnist", preset="mnist", metric="test_frechet_ratio", bar=0.069, better="lower", within_seconds=300,
        controls=(UNTRAINED,),
    ),
    Experiment("mnist, classes", preset="mnist", metric="test_modes", bar=9, within_seconds=300, controls=(UNTRAINED,)),
)  # fmt: skip


class Objective(NamedTuple):
    """Three losses of scores: D descends `real` on data and `fake` on samples, G descends `generator` on samples."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def minus_log(a: Tensor) -> Tensor:
    """−log D of scores a, for D = sigmoid(a); slope −(1 − D)."""
    return softplus(-a)


def minus_log_not(a: Tensor) -> Tensor:
    """−log(1 − D); slope D."""
    return softplus(a)


def log_not(a: Tensor) -> Tensor:
    """log(1 − D); slope −D, which vanishes where D sees through the sample."""
    return -softplus(a)


def half_square(target: float) -> Callable[[Tensor], Tensor]:
    """½(a − target)²."""
    return lambda a: 0.5 * (a - target).square()


def least_squares(fake: float, real: float, wanted: float) -> Objective:
    """The paper's labels a, b, c: of samples, of data, and what G wants D to answer on samples."""
    return Objective(half_square(real), half_square(fake), half_square(wanted))


OBJECTIVES = {
    "minimax": Objective(minus_log, minus_log_not, log_not),
    "non_saturating": Objective(minus_log, minus_log_not, minus_log),
    "least_squares": least_squares(0.0, 1.0, 1.0),
    "pearson": least_squares(-1.0, 1.0, 0.0),  # b − c = 1 and b − a = 2: half of Pearson's χ² for the best D
}


def blur(x: Tensor, sigma: float) -> Tensor:
    """x + N(0, σ²), element by element; x itself for σ = 0."""
    return x + sigma * torch.randn_like(x) if sigma > 0 else x


def anneal(sigma: float, step: int, until: float) -> float:
    """σ at `step`: linear from `sigma` to 0 at step `until`."""
    return sigma * max(1 - step / until, 0.0) if until > 0 else 0.0


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """Generator, discriminator and, for images, the LeNet that judges them."""
    generator, discriminator = players(spec, config.latent, config.width, normalizer="batch", bias=True)
    modules: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
    if spec.classes:
        modules["judge"] = LeNet(len(spec.classes), spec.mean, spec.std, size=32)
    return modules


@method("gans/gan", paper="arXiv:1406.2661", section="8.6.1-8.6.4.1, 8.6.5.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = stage(run, config.data, config.size)
    run.describe(data.spec, data)
    modules = {name: run.place(module) for name, module in build(config, data.spec).items()}
    G, D = modules["generator"], modules["discriminator"]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    G_optimizer, D_optimizer = optim.Adam([optim.flatten(G)], **settings), optim.Adam([optim.flatten(D)], **settings)
    run.track(generator=G, discriminator=D, generator_optimizer=G_optimizer, discriminator_optimizer=D_optimizer)
    rate = optim.schedule(config.schedule, config.learning_rate, config.steps)
    data.begin(G, config.latent, modules.get("judge"))

    loss, m, k = OBJECTIVES[config.objective], config.batch, config.discriminator_steps
    for step in run.steps(config.steps):
        for optimizer in (G_optimizer, D_optimizer):
            optim.set_lr(optimizer, rate(step))
        sigma = anneal(config.instance_noise, step, config.noise_until * config.steps)
        for x in data.real(step, k * m).split(m):
            z = torch.randn(m, config.latent, device=run.device)
            with run.autocast():
                with torch.no_grad():
                    samples = G(z)
                a_real, a_fake = D(blur(x, sigma)), D(blur(samples, sigma))  # line 2: two batches
            D_loss = loss.real(a_real.to(z)).mean() + loss.fake(a_fake.to(z)).mean()
            D_optimizer.zero_grad()
            D_loss.backward()
            run.average(D, discriminator=D_loss)
            D_optimizer.step()  # line 3
        z = torch.randn(m, config.latent, device=run.device)
        with run.autocast():
            a = D(blur(G(z), sigma))
        G_loss = loss.generator(a.to(z)).mean()
        G_optimizer.zero_grad()
        G_loss.backward(inputs=list(G.parameters()))  # D stays as it is
        run.average(G, generator=G_loss)
        G_optimizer.step()  # line 4
        run.log(discriminator=D_loss, generator=G_loss)
        if run.every(config.evaluate_every):
            data.look(G, step + 1)
    return data.score(G)
