"""Saliency and guided backpropagation against captum: the same gradients, in how much less time.

Each row is one call on one batch, one thread, CPU seconds of the process (the machine may be shared). Both sides get the
same network as PyTorch makes it. The two maps are compared before anything is timed.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import warnings

import torch
from torch import Tensor, nn

from etude.insight.guided_backprop import guided_backprop
from etude.insight.saliency import saliency
from etude.vision.lenet import LeNet
from race import cpu, race, report

BAR, CLOSE = 1.5, 1e-5


class Block(nn.Module):
    """Two convolutions with batch norm and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU()])  # captum cannot hook one that is used twice
        plain = inputs == outputs and stride == 1
        self.skip = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relus[0](self.norms[0](self.one(x)))
        return self.relus[1](self.norms[1](self.two(inner)) + self.skip(x))


def residual() -> nn.Module:
    """A small residual network for 32 × 32 colour images."""
    start = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def rows() -> list[dict[str, object]]:
    """Each in a process of its own: what one leaves in the allocator would change the pace of the next by a third."""
    alone = multiprocessing.get_context("spawn")
    found = []
    for case in ("LeNet, 128 of 1×28×28", "residual, 32 of 3×32×32"):
        for kind in ("saliency", "guided backprop"):
            with concurrent.futures.ProcessPoolExecutor(1, alone) as pool:
                found.append(pool.submit(row, kind, case).result())
    return found


def row(kind: str, case: str) -> dict[str, object]:
    """One map of one network, ours and captum's."""
    import captum
    from captum.attr import GuidedBackprop, Saliency

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # captum warns that it sets hooks
    model, shape = (LeNet(10), (128, 1, 28, 28)) if case.startswith("LeNet") else (residual(), (32, 3, 32, 32))
    model.eval()
    x, y = torch.rand(shape), torch.arange(shape[0]) % 10

    def ours() -> Tensor:
        return saliency(model, x, y) if kind == "saliency" else guided_backprop(model, x, y)

    def peer() -> Tensor:
        if kind == "saliency":
            return Saliency(model).attribute(x, target=y, abs=False)
        return GuidedBackprop(model).attribute(x, target=y)

    ours()  # a first call proves what later ones may fold
    a, b = ours(), peer()
    off = float((a - b).abs().max() / b.abs().max())
    assert off <= CLOSE, f"{kind} on {case} differs from captum by {off:.1e} of the largest entry"
    equal = f"maps equal to {off:.0e} of the largest entry; one thread, CPU seconds"
    return race(f"{kind}, {case}", cpu(ours), cpu(peer), "captum", captum.__version__, BAR, equal, pairs=15)


if __name__ == "__main__":
    report("insight", rows())
