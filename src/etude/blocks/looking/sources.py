"""The classifier that a method examines, and the images it is examined on

`source` is a run folder, a method's name (its latest run), or ``fresh``: a network trained in the steps of the run itself,
so that the method works from nothing. A run brings its network with its preprocessing, the size of its images, its class
names and its data; `data` may name other ones. In Python `source` may be a model object and `data` a tensor, a pair
(images, labels) or a `torch.utils.data` dataset (`etude.blocks.looking.given`):
``etude.run("robustness/fgsm", source=model, data=(x, y))``. The methods' own functions (``fgsm(model, x, y, epsilon)``,
``saliency(model, x)``) and their ``explain`` take any module and any tensor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude import catalog, optim
from etude import data as room
from etude.blocks.looking import given as hands
from etude.blocks.looking.attribution import probabilities
from etude.core import launch
from etude.core.checkpoint import Box
from etude.core.config import replace
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.data.sets import Images, Split

Network = Literal["lenet", "mlp", "softmax"]
_FRESH: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet": ("vision/lenet", {}),
    "mlp": ("basics/mlp", {}),
    "softmax": ("basics/mlp", {"widths": ()}),
}
LEARNING_RATE = 3e-3  # peak of the one-cycle schedule under which a fresh network learns


@dataclass
class Source:
    """A classifier of images, the images it is examined on, and what is left to train."""

    model: nn.Module
    """Takes images (N, C, H, W), uint8 or float in [0, 1]; returns logits (N, classes)."""
    spec: Spec
    """Of the network: shape of an image, class names, mean and deviation of the images it learnt from."""
    images: Split
    """What it is examined on, never what it learnt from: the test split, or all that was handed over in Python."""
    label: str
    """The network and the images in words, for captions."""
    steps: int
    """Training steps on the run's clock; 0 for a network that is trained already."""
    learn: Callable[[int], Tensor]
    """One of these steps: updates the model and returns the loss, 0-dim."""
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name and source of the images and, where a fresh network learns from them, the counts of all splits."""

    def about(self) -> dict[str, Any]:
        """What a report says of the images: those that are learnt from, and those that are examined."""
        if "splits" in self.told:
            return self.told
        counts = self.images.y.bincount(minlength=len(self.spec.classes)).tolist()
        by_class = dict(zip(self.spec.classes, counts)) if len(self.images.y) else {}
        return self.told | {"splits": {"test": {"images": len(self.images.x), "by class": by_class}}}

    def choose(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """`count` images (or all) in an order drawn by `seed`: float (N, C, H, W) in [0, 1], int64 (N,).

        Where the caller gave no labels (which a fresh network needs), what the trained network says counts as true.
        """
        x, y = self.images.x, self.images.y
        order = torch.randperm(len(x), generator=generator(seed, -1, 0, "examined images"))[:count]
        chosen = hands.unit(x[order])
        if len(y):
            return chosen, y[order]
        device = next(iter(self.model.parameters()), torch.empty(0)).device
        said = [probabilities(self.model, part.to(device)).argmax(1).cpu() for part in chosen.split(500)]
        return chosen, torch.cat(said)


def rounds(run: Run, x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The examination: a number from 0, `batch` images and their labels on the run's device, until all have been seen.

    It comes after the run's clock has ended. What is drawn in it depends on the number of the round alone, so an interrupted
    examination begins again and comes to the same numbers.
    """
    run.say(f"examining {len(y):,} images")
    for number, (image, true) in enumerate(zip(x.split(batch), y.split(batch))):
        yield number, image.to(run.device), true.to(run.device)


def resolve(run: Run, source: str, data: str, network: str = "lenet", steps: int = 300, batch: int = 128) -> Source:
    """The classifier that ``--source`` names; tracks what must survive, so call it once, before `run.steps`.

    `data` names images of the network's classes, or is "" for what the network was trained on (digits for a fresh
    one). Raises UserError when there is no such run, when it holds no classifier of images, or the data do not fit it.
    """
    for what, text, there in (("source", source, run.source), ("data", data, run.data)):
        if text.startswith(launch.OBJECTS[what]) and there is None:
            raise UserError(
                f"{run.folder} examined {text}, which ended with its Python session; run it again with {what}=…"
            )
    if source == "fresh":
        return _fresh(run, data or "digits", network, steps, batch)
    if run.source is not None:
        return _object(run, run.source, data)
    held = Box(folder="", step=-1)
    run.track(source=held)
    try:
        folder = Path(held.folder) if held.folder else launch.find_run(source, but=run.folder)
    except UserError as error:
        raise UserError(
            f"--source {source}: {error}; or take --source fresh, which trains a small network first"
        ) from error
    if folder.resolve() == run.folder.resolve():
        raise UserError(
            f"--source {source} is the folder of this run itself; name a method or the folder of an earlier run"
        )
    loaded = launch.load(folder)
    if held.folder and loaded.step != held.step:
        raise UserError(
            f"{folder} was at step {held.step} when this run began and is at {loaded.step} now; start a new run"
        )
    held.folder, held.step = str(folder.resolve()), loaded.step
    spec = loaded.spec
    if "model" not in loaded.modules or len(spec.shape) != 3 or len(spec.classes) < 2 or not _classifies(loaded):
        raise UserError(
            f"--source {source} is a run of {loaded.name}, which holds no classifier of images (such as vision/lenet)"
        )
    if run.data is not None:
        found = hands.given(run.data)
        images, on = hands.images(found, spec, len(spec.classes)), hands.words(found)
        told = {"name": on, "source": "handed over in Python"}
    else:
        images, read = _named(loaded, source, data)
        on, told = _tested(read), {"name": read.name, "source": read.source}
    run.suit_threads(loaded.model)
    return Source(loaded.model.to(run.device), spec, images, f"{loaded.name} ({folder}) on {on}", 0, _trained, told)


@torch.no_grad()
def _classifies(loaded: Loaded) -> bool:
    """Whether the network gives an image one number a class; a detector and one that labels pixels do not."""
    try:
        said = loaded.model(torch.zeros(1, *loaded.spec.shape))
    except (RuntimeError, ValueError, TypeError):  # a network of windows takes no image as large as this
        return False
    return isinstance(said, Tensor) and said.shape == (1, len(loaded.spec.classes))


def _named(loaded: Loaded, source: str, data: str) -> tuple[Split, Images]:
    """The test images that `data`, or the run itself, names, in the size and with the class numbers of its network.

    With the set they are from.
    """
    spec, own = loaded.spec, str(getattr(loaded.config, "data", ""))
    _, height, width = spec.shape
    try:
        found = room.images(data or own, height if height == width else None)
    except UserError as error:
        if data:
            raise
        raise UserError(
            f"--source {source} learnt from {own}, and {error} Or name other images with --data."
        ) from error
    name = found.name
    if found.spec.shape != spec.shape:
        raise UserError(
            f"--data {name} has images {found.spec.shape} of {len(found.spec.classes)} classes; "
            f"the network of {loaded.folder} takes {spec.shape} of {len(spec.classes)}"
        )
    if strange := [one for one in found.spec.classes if one not in spec.classes]:
        raise UserError(
            f"--data {name} has the class '{strange[0]}', which the network of {loaded.folder} does not know; its classes "
            f"are {', '.join(spec.classes[:12])}{', …' if len(spec.classes) > 12 else ''}"
        )
    number = torch.tensor([spec.classes.index(one) for one in found.spec.classes])
    return Split(found.test.x, number[found.test.y]), found


def _tested(images: Images) -> str:
    return f"{images.name}, {len(images.test):,} test images"


def _trained(step: int) -> Tensor:
    raise AssertionError(f"step {step}: this network is trained already")


def _object(run: Run, model: nn.Module, data: str) -> Source:
    """A network of the caller's. It stays as it is; where it lives on another device, a copy is examined."""
    kind = type(model).__name__
    if not data:
        raise UserError(
            f"source is a {kind} object, so say what to examine it on: data='digits', another name, a folder, or "
            "(images, labels)"
        )
    found = room.images(data) if run.data is None else None
    own = hands.given(run.data) if found is None else hands.Given(found.test.x, found.test.y, found.spec.classes)
    of = hands.words(own) if found is None else found.name
    if any(tensor.device != run.device for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).to(run.device)
    run.suit_threads(model)
    two = hands.unit(own.x[:2]).to(run.device)
    try:
        logits = probabilities(model, two)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the {kind} object cannot take images {tuple(two.shape)} of {of}: {reason}") from error
    if (
        logits.ndim != 2
        or len(logits) != len(two)
        or logits.shape[1] < 2
        or (found is not None and logits.shape[1] != len(found.spec.classes))
    ):
        wanted = "classes" if found is None else len(found.spec.classes)
        raise UserError(
            f"the {kind} object returns {tuple(logits.shape)} for {len(two)} images of {of}; it must return logits "
            f"({len(two)}, {wanted}), one a class"
        )
    count = logits.shape[1]
    names = own.classes if len(own.classes) == count else tuple(map(str, range(count)))
    spec = Spec(tuple(own.x.shape[1:]), names, *hands.moments(own.x)) if found is None else found.spec
    on, read = (of, "handed over in Python") if found is None else (_tested(found), found.source)
    told = {"name": of, "source": read}
    return Source(model, spec, hands.images(own, spec, count), f"{kind} object on {on}", 0, _trained, told)


def _fresh(run: Run, data: str, network: str, steps: int, batch: int) -> Source:
    """A new network of the kind `network` with its Adam under a one-cycle rate; it learns in the run's steps."""
    name, changes = _FRESH[network]
    module = catalog.load_method(catalog.find(name))
    own = None if run.data is None else hands.given(run.data)

    def read(size: int | None = None) -> Images:
        return room.images(data, size) if own is None else hands.split(own, size)

    folder = own is None and _is_folder(data)  # whose images may be of several sizes
    size = 28 if folder else None
    if network == "lenet":  # takes 28 × 28 and 32 × 32
        size = 32 if not folder and read().spec.shape[1:] == (32, 32) else 28
        changes = {"size": size}
    found = read(size)
    config = replace(module.Config(), {**changes, "data": data}, name)
    model = run.place(module.build(config, found.spec)["model"])
    optimizer = optim.make("adam", model.parameters(), LEARNING_RATE)
    rate = optim.schedule("one_cycle", LEARNING_RATE, steps)
    stream = Stream(len(found.train), batch, run.seed, run.rank, run.world)
    run.track(model=model, optimizer=optimizer)

    def learn(step: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        index = stream.indices(step)
        model.train()
        x, y = found.train.x[index].to(run.device), found.train.y[index].to(run.device)
        with run.autocast():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()
        return loss.detach()

    label = f"{network} trained for {steps} steps on {_tested(found)}"
    return Source(model, found.spec, found.test, label, steps, learn, found.about())


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except OSError:  # a name too long for the file system is none
        return False
