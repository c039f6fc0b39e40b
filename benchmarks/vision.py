"""A training step of ResNet-20 against the loop that is written first: eager PyTorch, one image after the other

Both train the same network from the same weights by momentum on 2,000 colour images of 32 × 32 pixels, each cropped from its
padded self and mirrored. The peer is torch's own layers in NCHW, a DataLoader whose dataset crops, mirrors and scales an image,
and `torch.optim.SGD`; ours are the parts of `vision/resnet`: images as bytes, one gather a batch, channels_last, statistics
and checks of `Run`. One thread, CPU seconds of a step. Losses and gradients of one batch are compared before anything is timed.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from etude.core.run import Common, Run
from etude.core.spec import Spec
from etude.data.sets import Images, Split
from etude.optim import make
from etude.vision.parts.augmented import batches
from etude.vision.resnet import ResNet
from race import cpu, race, report

BATCH, COUNT = 128, 2000
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class Block(nn.Module):
    """Two convolutions and a shortcut of option A, as most write it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class Plain(nn.Module):
    """ResNet-20 with torch's own layers and the names of `ResNet`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, outputs, 1 if stage == 1 else 2)
            self.add_module(
                f"layer{stage}", nn.Sequential(first, Block(outputs, outputs, 1), Block(outputs, outputs, 1))
            )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Pictures(Dataset[tuple[Tensor, int]]):
    """One image at a time: padded, cropped, mirrored, scaled."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y.tolist()
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = F.pad(self.x[index].float() / 255, (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - self.mean) / self.std, self.y[index]


def data() -> Images:
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (COUNT,)))
    return Images("noise", split, split, split, Spec((3, 32, 32), tuple("0123456789"), MEAN, STD), "drawn here")


def ours(images: Images, model: ResNet, precision: str, folder: Path) -> Callable[[], None]:
    """One step of the loop of vision/resnet after the other."""
    run = Run("vision/resnet", None, Common(threads=1, device="cpu", precision=precision, quiet=True), folder)  # type: ignore[arg-type]
    model = run.place(model).train()
    optimizer = make("momentum", model.parameters(), 0.1, weight_decay=1e-4)
    batch, steps = batches(run, images, BATCH, 4, flip=True), itertools.count()

    def step() -> None:
        x, y = batch(next(steps))
        with run.autocast():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()
        run.log(loss=loss)

    return step


def theirs(images: Images, model: Plain) -> Callable[[], None]:
    """One step of the eager loop after the other."""
    loader = DataLoader(Pictures(images.train.x, images.train.y), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()

    def step() -> None:
        x, y = next(endless)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def same(images: Images) -> str:
    """The same batch through both networks: loss and gradients agree. Raises AssertionError where they do not."""
    torch.manual_seed(0)
    mine, plain = ResNet(20, 10, MEAN, STD).train(), Plain().train()
    plain.load_state_dict(mine.state_dict())
    x, y = images.train.x[:32], images.train.y[:32]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    losses = [F.cross_entropy(mine(x), y), F.cross_entropy(plain((x.float() / 255 - mean) / std), y)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(mine.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3, msg=name)
    return "loss to 1e-4 and gradients to 1e-2 on one batch, from the same weights"


def main() -> None:
    torch.set_num_threads(1)
    images, rows = data(), []
    equal = same(images)
    pairs = 3 if "--short" in sys.argv else 7
    for precision, bar in (("fp32", 1.3), ("bf16", 2.0)):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            mine = ours(images, ResNet(20, 10, MEAN, STD), precision, Path(folder))
            rows.append(
                race(
                    f"ResNet-20, a step of {BATCH}, {precision}",
                    cpu(mine, 3),
                    cpu(theirs(images, Plain()), 3),
                    "eager loop, fp32",
                    f"torch {torch.__version__}",
                    bar,
                    equal,
                    pairs=pairs,
                )
            )
    report("vision", rows)


if __name__ == "__main__":
    main()
