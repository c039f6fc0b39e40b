"""The classifier that a method examines: one from an earlier run, or one trained on the spot

`source` is a run folder, a method's name (its latest run), or ``fresh``: a network trained in the first steps of the
run itself, so that the method works from nothing. In Python it may be a model object, with the data to examine it on:
``etude.run("robustness/fgsm", source=model, data="mnist")``; the methods' own functions (``fgsm(model, x, y, eps)``,
``saliency(model, x)``) and their ``explain`` take any module and any tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import catalog, optim
from etude import data as room
from etude.blocks.attribution import probabilities
from etude.core import launch
from etude.core.checkpoint import Box
from etude.core.config import replace
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.data.batches import Stream
from etude.data.sets import Images

Network = Literal["lenet", "mlp", "softmax"]
_FRESH: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet": ("vision/lenet", {}),
    "mlp": ("basics/mlp", {}),
    "softmax": ("basics/mlp", {"widths": ()}),
}


@dataclass
class Source:
    """A classifier of images, the data it is examined on, and what is left to train."""

    model: nn.Module
    """Takes images (N, C, H, W), uint8 or float in [0, 1]; returns logits (N, classes)."""
    data: Images
    label: str
    """What it is, in words for captions."""
    steps: int
    """Training steps at the beginning of the run's clock; 0 for a network that an earlier run trained."""
    learn: Callable[[int], Tensor]
    """One of these steps: updates the model and returns the loss, 0-dim."""

    def choose(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """`count` test images (or all) in an order drawn by `seed`: float (N, C, H, W) in [0, 1], int64 (N,)."""
        order = torch.randperm(len(self.data.test.y), generator=generator(seed, -1, 0, "examined images"))[:count]
        return self.data.test.x[order].float() / 255, self.data.test.y[order]


def resolve(run: Run, source: str, data: str, network: str = "lenet", steps: int = 300, batch: int = 128) -> Source:
    """The classifier that ``--source`` names; tracks what must survive, so call it once, before `run.steps`.

    `data` is a dataset of the same shape and classes, or "" for what the network was trained on (digits for a fresh
    one). Raises UserError when there is no such run, when it holds no classifier of images, or the data do not fit it.
    """
    if source == "fresh":
        return _fresh(run, data or "digits", network, steps, batch)
    if run.source is not None:
        return _object(run, run.source, data)
    if source.startswith(launch.OBJECT):
        raise UserError(
            f"{run.folder} examined {source}, which ended with its Python session; run it again with source=model"
        )
    held = Box(folder="", step=-1)
    run.track(source=held)
    try:
        folder = Path(held.folder) if held.folder else launch.find_run(source)
    except UserError as error:
        raise UserError(
            f"--source {source}: {error}; or take --source fresh, which trains a small network first"
        ) from error
    if folder.resolve() == run.folder.resolve():
        raise UserError(f"--source {source} is this run itself; name a method or the folder of an earlier run")
    loaded = launch.load(folder)
    if held.folder and loaded.step != held.step:
        raise UserError(
            f"{folder} was at step {held.step} when this run began and is at {loaded.step} now; start a new run"
        )
    held.folder, held.step = str(folder.resolve()), loaded.step
    spec = loaded.spec
    if "model" not in loaded.modules or len(spec.shape) != 3 or len(spec.classes) < 2:
        raise UserError(
            f"--source {source} is a run of {loaded.name}, which holds no classifier of images (such as vision/lenet)"
        )
    name = data or str(getattr(loaded.config, "data", ""))
    found = room.images(name)
    if found.spec.shape != spec.shape and spec.shape[1] == spec.shape[2]:
        found = room.images(name, spec.shape[1])
    if found.spec.shape != spec.shape or len(found.spec.classes) != len(spec.classes):
        raise UserError(
            f"--data {name} has images {found.spec.shape} of {len(found.spec.classes)} classes; "
            f"the network of {folder} takes {spec.shape} of {len(spec.classes)}"
        )
    run.suit_threads(loaded.model)
    return Source(loaded.model.to(run.device), found, f"{loaded.name} ({folder})", 0, _trained)


def _trained(step: int) -> Tensor:
    raise AssertionError(f"step {step}: this network is trained already")


def _object(run: Run, model: nn.Module, data: str) -> Source:
    """A network of the caller's. It stays as it is; where it lives on another device, a copy is examined."""
    kind = type(model).__name__
    if not data:
        raise UserError(
            f"source is a {kind} object, so say what to examine it on: data='digits', another name, a folder"
        )
    found = room.images(data)
    if any(tensor.device != run.device for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).to(run.device)
    run.suit_threads(model)
    two, wanted = found.test.x[:2].to(run.device).float() / 255, (2, len(found.spec.classes))
    try:
        logits = probabilities(model, two)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the {kind} object cannot take images {tuple(two.shape)} of {data}: {reason}") from error
    if tuple(logits.shape) != wanted:
        raise UserError(
            f"the {kind} object returns {tuple(logits.shape)} for two images; {data} needs logits {wanted}, one a class"
        )
    return Source(model, found, f"{kind} object", 0, _trained)


def _fresh(run: Run, data: str, network: str, steps: int, batch: int) -> Source:
    """A new network of the kind `network` with its Adam under a one-cycle rate; it learns in the run's first steps."""
    name, changes = _FRESH[network]
    module = catalog.load_method(catalog.find(name))
    found = room.images(data)
    if network == "lenet":  # takes 28 × 28 and 32 × 32
        size = 32 if found.spec.shape[1:] == (32, 32) else 28
        found, changes = room.images(data, size), {"size": size}
    config = replace(module.Config(), {**changes, "data": data}, name)
    model = run.place(module.build(config, found.spec)["model"])
    optimizer = optim.make("adam", model.parameters(), 3e-3)
    rate = optim.schedule("one_cycle", 3e-3, steps)
    stream = Stream(len(found.train.y), batch, run.seed, run.rank, run.world)
    run.track(model=model, optimizer=optimizer)

    def learn(step: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        index = stream.indices(step)
        model.train()
        loss = F.cross_entropy(model(found.train.x[index].to(run.device)), found.train.y[index].to(run.device))
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()
        return loss.detach()

    return Source(model, found, f"{network} trained for {steps} steps on {found.name}", steps, learn)
