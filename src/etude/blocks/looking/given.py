"""Images handed over in Python as `data=`: a tensor or array, a pair (images, labels), or a `torch.utils.data` dataset

Images are (N, C, H, W), or (N, H, W) for grey ones: uint8 from 0 to 255, or floating in [0, 1]. Floating images from 0 to
255 are refused; nothing guesses a range. Labels are class numbers (N,). Items of a dataset are (image, label) pairs or
images, an image being a tensor, an array or a Pillow image.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.data.sets import Images, Split, held_back, resized, stratified

MOST = 100_000  # items of a dataset; all of them are decoded
SHARE = 0.2  # of labelled images that are kept for testing where a fresh network has to learn from the rest


class Given(NamedTuple):
    """Images, with their labels and class names where the caller has any."""

    x: Tensor
    """(N, C, H, W), uint8, or floating in [0, 1]."""
    y: Tensor | None
    """int64 (N,)."""
    classes: tuple[str, ...]


def given(data: Any) -> Given:
    """The images in what a caller handed over. Raises UserError, one sentence, for anything else."""
    classes: tuple[str, ...] = ()
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Dataset):
        classes = tuple(map(str, getattr(data, "classes", ())))
        data = _items(data)
    if isinstance(data, (Tensor, np.ndarray)):
        x, y = data, None
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        x, y = data
    else:
        raise UserError(
            f"data is a {type(data).__name__} object; give a name, a folder, images, a pair (images, labels) or a "
            "torch.utils.data dataset"
        )
    x = _images(x)
    return Given(x, None if y is None else _labels(y, len(x)), classes)


def images(given: Given, spec: Spec, count: int) -> Split:
    """The images in the size that `spec` names (any where it names none), labels below `count`; raises UserError.

    Without labels, y is empty.
    """
    x, y = given.x, given.y
    if spec.shape and x.shape[2:] != spec.shape[1:]:
        if spec.shape[1] != spec.shape[2] or x.shape[2] != x.shape[3]:
            raise UserError(f"the images given are {tuple(x.shape[1:])}; the network takes {spec.shape}")
        x = resize(x, spec.shape[1])
    if spec.shape and x.shape[1] != spec.shape[0]:
        raise UserError(
            f"the images given are {tuple(x.shape[1:])}; the network takes {spec.shape} (channels, height, width)"
        )
    if y is not None and len(y) and int(y.max()) >= count:
        raise UserError(f"the labels given go up to {int(y.max())}; the network has classes 0 to {count - 1}")
    return Split(x, torch.empty(0, dtype=torch.int64) if y is None else y)


def split(given: Given, size: int | None) -> Images:
    """A set to train a network on and to test it: a stratified fifth tests, a tenth of the rest validates."""
    x, y = given.x, given.y
    if y is None:
        raise UserError("a fresh network learns from labels: give data=(images, labels), or a trained --source")
    names = given.classes or tuple(str(k) for k in range(int(y.max()) + 1))
    if len(names) < 2 or int(y.max()) >= len(names) or len(y) < 4:
        raise UserError(
            f"a fresh network needs images of two classes or more; {len(y)} images of {len(names)} were given"
        )
    x = x if size is None else resize(x, size)
    rest, test = (torch.from_numpy(part) for part in stratified(y.numpy(), max(1, round(SHARE * len(y)))))
    kept, held = (rest[torch.from_numpy(part)] for part in held_back(y[rest].numpy()))
    mean, std = moments(x[kept])
    spec = Spec(tuple(x.shape[1:]), names, mean, std)
    train, validation, last = (Split(x[index], y[index]) for index in (kept, held, test))
    return Images(words(given), train, validation, last, spec, "handed over in Python")


def words(given: Given) -> str:
    """What captions call them."""
    return f"{len(given.x):,} images given in Python{'' if given.y is not None else ' without labels'}"


def unit(x: Tensor) -> Tensor:
    """uint8 images divided by 255, floating ones as they are; in torch's default dtype."""
    values = x.to(torch.get_default_dtype())
    return values / 255 if x.dtype == torch.uint8 else values


def resize(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) to (N, C, size, size), as `etude.data.images` resizes; floating images are not rounded."""
    if x.dtype == torch.uint8:
        return torch.from_numpy(resized(x.numpy(), size))
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)


def moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in [0, 1] units; a constant channel has the deviation 1."""
    values = unit(x).double().transpose(0, 1).flatten(1)
    mean, std = values.mean(1).tolist(), values.std(1, correction=0).tolist()
    return tuple(mean), tuple(value if value > 1e-3 else 1.0 for value in std)


def _images(x: Any) -> Tensor:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise UserError(f"the images given are a {type(x).__name__} object; give one tensor (N, C, H, W)")
    x = _tensor(x)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise UserError(f"the images given are {x.dtype}; give uint8 from 0 to 255, or floats in [0, 1]")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or not x.numel():
        raise UserError(f"the images given have the shape {tuple(x.shape)}; it must be (N, C, H, W), with N at least 1")
    if x.is_floating_point():
        low, high = (float(value) for value in torch.aminmax(x))
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"the images given lie in [{low:g}, {high:g}]; give uint8 from 0 to 255, or floats in [0, 1] (a network "
                "standardises inside)"
            )
    return x.contiguous()


def _labels(y: Any, count: int) -> Tensor:
    y = _tensor(y)
    if y.is_floating_point() or y.dtype == torch.bool or y.shape != (count,):
        raise UserError(
            f"the labels given are {y.dtype} {tuple(y.shape)}; they must be class numbers ({count},), one an image"
        )
    if int(y.min()) < 0:
        raise UserError(f"the labels given go down to {int(y.min())}; classes are numbered from 0")
    return y.long()


def _tensor(values: Any) -> Tensor:
    """On the CPU, apart from any graph; arrays and lists are copied, so that they may be read-only or reversed."""
    try:
        return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise UserError(f"the {type(values).__name__} given holds no numbers ({error})") from error


def _items(data: Any) -> Any:
    """All items of a dataset: images, or (images, labels)."""
    count = len(data) if hasattr(data, "__len__") else None
    if count is not None and count > MOST:
        raise UserError(
            f"the dataset has {count:,} items, and all are read; give a torch.utils.data.Subset of {MOST:,}"
        )
    items = (data[i] for i in range(count)) if count is not None else iter(data)
    found = list(itertools.islice(items, MOST))
    if not found:
        raise UserError(f"the {type(data).__name__} given is empty")
    pairs = [list(item) if isinstance(item, (tuple, list)) else [item] for item in found]
    if len({len(pair) for pair in pairs}) > 1 or len(pairs[0]) not in (1, 2):
        raise UserError(f"items of the {type(data).__name__} given must all be images or all be (image, label) pairs")
    tensors = [_image(pair[0]) for pair in pairs]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        raise UserError(f"images of the {type(data).__name__} given differ in shape or dtype; resize them to one size")
    x = torch.stack(tensors)
    return x if len(pairs[0]) == 1 else (x, [pair[1] for pair in pairs])


def _image(item: Any) -> Tensor:
    if isinstance(item, (Tensor, np.ndarray)):
        return _tensor(item)
    if not hasattr(item, "getbands"):
        raise UserError(f"an item of the dataset given holds a {type(item).__name__} where an image should be")
    pixels = torch.from_numpy(np.array(item if item.mode in ("L", "RGB") else item.convert("RGB")))  # a Pillow image
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
