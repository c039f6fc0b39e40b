"""Plain references that the whole-run tests of this room share; nothing of `etude.blocks.looking` is used in them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude import data as room
from etude.core.randomness import fold, generator
from etude.data.batches import permutation

MODULES = {"lenet": "etude.vision.lenet", "mlp": "etude.basics.mlp", "softmax": "etude.basics.mlp"}


@pytest.fixture
def double() -> Iterator[None]:
    """Runs and references in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Plain:
    """What a run examines, made again by plain code; `seed` is the run's."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def network(self, kind: str) -> tuple[nn.Module, room.Images]:
        """A fresh network as the run begins with it, and its data."""
        data = room.images("digits", 28) if kind == "lenet" else room.images("digits")
        module = importlib.import_module(MODULES[kind])
        config = module.Config(**({"widths": ()} if kind == "softmax" else {}))
        torch.manual_seed(fold(self.seed, 0, 0, "init"))
        return module.build(config, data.spec)["model"], data

    def learn(self, kind: str, steps: int, batch: int) -> tuple[nn.Module, list[float]]:
        """Adam of torch under its one-cycle rate, on the documented batches of the *training* images."""
        model, data = self.network(kind)
        x, y = data.train.x / 255, data.train.y
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, cycle_momentum=False)
        order = np.concatenate([permutation(len(y), self.seed, epoch) for epoch in range(1 + steps * batch // len(y))])
        losses = []
        for step in range(steps):
            index = torch.from_numpy(order[step * batch : (step + 1) * batch])
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            losses.append(loss.item())
        return model, losses

    def saved(self, kind: str, folder: Path) -> nn.Module:
        """A fresh network with the weights in a run's last checkpoint, in eval mode."""
        model, _ = self.network(kind)
        model.load_state_dict(etude.load(folder).state["model"])
        return model.eval()

    def rounds(self, size: int, count: int, batch: int) -> list[tuple[int, Tensor, Tensor]]:
        """The first `count` test images in their documented order, `batch` at a time."""
        test = room.images("digits", size).test
        order = torch.randperm(len(test), generator=generator(self.seed, -1, 0, "examined images"))[:count]
        x, y = test.x[order] / 255, test.y[order]
        return [(i // batch, x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]

    def draw(self, purpose: str, number: int | None = None) -> torch.Generator:
        return generator(self.seed, -1 if number is None else number, 0, purpose)

    def shuffled(self, model: nn.Module, kind: str, number: int) -> nn.Module:
        """A network of the same build with permuted weights: all of them, or those of the last layer."""
        import copy

        other, dice = copy.deepcopy(model), self.draw(f"shuffle {kind}", number)
        parameters = list(other.parameters())
        for parameter in parameters[-2:] if kind == "last" else parameters:  # the last layer has a weight and a bias
            order = torch.randperm(parameter.numel(), generator=dice)
            parameter.data = parameter.data.reshape(-1)[order].view(parameter.shape)
        return other

    @staticmethod
    def spearman(a: Tensor, b: Tensor) -> float:
        """Summed over the images."""
        pairs = zip(a.flatten(1).numpy(), b.flatten(1).numpy())
        return float(sum(scipy.stats.spearmanr(one, two).statistic for one, two in pairs))

    def worth(
        self, model: nn.Module, x: Tensor, c: Tensor, maps: Tensor, number: int, subsets: int, mean: float
    ) -> float:
        """Faithfulness of the maps, summed over the images: ⌈10 %⌉ of the pixels, the largest of uniform numbers."""
        dice = self.draw("subsets", number)
        count = int(np.ceil(0.1 * x[0, 0].numel()))
        expected, true = [], []
        with torch.no_grad():
            for _ in range(subsets):
                chance = torch.rand(x[:, 0].shape, generator=dice).flatten(1)
                without, says = x.clone(), torch.zeros(len(x))
                for i in range(len(x)):
                    gone = chance[i].argsort(descending=True)[:count]
                    without[i].view(-1)[gone] = mean
                    says[i] = (maps[i].flatten()[gone] * (x[i].flatten()[gone] - mean)).sum()
                rows = torch.arange(len(x))
                expected.append(says)
                true.append((model(x) - model(without))[rows, c])
        return self.spearman(torch.stack(expected, 1), torch.stack(true, 1))


@pytest.fixture
def plain() -> type[Plain]:
    return Plain


class Moody(nn.Module):
    """A network whose train mode shows: dropout, and batch norm with estimates that are not a batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(6 * 36, 10)
        self.body[1].running_mean.uniform_(-0.1, 0.1)
        self.body[1].running_var.uniform_(0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture
def moody() -> nn.Module:
    """In train mode, as a caller may have left it; it has learnt a little, so that its answers differ."""
    torch.manual_seed(11)
    model, train = Moody(), room.images("digits").train
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for k in range(12):
        rows = slice(60 * k, 60 * k + 60)
        optimizer.zero_grad()
        F.cross_entropy(model(train.x[rows] / 255), train.y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.train()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))


def gradient(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """∂z_target/∂x of each image by autograd."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[torch.arange(len(x)), target].sum(), leaf)[0]


@pytest.fixture
def autograd() -> Any:
    return gradient
