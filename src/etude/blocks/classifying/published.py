"""Published weights of image classifiers: one registry of names, and readers of files, runs and hub folders

A file is trusted as far as its tensors: `.safetensors`, or `.pth`, `.pt` and `.th` through `weights_only`, which runs no
code. A name of the registry means a file in the folder `weights` beside the datasets, whose SHA-256 must agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from etude import data as room
from etude.core.errors import UserError, nearest
from etude.core.spec import Spec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation that ImageNet's networks (and the CIFAR ones below) subtract and divide by, in [0, 1] units."""


@dataclass(frozen=True)
class Published:
    """One published file of weights."""

    file: str
    source: str
    """Where its authors offer it."""
    licence: str
    sha256: str
    """The digest of the file, or the first eight digits where the authors publish these alone (in the file's name)."""
    moments: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


def _akamaster(file: str, sha256: str) -> Published:
    return Published(file, "https://github.com/akamaster/pytorch_resnet_cifar10", "BSD-2-Clause", sha256)


def _torchvision(file: str) -> Published:
    digits = file.removesuffix(".pth").rpartition("-")[2]
    return Published(file, f"https://download.pytorch.org/models/{file}", "BSD-3-Clause (torchvision)", digits)


REGISTRY = {
    "resnet20-cifar10": _akamaster(
        "resnet20-12fca82f.th", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8"
    ),
    "resnet56-cifar10": _akamaster(
        "resnet56-4bfd9763.th", "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367"
    ),
    "resnet18-imagenet": _torchvision("resnet18-f37072fd.pth"),
    "resnet34-imagenet": _torchvision("resnet34-b627a593.pth"),
    "resnet50-imagenet": _torchvision("resnet50-0676ba61.pth"),
    "resnet101-imagenet": _torchvision("resnet101-63fe2227.pth"),
    "resnet152-imagenet": _torchvision("resnet152-394f9c45.pth"),
    "alexnet-imagenet": _torchvision("alexnet-owt-7be5be79.pth"),
    "vgg11-imagenet": _torchvision("vgg11-8a719046.pth"),
    "vgg11-bn-imagenet": _torchvision("vgg11_bn-6002323d.pth"),
    "vgg13-imagenet": _torchvision("vgg13-19584684.pth"),
    "vgg13-bn-imagenet": _torchvision("vgg13_bn-abd245e5.pth"),
    "vgg16-imagenet": _torchvision("vgg16-397923af.pth"),
    "vgg16-bn-imagenet": _torchvision("vgg16_bn-6c64b313.pth"),
    "vgg19-imagenet": _torchvision("vgg19-dcbb9e9d.pth"),
    "vgg19-bn-imagenet": _torchvision("vgg19_bn-c79401a0.pth"),
}
"""Everything that `--init` knows by name."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name, and what the network that they belong to subtracts and divides by (None: not told)."""

    state: dict[str, Tensor]
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None
    origin: str

    def spec(self, spec: Spec) -> Spec:
        """The spec of other data as this network is used to see them: with its own mean and deviation."""
        if self.moments is None or len(self.moments[0]) != spec.shape[0]:
            return spec
        return dataclasses.replace(spec, mean=self.moments[0], std=self.moments[1])


def read(source: str) -> Weights:
    """The weights that `--init` names: of the registry, a file, a folder with model.safetensors, a run, or a hub's name.

    Raises UserError, in one sentence, where there is no such thing, it cannot be read, or its SHA-256 is another.
    """
    if source in REGISTRY:
        found = REGISTRY[source]
        path = room.home() / "weights" / found.file
        if not path.is_file():
            raise UserError(f"--init {source} needs {path}: put {found.file} there, from {found.source}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(found.sha256):
            raise UserError(f"{path} is not the published file (its SHA-256 begins {digest[:8]}): fetch it again")
        return Weights(_tensors(path), found.moments, source)
    path = Path(source).expanduser()
    if (path / "spec.json").is_file() or source == "latest":
        from etude.core.loaded import load

        run = load(source)
        return Weights(run.model.state_dict(), (run.spec.mean, run.spec.std), str(run.folder))
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise UserError(f"--init {source} is neither a run nor a folder with model.safetensors")
        state: dict[str, Tensor] = {}
        for file in files:
            state |= _tensors(file)
        return Weights(state, IMAGENET, source)
    if path.is_file():
        return Weights(_tensors(path), None, source)
    if (
        source.count("/") == 1
        and not source.startswith((".", "~", "/"))
        and not path.suffix
        and not path.parent.is_dir()
    ):
        return Weights(_tensors(_from_hub(source)), IMAGENET, source)
    raise UserError(
        f"--init {source} is no file, run or published name{nearest(source, REGISTRY) or '.'} Known: {', '.join(REGISTRY)}"
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; a `state_dict` inside is taken, and the prefix of parallel training is cut off."""
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the unpickler stumbles over anything
        damaged = not isinstance(error, pickle.UnpicklingError) or not str(error).startswith("Weights only")
        said = " ".join(str(error).split())[:120]
        if not any(letter.isalpha() for letter in said):  # a number that nobody could understand
            said = f"{type(error).__name__} {said}".strip()
        said = said if damaged else "it holds something else than tensors, which is not run"
        raise UserError(f"{path} cannot be read as a file of weights ({said})") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no tensors by name")
    for name, value in found.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise UserError(f"{path} cannot be used: its {name} is no plain tensor of real numbers")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _reached(address: str) -> bool:
    """Whether a host answers within five seconds, or a proxy stands between: in vain the hub's client tries for half a minute."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        return True
    try:
        socket.create_connection((urllib.parse.urlsplit(address).hostname or "", 443), timeout=5).close()
    except OSError:
        return False
    return True


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as error:
        raise UserError(
            f"--init {name} is no file, and fetching it from the hub needs the package huggingface_hub"
        ) from error
    try:
        return Path(
            hf_hub_download(
                name, "model.safetensors", etag_timeout=5, local_files_only=not _reached(constants.ENDPOINT)
            )
        )
    except Exception as error:  # whatever a network can do
        raise UserError(f"--init {name} is no file, and the hub did not give it ({type(error).__name__})") from error


@torch.no_grad()
def fill(module: nn.Module, weights: Weights, last: str) -> bool:
    """Put weights into a module in place; whether its last layer, `last`, came with them.

    A last layer of another width stays as it was drawn. Raises UserError, naming the first, where another tensor lacks,
    is too many or has another shape.
    """
    own, given = module.state_dict(), dict(weights.state)
    for name in [name for name in given if name.endswith("num_batches_tracked") and name not in own]:
        del given[name]
    ends = [name for name in own if name.startswith(f"{last}.")]
    whole = all(name in given and given[name].shape == own[name].shape for name in ends)
    for name in [*own, *(name for name in given if name not in own)]:
        if (name.startswith(f"{last}.") and not whole) or name.endswith("num_batches_tracked"):
            continue
        if name not in own or name not in given:
            which = "this network" if name not in own else weights.origin
            raise UserError(f"{weights.origin} is of another network: {which} has no {name}")
        if own[name].shape != given[name].shape:
            shapes = tuple(given[name].shape), tuple(own[name].shape)
            raise UserError(f"{weights.origin} is of another network: its {name} is {shapes[0]}, not {shapes[1]}")
    for name, value in own.items():
        if name in given and (whole or not name.startswith(f"{last}.")):
            value.copy_(given[name])
    return whole
