"""Masks laid over pictures, for reports and for `etude predict`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from etude.blocks.pictures.panels import panels
from etude.core.run import Run
from etude.segmentation.parts.scenes import VOID, Part, Scenes
from etude.segmentation.parts.tiles import PixelNetwork, logits

COLOURS = np.array(
    [
        (38, 38, 38), (214, 96, 77), (67, 147, 195), (240, 182, 62), (90, 160, 90), (146, 101, 173), (226, 128, 180),
        (64, 180, 175), (158, 118, 82), (180, 200, 70), (120, 130, 220), (190, 190, 190), (255, 120, 40), (0, 110, 90),
    ],
    np.uint8,
)  # fmt: skip
"""Colours of the classes, from class 0 on; they repeat."""
EXAMPLES = 4


def coloured(mask: np.ndarray) -> np.ndarray:
    """Class numbers (H, W) → RGB uint8 (H, W, 3), void white."""
    rgb = COLOURS[mask % len(COLOURS)]
    rgb[mask == VOID] = 255
    return rgb


def overlaid(x: np.ndarray, mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """A picture uint8 (C, H, W) under the colours of its mask (H, W), class 0 left clear: RGB uint8 (H, W, 3)."""
    under = np.broadcast_to(x.transpose(1, 2, 0), (*mask.shape, 3)).astype(np.float32)
    share = np.where((mask == 0) | (mask == VOID), 0, opacity)[..., None]
    return (under * (1 - share) + coloured(mask) * share).round().astype(np.uint8)


def mask_image(mask: np.ndarray) -> Image.Image:
    """A palette picture whose pixel values are the class numbers; what `parts.scenes` reads as a mask again."""
    image = Image.fromarray(mask.astype(np.uint8))
    palette = coloured(np.arange(256, dtype=np.uint8)[None])[0]
    image.putpalette(palette.tobytes())
    return image


def pictures(run: Run, model: PixelNetwork, data: Scenes, tile: int = 0) -> None:
    """Some test pictures: the picture, the truth over it, the answer over it, and where the answer is wrong (red)."""
    part = data.test
    rows = [index * len(part) // EXAMPLES for index in range(min(EXAMPLES, len(part)))]
    answers = [answer(run, model, part, index, tile) for index in dict.fromkeys(rows)]
    run.artifact(
        "masks", figure([*dict.fromkeys(rows)], part, answers, data.spec.classes), caption="Pictures of the test split."
    )


def answer(run: Run, model: PixelNetwork, part: Part, index: int, tile: int) -> np.ndarray:
    """The class of every pixel of one picture: uint8 (H, W)."""
    training = model.training
    with run.autocast():
        scores = logits(model.eval(), part.x[index][None].to(run.device), tile)
    model.train(training)
    return scores[0].argmax(0).byte().cpu().numpy()


def figure(rows: Sequence[int], part: Part, answers: Sequence[np.ndarray], classes: Sequence[str]):
    """A row for each picture: as it is, truth, answer, mistakes."""
    from matplotlib.patches import Patch

    shape = part.y[rows[0]].shape
    width = 9.0
    height = len(rows) * width / 4 * shape[0] / shape[1] + 0.7
    drawn, axes = panels(4, len(rows), width=width, height=height)
    for place, (index, said) in enumerate(zip(rows, answers)):
        x, y = part.x[index].numpy(), part.y[index].numpy()
        wrong = np.where((y != said) & (y != VOID), 1, 0)
        shown = (
            np.broadcast_to(x.transpose(1, 2, 0), (*y.shape, 3)),
            overlaid(x, y),
            overlaid(x, said),
            overlaid(x, wrong, 0.8),
        )
        for axis, image, title in zip(axes[4 * place :], shown, ("picture", "truth", "answer", "wrong")):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
            if place == 0:
                axis.set_title(title, loc="left", fontsize=10)
    handles = [Patch(color=COLOURS[i % len(COLOURS)] / 255, label=name) for i, name in enumerate(classes) if i]
    drawn.legend(
        handles=handles[:14], loc="outside lower center", ncols=min(6, len(handles)), fontsize=7, frameon=False
    )
    return drawn
