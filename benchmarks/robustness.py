"""FGSM against torchattacks: the same images, at least at the same speed.

One call on one batch, one thread, CPU seconds of the process (the machine may be shared). Both get the same network in
PyTorch's default layout, in eval mode. Before anything is timed the attacked images are compared in float64, where both
formulas of the gradient give one sign; in float32 the share of pixels that differ is reported.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import torch
from torch import Tensor

from etude.basics.mlp import MLP
from etude.robustness.fgsm import fgsm
from etude.vision.lenet import LeNet
from race import cpu, race, report

BAR, EPS = 1.0, 0.1


def rows() -> list[dict[str, object]]:
    """Each in a process of its own: what one leaves in the allocator would change the pace of the next."""
    alone = multiprocessing.get_context("spawn")
    found = []
    for case in ("LeNet", "MLP 256-128"):
        with concurrent.futures.ProcessPoolExecutor(1, alone) as pool:
            found.append(pool.submit(row, case).result())
    return found


def row(case: str) -> dict[str, object]:
    """One network attacked by both."""
    import torchattacks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (LeNet(10) if case == "LeNet" else MLP(784, (256, 128), 10)).eval().double()
    x, y = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    same = torch.equal(fgsm(model, x.double(), y, EPS), torchattacks.FGSM(model, EPS)(x.double(), y))
    assert same, f"{case}: the attacked images differ from torchattacks' in float64"
    model = model.float()
    attack = torchattacks.FGSM(model, EPS)

    def ours() -> Tensor:
        return fgsm(model, x, y, EPS)

    def peer() -> Tensor:
        return attack(x, y)

    differ = float((ours() != peer()).double().mean())
    assert differ < 1e-3, f"{case}: {differ:.2%} of the pixels differ in float32"
    equal = f"identical images in float64, {differ:.1e} of the pixels differ in float32; one thread, CPU seconds"
    name, version = f"FGSM, {case}, 128 of 1×28×28", torchattacks.__version__
    return race(name, cpu(ours), cpu(peer), "torchattacks", version, BAR, equal, pairs=15)


if __name__ == "__main__":
    report("robustness", rows())
