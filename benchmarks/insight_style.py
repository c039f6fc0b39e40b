"""Style transfer against the loop that tutorials have: seconds to the same loss, and seconds a pass.

Both optimise the same picture, from the same start, by the same loss through the same VGG (torchvision's first five convolutions,
random weights, 64 pixels). The peer is PyTorch's neural style tutorial in form: a Sequential with a module behind each
convolution that compares with its target, ReLUs that copy, `torch.optim.LBFGS` on a clamped picture. Ours is the network of
`insight/style_transfer` (channels last, ReLUs in place) under `parts/lbfgs`. One thread, CPU seconds. How many of our steps
are needed for the peer's loss is found before anything is timed, and the loss is that of the clamped picture, in single
precision on both sides. The second row is ours under `--precision bf16`: the network computes in bfloat16 (fast on processors
that multiply it), Gram matrices, loss and L-BFGS stay in single precision; the peer is the same.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import data as room
from etude.insight.parts import lbfgs
from etude.insight.parts.cut import Cut
from etude.insight.parts.photos import photograph
from etude.insight.style_transfer import Targets, gram, loss, objective
from race import cpu, race, report

STYLE, CONTENT, SIDE, ROUNDS = 1e6, 1.0, 64, 1
NAMES = ["0", "2", "5", "7", "10"]
KEPT = "7"


class Compared(nn.Module):
    """Lets its input through and keeps how far it lies from a target; `gram` compares second moments."""

    def __init__(self, target: Tensor, texture: bool) -> None:
        super().__init__()
        self.texture = texture
        self.target = self.of(target).detach()
        self.loss = torch.zeros(())

    def of(self, x: Tensor) -> Tensor:
        if not self.texture:
            return x
        rows = x.view(x.shape[0] * x.shape[1], -1)
        return torch.mm(rows, rows.t()).div(x.numel())

    def forward(self, x: Tensor) -> Tensor:
        self.loss = F.mse_loss(self.of(x), self.target)
        return x


def network(inplace: bool) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256)):
        if (inputs, outputs) in ((64, 128), (128, 256)):
            parts.append(nn.MaxPool2d(2))
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=inplace)]
    torch.manual_seed(0)
    for part in parts:
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    return nn.Sequential(*parts).requires_grad_(False).eval()


def tutorial(
    model: nn.Sequential, photo: Tensor, style: Tensor
) -> tuple[nn.Sequential, list[Compared], list[Compared]]:
    """The network with its comparisons, cut behind the last one."""
    chain, textures, contents = nn.Sequential(), [], []
    for name, part in model.named_children():
        chain.append(part)
        if name in NAMES:
            if name == KEPT:
                contents.append(Compared(chain(photo), False))
                chain.append(contents[-1])
            textures.append(Compared(chain(style), True))
            chain.append(textures[-1])
        if name == NAMES[-1]:
            break
    return chain, textures, contents


def rows() -> list[dict[str, object]]:
    torch.set_num_threads(1)
    assert room.photographs()
    photo, style = (photograph(name, SIDE)[..., :40, :] for name in ("china", "flower"))
    chain, textures, contents = tutorial(network(False), photo, style)
    passes = [0]

    def peer() -> Tensor:
        x, passes[0] = photo.clone().requires_grad_(), 0
        optimizer = torch.optim.LBFGS([x])

        def closure() -> Tensor:
            with torch.no_grad():
                x.clamp_(0, 1)
            optimizer.zero_grad()
            chain(x)
            total = STYLE * sum(part.loss for part in textures) + CONTENT * sum(part.loss for part in contents)
            total.backward()
            passes[0] += 1
            return total

        for _ in range(ROUNDS):
            optimizer.step(closure)
        return x.detach().clamp(0, 1)

    cut = Cut(network(True), [*NAMES, KEPT], photo)
    made = cut(photo)
    content, grams = made[-1].clone(), [gram(maps) for maps in cut(style)[:-1]]
    weights = [4 * STYLE / len(g) ** 2 for g in grams]
    targets = Targets(content, grams, 2 * CONTENT / content.numel(), weights, 0.0, 0.0)
    goal = objective(cut, targets)

    @torch.no_grad()
    def height(x: Tensor) -> float:
        return float(loss(x.clamp(0, 1), cut(x.clamp(0, 1)), targets))

    with torch.no_grad():
        chain(photo + 0.1)
        theirs = float(STYLE * sum(part.loss for part in textures) + CONTENT * sum(part.loss for part in contents))
        mine = float(loss(photo + 0.1, cut(photo + 0.1), targets))
    assert abs(theirs - mine) < 1e-4 * abs(mine), f"the losses differ: {theirs} and {mine}"
    reached, found = height(peer()), []
    kept = targets._replace(inside=1e-2 * float(goal(photo)[0]) / photo[0, 0].numel())
    for case, precision in (("", nullcontext), (", bf16", lambda: torch.autocast("cpu", torch.bfloat16))):
        evaluate = objective(cut, kept, precision)
        state, steps = lbfgs.begin(photo, evaluate, 20), 0
        while height(state.x) > reached and steps < 200:
            lbfgs.step(state, evaluate, 0.01)
            steps += 1
        assert height(state.x) <= reached, "ours does not reach the peer's loss"

        def ours(evaluate=evaluate, steps=steps) -> None:
            state = lbfgs.begin(photo, evaluate, 20)
            for _ in range(steps):
                lbfgs.step(state, evaluate, 0.01)

        equal = (
            f"the loss of the clamped picture, in single precision, falls from {height(photo):.4g} to {reached:.4g} "
            f"({passes[0]} passes) and {height(state.x):.4g} ({state.evaluations} passes); one thread, CPU seconds"
        )
        if case:
            equal += "; NOT equal precision: our convolutions in bfloat16, the peer's in single precision"
        found.append(race(
            f"style transfer to equal loss, {SIDE} pixels{case}", cpu(ours, 1), cpu(peer, 1), "PyTorch's tutorial loop",
            torch.__version__, 1.3, equal, pairs=7,
        ))  # fmt: skip
    return found


if __name__ == "__main__":
    report("insight_style", rows())
