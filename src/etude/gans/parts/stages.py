"""What a generator plays on: the ring, or images. Each gives the loop its batches, looks at it, and scores it at the end

Curves (`validation_…`) use one fixed noise and, for images, the validation split; the returned numbers (`test_…`) use
another noise and the test split, which nothing has looked at before. `…modes` counts the modes of the ring or the
classes of the images; one counts as covered when it gets at least a quarter of its fair share of the samples.
`…frechet_ratio` is the Fréchet distance as a share of the untrained generator's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude import data as room
from etude.blocks.pictures import plots
from etude.core.checkpoint import Box
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data import Split
from etude.data.batches import Stream
from etude.gans.parts import judge as judging
from etude.gans.parts.draw import SHOWN, drawn, scatter, unit
from etude.gans.parts.judge import frechet, gaussian, judgement
from etude.gans.parts.networks import doublings
from etude.gans.parts.ring import ENOUGH, moments, ring, ring_scores
from etude.gans.parts.transport import wasserstein

POINTS, IMAGES, PAIRS = 4000, 2000, 1000
"""Samples that a generator of points, or of images, is scored by; points for an exact distance."""
MOST = 10_000
"""Real images that the judge looks at in a split."""


class RingStage:
    """The ring as the loops see it."""

    spec = Spec(shape=(2,), extra={"data": "ring"})

    def __init__(self, run: Run) -> None:
        self.run = run

    def about(self) -> dict[str, Any]:
        """What a report says of the data."""
        return {"name": "ring", "source": "eight Gaussians on a circle, drawn anew for every batch"}

    def real(self, step: int, count: int) -> Tensor:
        """(count, 2), a function of (seed, step, rank)."""
        return ring(count, self.run.generator("ring", step)).to(self.run.device)

    def begin(self, generator: nn.Module, latent: int, judge: nn.Module | None) -> None:
        """Fix the noise of all measurements, and look at the generator before its first step."""
        self.z = noise(self.run, "validation", POINTS, latent)
        self.fresh = noise(self.run, "test", POINTS, latent)
        self.held = Box(first=0.0)
        self.run.track(judged=self.held)
        if self.held.first == 0.0:
            self.held.first = frechet(*moments(), *gaussian(drawn(generator, self.z)))
            self.look(generator, 0)

    def look(self, generator: nn.Module, step: int) -> None:
        """Score the generator after `step` updates, log the scores and keep a picture."""
        samples = drawn(generator, self.z)
        self.run.log(**named("validation_", self._scores(samples)))
        caption = "Generated points of one fixed noise (orange) over points of the ring (grey)."
        self.run.artifact("samples", scatter(samples[:1000]), caption, step)

    def score(self, generator: nn.Module) -> dict[str, float]:
        """The final scores, on noise that had no part in the run."""
        return named("test_", self._scores(drawn(generator, self.fresh)))

    @torch.no_grad()
    def distance(self, generator: nn.Module, critic: nn.Module) -> dict[str, float]:
        """On fresh points: the exact Wasserstein distance, and the critic's estimate as a multiple of it."""
        x, y = ring(PAIRS, self.run.generator("test points")), drawn(generator, self.fresh[:PAIRS])
        exact, (real, fake) = wasserstein(x, y), (critic(part.to(self.run.device)).mean().item() for part in (x, y))
        return {"test_distance": exact, "test_distance_ratio": (real - fake) / exact}

    def _scores(self, samples: Tensor) -> dict[str, float]:
        """`modes` and `share`, and the Fréchet distance of the points themselves, which sees two moments only."""
        distance = frechet(*moments(), *gaussian(samples))
        return ring_scores(samples) | {
            "frechet_distance": distance,
            "frechet_ratio": distance / (self.held.first or 1.0),
        }


class ImageStage:
    """Images as the loops see them: batches in [−1, 1], scores of a generator by our LeNet, a grid of samples."""

    def __init__(self, run: Run, name: str, size: int) -> None:
        self.run = run
        doublings(size)  # refuses a size that no network here can have, before a dataset is resized to it
        self.data = room.images(name, size)
        self.spec = self.data.spec
        self.stream: Stream | None = None
        run.use_threads(None)  # convolutions, unlike the ring's perceptrons

    def about(self) -> dict[str, Any]:
        """What a report says of the data."""
        return self.data.about()

    def real(self, step: int, count: int) -> Tensor:
        """(count, C, H, W) in [−1, 1]: the training images of `step`, every image once an epoch."""
        if self.stream is None or self.stream.batch != count:
            self.stream = Stream(len(self.data.train.y), count, self.run.seed, self.run.rank, self.run.world)
        x = self.data.train.x[self.stream.indices(step)].to(self.run.device)
        return x.to(torch.get_default_dtype()).div_(127.5).sub_(1)

    def begin(self, generator: nn.Module, latent: int, judge: nn.Module | None) -> None:
        """Teach the judge, fit Gaussians to what it sees in validation images and in an untrained generator's.

        All of it is tracked, so a resumed run neither teaches nor measures again.
        """
        assert judge is not None
        self.judge, run = judge.eval().requires_grad_(False), self.run
        empty = gaussian(torch.zeros(2, judge.classifier[-1].in_features))  # type: ignore[index, union-attr]
        self.held = Box(taught=False, real=list(empty), untrained=list(empty))
        run.track(judge=judge, judged=self.held)
        self.z, self.fresh = (noise(run, kind, IMAGES, latent) for kind in ("validation", "test"))
        self.fair = torch.bincount(self.data.train.y, minlength=len(self.spec.classes)) / len(self.data.train.y)
        if self.held.taught:
            return
        train = self.data.train
        judging.teach(judge, train.x, train.y, run.device, judging.JUDGE_STEPS)
        real, accuracy = self._seen(self.data.validation)
        run.log(
            validation_judge_accuracy=accuracy, validation_lenet_frechet_floor=frechet(*real, *self._seen(train)[0])
        )
        run.say(f"judge: LeNet, validation accuracy {accuracy:.4f}")
        self.held.real, self.held.untrained = list(real), list(gaussian(self._judged(drawn(generator, self.z))[0]))
        self.held.taught = True
        self.look(generator, 0)

    def look(self, generator: nn.Module, step: int) -> None:
        """Score the generator after `step` updates, log the scores and keep a grid of its first images."""
        images = drawn(generator, self.z)
        self.run.log(**named("validation_", self._scores(images, tuple(self.held.real))))
        self.run.artifact("samples", plots.grid(unit(images[:SHOWN])), "Images of one fixed noise.", step)

    def score(self, generator: nn.Module) -> dict[str, float]:
        """The final scores against the test split, which is looked at here for the first and only time."""
        real, accuracy = self._seen(self.data.test)
        return named("test_", self._scores(drawn(generator, self.fresh), real) | {"judge_accuracy": accuracy})

    def distance(self, generator: nn.Module, critic: nn.Module) -> dict[str, float]:
        """Nothing: between images there is no exact distance to hold the critic's estimate against."""
        return {}

    def _seen(self, split: Split) -> tuple[tuple[Tensor, Tensor], float]:
        """The Gaussian of the judge's features of the first images of a split, and its accuracy on them."""
        features, classes = judgement(self.judge, split.x[:MOST].to(self.run.device))
        return gaussian(features), (classes == split.y[:MOST]).double().mean().item()

    def _judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return judgement(self.judge, unit(images).to(self.run.device))

    def _scores(self, images: Tensor, real: tuple[Tensor, Tensor]) -> dict[str, float]:
        features, classes = self._judged(images)
        distance = frechet(*real, *gaussian(features))
        shares = torch.bincount(classes, minlength=len(self.fair)) / len(classes)
        return {
            "modes": float((shares >= ENOUGH * self.fair).sum()),
            "lenet_frechet_distance": distance,
            "frechet_ratio": distance / (frechet(*real, *self.held.untrained) or 1.0),
        }


def stage(run: Run, data: str, size: int) -> RingStage | ImageStage:
    """`ring`, or a dataset of images or a folder of class-named image folders resized to size × size."""
    return RingStage(run) if data == "ring" else ImageStage(run, data, size)


def noise(run: Run, purpose: str, count: int, latent: int) -> Tensor:
    """(count, latent) draws of N(0, I) that depend on the seed and the purpose alone."""
    return torch.randn(count, latent, generator=run.generator(purpose)).to(run.device)


def named(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    """The same numbers, each name with this prefix."""
    return {prefix + name: value for name, value in scores.items()}
