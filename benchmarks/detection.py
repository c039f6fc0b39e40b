"""Boxes, regions and whole detectors against torchvision's operators and against each other

Suppression of 10,000 boxes and the features of regions, forward and backward, against torchvision's C++ (where torchvision can
be imported; without it these rows stay as they were recorded). Fast R-CNN against R-CNN: the time of a picture on the same
proposals, with networks of one plan. OverFeat against the classifier on every window, at equal scores. CPU seconds, one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from etude.core.spec import Spec
from etude.detection import fast_rcnn, overfeat, rcnn
from etude.detection.parts import windows
from etude.detection.parts.regions import roi_align, roi_pool
from etude.detection.parts.scenes import scenes
from etude.detection.parts.suppression import nms
from race import RESULTS, cpu, race, report

SPEC = Spec((1, 64, 64), tuple("0123456789"), (0.1,), (0.3,))
SHORT = "--short" in sys.argv
PAIRS = 3 if SHORT else 7


def clustered(count: int = 10_000, objects: int = 300) -> tuple[Tensor, Tensor]:
    """What a detector says before suppression: boxes scattered around objects, with random scores."""
    dice = torch.Generator().manual_seed(0)
    low, side = torch.rand(objects, 2, generator=dice) * 900, 20 + 80 * torch.rand(objects, 2, generator=dice)
    of = torch.randint(objects, (count,), generator=dice)
    corner = low[of] + 4 * torch.randn(count, 2, generator=dice)
    return torch.cat([corner, corner + side[of] * (0.15 * torch.randn(count, 2, generator=dice)).exp()], 1), torch.rand(
        count, generator=dice
    )


def spread(count: int = 10_000) -> tuple[Tensor, Tensor]:
    """Boxes all over the picture."""
    dice = torch.Generator().manual_seed(0)
    low, side = torch.rand(count, 2, generator=dice) * 900, 10 + 90 * torch.rand(count, 2, generator=dice)
    return torch.cat([low, low + side], 1), torch.rand(count, generator=dice)


def suppression(version: str) -> list[dict[str, object]]:
    from torchvision.ops import nms as theirs  # type: ignore[import-not-found]

    rows = []
    for name, (boxes, scores), threshold in (
        ("around 300 objects, IoU 0.5", clustered(), 0.5),
        ("all over the picture, IoU 0.7", spread(), 0.7),
    ):
        assert torch.equal(nms(boxes, scores, threshold), theirs(boxes, scores, threshold))
        work = cpu(lambda b=boxes, s=scores, t=threshold: nms(b, s, t), 3)
        peer = cpu(lambda b=boxes, s=scores, t=threshold: theirs(b, s, t), 3)
        title = f"NMS of 10,000 boxes {name}"
        rows.append(race(title, work, peer, "torchvision.ops.nms", version, 3, "identical indices", pairs=PAIRS))
    return rows


def regions(version: str) -> list[dict[str, object]]:
    from torchvision.ops import roi_align as their_align  # type: ignore[import-not-found]
    from torchvision.ops import roi_pool as their_pool

    rows = []
    for name, (pictures, each, channels, cells, size) in (
        ("16 × 48 regions, 64 × 8 × 8", (16, 48, 64, 8, 5)),
        ("2 × 64 regions, 512 × 38 × 38", (2, 64, 512, 38, 7)),
    ):
        dice = torch.Generator().manual_seed(0)
        x, pixels = torch.randn(pictures, channels, cells, cells, generator=dice), 16 * cells
        low = 0.7 * pixels * torch.rand(pictures, each, 2, generator=dice)
        boxes = torch.cat([low, low + pixels * (0.05 + 0.25 * torch.rand(pictures, each, 2, generator=dice))], 2)
        x, listed = x.contiguous(memory_format=torch.channels_last).requires_grad_(), list(boxes)
        calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "RoI pooling": (
                lambda x=x, b=boxes, p=size: roi_pool(x, b, p, 1 / 16),
                lambda x=x, b=listed, p=size: their_pool(x, b, p, 1 / 16),
            ),
            "RoIAlign": (
                lambda x=x, b=boxes, p=size: roi_align(x, b, p, 1 / 16),
                lambda x=x, b=listed, p=size: their_align(x, b, p, 1 / 16, 2, True),
            ),
        }
        for kind, both in calls.items():
            made, slopes, steps = [], [], []
            for call in both:
                out = call()
                slope = torch.ones_like(out)
                made.append(out.reshape(-1, channels, size, size).detach())
                slopes.append(torch.autograd.grad(out, x, slope)[0])
                steps.append(lambda call=call, slope=slope, x=x: torch.autograd.grad(call(), x, slope))
            torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)
            title, equal = f"{kind}, forward and backward, {name}", "outputs to 1e-4, gradients to 1e-3"
            peer = "torchvision.ops"
            rows.append(race(title, cpu(steps[0], 3), cpu(steps[1], 3), peer, version, 8, equal, pairs=PAIRS))
    return rows


@torch.no_grad()
def fast() -> dict[str, object]:
    """A picture of BCCD's size with 1,000 proposals: what follows the same selective search in both."""
    spec = Spec((3, 224, 224), ("RBC", "WBC", "Platelets"), (0.7,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    one, two = fast_rcnn.PRESETS["bccd"], rcnn.PRESETS["bccd"]
    ours, peer = (room.build(c, spec)["model"].eval() for room, c in ((fast_rcnn, one), (rcnn, two)))
    ours, peer = (part.to(memory_format=torch.channels_last) for part in (ours, peer))
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    low = 180 * torch.rand(1, one.proposals, 2)
    boxes = torch.cat([low, low + 10 + 60 * torch.rand(1, one.proposals, 2)], 2).clamp(max=224)

    def mine() -> None:
        ours.heads(fast_rcnn.pooled(one, ours(x), boxes))

    def theirs() -> None:
        phi = rcnn.described(two, peer, x, boxes)
        peer.machines(phi), peer.codes(phi)

    equal = f"the same {one.proposals:,} regions, scored and moved; trunks of one plan and width"
    return race(
        "Fast R-CNN, a picture", cpu(mine, 3), cpu(theirs, 3), "R-CNN of this library", "", 10, equal, pairs=PAIRS
    )


@torch.no_grad()
def convolved() -> dict[str, object]:
    """Scores and boxes of every window of the default's pictures: in one convolution a scale, and window by window."""
    torch.manual_seed(0)
    config = overfeat.Config()
    model = overfeat.build(config, SPEC)["model"].eval().to(memory_format=torch.channels_last)
    x, grid = scenes("digits", 64, 24).test.x[:8], overfeat.all_windows(config)

    def mine() -> Tensor:
        return overfeat.said(config, model, x)[1]

    def theirs() -> Tensor:
        parts = []
        for level in grid.levels:
            crops = windows.unfolded(windows.resized(x, level), grid.side, grid.stride)
            parts.append(
                torch.cat([model(rows.flatten(0, 2))[0].unflatten(0, (len(rows), -1)) for rows in crops.split(1)])
            )
        return torch.cat(parts, 1)

    torch.testing.assert_close(mine(), theirs(), rtol=1e-5, atol=1e-5)
    equal = f"scores of all {len(grid.boxes()):,} windows to 1e-5"
    return race(
        "OverFeat, 8 pictures", cpu(mine, 3), cpu(theirs, 1), "every window by itself", "", 10, equal, pairs=PAIRS
    )


def main() -> None:
    torch.set_num_threads(1)
    try:
        import torchvision  # type: ignore[import-not-found]

        version = f"torchvision {torchvision.__version__.partition('+')[0]}, torch {torch.__version__}"
        rows = suppression(version) + regions(version)
    except ImportError:
        print("torchvision cannot be imported here: its rows stay as they were recorded", file=sys.stderr)
        path = RESULTS / "detection.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        rows = [row for row in known if row["peer"].startswith("torchvision")]
    report("detection", [*rows, fast(), convolved()])


if __name__ == "__main__":
    main()
