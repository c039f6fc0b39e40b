"""What the GAN files share: the ring of Gaussians, the two players' networks, how samples are measured and shown

Paper: Radford, Metz, Chintala, DCGAN, 2015, arXiv:1511.06434 (networks for images); Heusel et al., 2017,
arXiv:1706.08500 (Fréchet distance between Gaussians fitted to features).

Equation: d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), μ and Σ the mean and covariance of features of a classifier.

Differences:
- The features are the 84 units before the output of *our own LeNet*, trained for 400 steps on the data at hand with a
  seed of its own, so that every run on the same data has the same judge. The number is therefore called
  `lenet_frechet_distance`: it can be compared between runs of etude, never with a published Inception FID.
- `modes` counts the modes of the ring or the classes of the images; one counts as covered when it gets at least a
  quarter of its fair share of the samples.
- E114 (notes 8.6.4.1): the transposed-convolution networks are DCGAN's; the paper of 2014 had multi-layer perceptrons,
  and `SmallGAN` is the name of neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude import optim
from etude.blocks import plots
from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm
from etude.core.checkpoint import Box
from etude.core.config import Count, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Stream

MODES, RADIUS, SIGMA = 8, 2.0, 0.05
JUDGE_SIZE, JUDGE_STEPS, JUDGE_BATCH = 32, 400, 128
ENOUGH = 0.25  # of the fair share


# ---------------------------------------------------------------------------------------------------------- the ring


def centres() -> Tensor:
    """(8, 2) the modes: evenly on a circle of radius 2, the first at (2, 0)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def ring(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 2) float32 draws of the mixture of eight Gaussians of deviation 0.05 on the ring."""
    which = torch.randint(MODES, (count,), generator=generator)
    return centres()[which] + SIGMA * torch.randn(count, 2, generator=generator)


def ring_scores(samples: Tensor) -> dict[str, float]:
    """Of samples (N, 2): `modes`, how many of the eight get at least N/32 of them within 3σ, and `share`, the share of
    all within 3σ of any mode. The mixture itself has 8 and 1 − e^−4.5 = 0.989."""
    near, which = torch.cdist(samples.float().cpu(), centres()).min(1)
    inside = torch.bincount(which[near <= 3 * SIGMA], minlength=MODES)
    covered = inside >= ENOUGH * len(samples) / MODES
    return {"modes": float(covered.sum()), "share": int(inside.sum()) / len(samples)}


# -------------------------------------------------------------------------------------------------------- the players


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of `width` ReLU units, for points in the plane; He initialisation."""
    layers = (nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    return initialise(nn.Sequential(*layers), "he")  # type: ignore[return-value]


class Generator(nn.Module):
    """DCGAN's: noise (N, latent) → images (N, channels, size, size) in [−1, 1] by transposed convolutions.

    4×4 pixels of width·size/8 maps, then half the maps and twice the side a layer; batch norm (ε 1e-5, momentum 0.1)
    and ReLU between, tanh at the end. `size` is 8, 16, 32, 64, … The layers and their names are those of the published
    PyTorch layout: size 64, width 64, latent 100 and 3 channels make 3,576,704 parameters.
    """

    def __init__(self, channels: int, size: int, latent: int, width: int) -> None:
        super().__init__()
        maps = width * _doublings(size)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, maps, 4, 1, 0, bias=False), BatchNorm(maps), nn.ReLU()]
        while maps > width:
            layers += [nn.ConvTranspose2d(maps, maps // 2, 4, 2, 1, bias=False), BatchNorm(maps // 2), nn.ReLU()]
            maps //= 2
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh())
        dcgan_init(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class Critic(nn.Module):
    """DCGAN's discriminator without the sigmoid: images (N, channels, size, size) in [−1, 1] → scores (N,).

    Strided convolutions halve the side and double the maps, LeakyReLU(0.2) between, down to 4×4, then one number.
    `norm`: ``batch`` as published (none after the first layer; 2,765,568 parameters for size 64, width 64 and 3
    channels), ``layer`` (over C, H, W of each image) or ``none``, the only two that treat every image by itself.
    """

    def __init__(self, channels: int, size: int, width: int, norm: Literal["batch", "layer", "none"] = "batch") -> None:
        super().__init__()
        maps, last = width, width * _doublings(size)
        layers: list[nn.Module] = [nn.Conv2d(channels, maps, 4, 2, 1, bias=norm != "batch"), nn.LeakyReLU(0.2)]
        while maps < last:
            maps *= 2
            layers.append(nn.Conv2d(maps // 2, maps, 4, 2, 1, bias=norm == "none"))
            if norm != "none":
                layers.append(BatchNorm(maps) if norm == "batch" else nn.GroupNorm(1, maps))
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, nn.Conv2d(maps, 1, 4, 1, 0, bias=False))
        dcgan_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


class PointCritic(nn.Module):
    """Points (N, 2) → scores (N,): two hidden layers of ReLU units, nothing that ties the points of a batch.

    A difference of two mean scores does not feel the last `bias`, so the Wasserstein critics have none.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.main = mlp(2, width, 1)
        if not bias:
            self.main[-1].bias = None  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


def players(
    spec: Spec, latent: int, width: int, norm: Literal["batch", "layer", "none"], bias: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Generator and critic for this data: perceptrons for points, DCGAN's networks for images."""
    if spec.shape == (2,):
        return mlp(latent, width, 2), PointCritic(width, bias)
    channels, size, _ = spec.shape
    return Generator(channels, size, latent, width), Critic(channels, size, width, norm)


@torch.no_grad()
def dcgan_init(module: nn.Module) -> None:
    """Weights of convolutions N(0, 0.02²), scales of the norms N(1, 0.02²), biases 0 (the paper's section 3)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.normal_(0.0, 0.02)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, (BatchNorm, nn.GroupNorm)):
            assert layer.weight is not None
            assert layer.bias is not None
            layer.weight.normal_(1.0, 0.02)
            layer.bias.zero_()


def _doublings(size: int) -> int:
    """How many times as many maps the 4×4 layer has as the one next to the image: size / 8."""
    if size < 8 or size & (size - 1):
        raise UserError(f"--size {size} cannot be reached by doubling 4 pixels; take 8, 16, 32, 64, …")
    return size // 8


# ---------------------------------------------------------------------------------------------------------- the judge


def frechet(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Fréchet distance between N(μ₁, Σ₁) and N(μ₂, Σ₂), from float64 means (d,) and covariances (d, d).

    (Σ₁Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric, so eigenvalues of symmetric matrices suffice.
    """
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    total = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return max(total.item(), 0.0)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), float64, of features (N, d)."""
    features = features.double()
    return features.mean(0), features.T.cov()


@torch.no_grad()
def judgement(judge: nn.Module, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """What our LeNet sees in images (N, C, H, W), uint8 or float in [0, 1]: features (N, 84) and classes (N,)."""
    seen = []
    for part in images.split(batch):
        x = judge.features(judge.standardise(_judge_size(part)))  # type: ignore[operator]
        seen.append(judge.classifier[:-1](x))  # type: ignore[index]
    features = torch.cat(seen)
    return features.cpu(), judge.classifier[-1](features).argmax(1).cpu()  # type: ignore[index]


def _judge_size(images: Tensor) -> Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if images.shape[-1] == JUDGE_SIZE:
        return images
    return F.interpolate(images, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=images.shape[-1] > JUDGE_SIZE)


def teach(judge: nn.Module, x: Tensor, y: Tensor, device: torch.device, steps: int) -> None:
    """Train our LeNet on images (N, C, H, W) uint8 and classes (N,); the same result for every seed of the run."""
    initialise(judge, "he", generator=None if device.type != "cpu" else torch.Generator().manual_seed(0))
    optimizer = optim.make("adam", judge.parameters(), lr=3e-3)
    rate, stream = optim.schedule("one_cycle", 3e-3, steps), Stream(len(y), JUDGE_BATCH, seed=0)
    judge.train().requires_grad_(True)
    for step in range(steps):
        optim.set_lr(optimizer, rate(step))
        index = stream.indices(step)
        loss = F.cross_entropy(judge(_judge_size(x[index].to(device))), y[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- the data


class RingStage:
    """The ring as the loops see it: batches, scores of a generator, a picture."""

    spec = Spec(shape=(2,), extra={"data": "ring"})

    def __init__(self, run: Run, count: int = 4000) -> None:
        self.run, self.count = run, count

    def real(self, step: int, count: int) -> Tensor:
        """(count, 2), a function of (seed, step, rank)."""
        return ring(count, self.run.generator("ring", step)).to(self.run.device)

    def begin(self, generator: nn.Module, latent: int, judge: nn.Module | None) -> None:
        """Fix the noise of all measurements, and look at the generator before its first step."""
        self.z = torch.randn(self.count, latent, generator=self.run.generator("measure")).to(self.run.device)
        self.held = Box(first=0.0)
        self.run.track(judged=self.held)
        if self.held.first == 0.0:
            self.held.first = self.measure(generator)["frechet_distance"]
            self.look(generator, 0)

    def look(self, generator: nn.Module, step: int) -> dict[str, float]:
        """Score the generator after `step` updates, log the scores and keep a picture."""
        samples = drawn(generator, self.z)
        scores = self._scores(samples)
        self.run.log(**scores)
        self.run.artifact("samples", scatter(samples[:1000]), "Points of one fixed noise, and of the ring.", step)
        return scores

    def measure(self, generator: nn.Module) -> dict[str, float]:
        """The scores alone."""
        return self._scores(drawn(generator, self.z))

    def _scores(self, samples: Tensor) -> dict[str, float]:
        """`modes` and `share`, and the Fréchet distance of the points themselves, which sees two moments only."""
        variance = RADIUS**2 / 2 + SIGMA**2  # of the ring, in every direction; its mean is 0
        distance = frechet(torch.zeros(2).double(), variance * torch.eye(2).double(), *gaussian(samples))
        ratio = distance / (self.held.first or distance or 1.0)
        return ring_scores(samples) | {"frechet_distance": distance, "frechet_ratio": ratio}


class ImageStage:
    """Images as the loops see them: batches in [−1, 1], scores of a generator by our LeNet, a grid."""

    def __init__(self, run: Run, name: str, size: int, count: int = 2000, most: int = 10_000) -> None:
        self.run, self.count, self.most = run, count, most
        self.data = room.images(name, size)
        self.spec = self.data.spec
        self.stream: Stream | None = None
        run.use_threads(None)  # convolutions, unlike the ring's perceptrons

    def real(self, step: int, count: int) -> Tensor:
        """(count, C, H, W) in [−1, 1]: the images of `step`, every image once an epoch."""
        if self.stream is None or self.stream.batch != count:
            self.stream = Stream(len(self.data.train.y), count, self.run.seed, self.run.rank, self.run.world)
        x = self.data.train.x[self.stream.indices(step)].to(self.run.device)
        return x.float().div_(127.5).sub_(1)

    def begin(self, generator: nn.Module, latent: int, judge: nn.Module | None) -> None:
        """Teach the judge, fit the Gaussian of the real images, and measure the generator before its first step.

        All of it is tracked, so a resumed run neither teaches nor measures again.
        """
        assert judge is not None
        self.judge, run = judge.eval().requires_grad_(False), self.run
        width = judge.classifier[-1].in_features  # type: ignore[index, union-attr]
        self.held = Box(
            taught=False, first=0.0, mean=torch.zeros(width).double(), covariance=torch.zeros(width, width).double()
        )
        run.track(judge=judge, judged=self.held)
        self.z = torch.randn(self.count, latent, generator=run.generator("measure")).to(run.device)
        self.fair = torch.bincount(self.data.train.y, minlength=len(self.spec.classes)) / len(self.data.train.y)
        if self.held.taught:
            return
        train, test = self.data.train, self.data.test
        teach(judge, train.x, train.y, run.device, JUDGE_STEPS)
        seen, classes = judgement(judge, test.x[: self.most].to(run.device))
        accuracy = (classes == test.y[: self.most]).double().mean().item()
        real, _ = judgement(judge, train.x[: self.most].to(run.device))
        self.held.mean, self.held.covariance = gaussian(real)
        floor = frechet(self.held.mean, self.held.covariance, *gaussian(seen))
        run.say(f"judge: LeNet, test accuracy {accuracy:.4f}; Fréchet distance of training and test images {floor:.3g}")
        run.log(judge_accuracy=accuracy, lenet_frechet_floor=floor)
        self.held.first = self.measure(generator)["lenet_frechet_distance"]
        self.held.taught = True
        self.look(generator, 0)

    def look(self, generator: nn.Module, step: int) -> dict[str, float]:
        """Score the generator after `step` updates, log the scores and keep a grid of its first 64 images."""
        images = unit(drawn(generator, self.z))
        scores = self._scores(images)
        self.run.log(**scores)
        self.run.artifact("samples", plots.grid(images[:64]), "Images of one fixed noise.", step)
        return scores

    def measure(self, generator: nn.Module) -> dict[str, float]:
        """The scores alone."""
        return self._scores(unit(drawn(generator, self.z)))

    def _scores(self, images: Tensor) -> dict[str, float]:
        features, classes = judgement(self.judge, images.to(self.run.device))
        distance = frechet(self.held.mean, self.held.covariance, *gaussian(features))
        shares = torch.bincount(classes, minlength=len(self.fair)) / len(classes)
        return {
            "lenet_frechet_distance": distance,
            "frechet_ratio": distance / (self.held.first or distance or 1.0),  # to the untrained generator's
            "modes": float((shares >= ENOUGH * self.fair).sum()),
        }


@torch.no_grad()
def drawn(generator: nn.Module, z: Tensor) -> Tensor:
    """Samples (N, …) of noise (N, latent), on the CPU, by the running batch statistics; then training mode again."""
    generator.eval()
    samples = torch.cat([generator(part) for part in z.split(500)]).cpu()
    generator.train()
    return samples


def stage(run: Run, data: str, size: int) -> RingStage | ImageStage:
    """`ring`, or a dataset of images or a folder of class-named image folders resized to size × size."""
    return RingStage(run) if data == "ring" else ImageStage(run, data, size)


def unit(images: Tensor) -> Tensor:
    """[−1, 1] → [0, 1]."""
    return (images + 1) / 2


# -------------------------------------------------------------------------------------------------------- the pictures


def scatter(samples: Tensor) -> Figure:
    """Generated points (N, 2) over as many real ones, in a window that holds the ring."""
    figure = Figure(figsize=(3.6, 3.6), dpi=100, facecolor=plots.PAPER, layout="constrained")
    axes = figure.add_subplot()
    real = ring(len(samples), torch.Generator().manual_seed(0))
    for points, colour, name in ((real, plots.PALETTE[7], "real"), (samples, plots.PALETTE[1], "generated")):
        axes.plot(*points.T.cpu().numpy(), ".", color=colour, markersize=2, alpha=0.5, label=name)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    axes.set_axis_off()
    axes.legend(loc="center", frameon=False, fontsize=8, markerscale=4)
    return figure


@dataclass(frozen=True)
class Sample:
    """Settings of `etude sample`."""

    count: Count = 64
    """Samples to draw."""
    seed: Whole = 0
    """Seed of the noise."""


@torch.no_grad()
def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Draw from the generator: a grid of images, or points over the ring, in ``samples.png``; say what is on it."""
    noise = torch.Generator().manual_seed(options.seed)
    samples = drawn(loaded.modules["generator"], torch.randn(options.count, loaded.config.latent, generator=noise))
    said = f"{options.count} samples after {loaded.step} steps: "
    if loaded.spec.shape == (2,):
        scatter(samples).savefig(folder / "samples.png", dpi=144)
        scores = ring_scores(samples)
        said += f"{scores['modes']:.0f} of {MODES} modes covered, {scores['share']:.1%} within 3σ"
        return f"{said}\n{folder}/samples.png"
    images = unit(samples)
    plots.grid(images).save(folder / "samples.png")
    _, classes = judgement(loaded.modules["judge"], images)
    names = loaded.spec.classes
    counts = torch.bincount(classes, minlength=len(names)).tolist()
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    return f"{said}our LeNet takes them for {shown}\n{folder}/samples.png"
