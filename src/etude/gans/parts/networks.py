"""The two players' networks: perceptrons for points in the plane, DCGAN's convolutions for images

Paper: Radford, Metz, Chintala, DCGAN, 2015, arXiv:1511.06434.

Differences:
- E114 (notes 8.6.4.1): the transposed-convolution networks are DCGAN's; the paper of 2014 had multi-layer perceptrons,
  and `SmallGAN` is the name of neither.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from etude.blocks.nn.init import initialise
from etude.blocks.nn.norm import BatchNorm
from etude.core.errors import UserError
from etude.core.spec import Spec

Normalizer = Literal["batch", "layer", "none"]


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of `width` ReLU units, for points in the plane; He initialisation."""
    layers = (nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    return initialise(nn.Sequential(*layers), "he")  # type: ignore[return-value]


class Generator(nn.Module):
    """DCGAN's: noise (N, latent) → images (N, channels, size, size) in [−1, 1] by transposed convolutions.

    4×4 pixels of width·size/8 maps, then half the maps and twice the side a layer; batch norm (ε 1e-5, momentum 0.1)
    and ReLU between, tanh at the end. `size` is 8, 16, 32, 64, … The layers and their names are those of the published
    PyTorch layout: size 64, width 64, latent 100 and 3 channels make 3,576,704 parameters.
    """

    def __init__(self, channels: int, size: int, latent: int, width: int) -> None:
        super().__init__()
        maps = width * doublings(size)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, maps, 4, 1, 0, bias=False), BatchNorm(maps), nn.ReLU()]
        while maps > width:
            layers += [nn.ConvTranspose2d(maps, maps // 2, 4, 2, 1, bias=False), BatchNorm(maps // 2), nn.ReLU()]
            maps //= 2
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh())
        dcgan_init(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class Critic(nn.Module):
    """DCGAN's discriminator without the sigmoid: images (N, channels, size, size) in [−1, 1] → scores (N,).

    Strided convolutions halve the side and double the maps, LeakyReLU(0.2) between, down to 4×4, then one number.
    `normalizer`: ``batch`` as published (none after the first layer; 2,765,568 parameters for size 64, width 64 and 3
    channels), ``layer`` (over C, H, W of each image) or ``none``, the only two that treat every image by itself.
    """

    def __init__(self, channels: int, size: int, width: int, normalizer: Normalizer = "batch") -> None:
        super().__init__()
        maps, last = width, width * doublings(size)
        layers: list[nn.Module] = [nn.Conv2d(channels, maps, 4, 2, 1, bias=normalizer != "batch"), nn.LeakyReLU(0.2)]
        while maps < last:
            maps *= 2
            layers.append(nn.Conv2d(maps // 2, maps, 4, 2, 1, bias=normalizer == "none"))
            if normalizer != "none":
                layers.append(BatchNorm(maps) if normalizer == "batch" else nn.GroupNorm(1, maps))
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, nn.Conv2d(maps, 1, 4, 1, 0, bias=False))
        dcgan_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


class PointCritic(nn.Module):
    """Points (N, 2) → scores (N,): two hidden layers of ReLU units, nothing that ties the points of a batch.

    A difference of two mean scores does not feel the last `bias`, so the Wasserstein critics have none.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.main = mlp(2, width, 1)
        if not bias:
            self.main[-1].bias = None  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


def players(
    spec: Spec, latent: int, width: int, normalizer: Normalizer, bias: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Generator and critic for this data: perceptrons for points, DCGAN's networks for images.

    Points know no layer normalisation, so that is refused; they take "batch" for none, as DCGAN's first layers do.
    """
    if spec.shape == (2,):
        if normalizer == "layer":
            raise UserError("--normalizer layer is for images; the critic of points has no layer that it would change")
        return mlp(latent, width, 2), PointCritic(width, bias)
    channels, size, _ = spec.shape
    return Generator(channels, size, latent, width), Critic(channels, size, width, normalizer)


@torch.no_grad()
def dcgan_init(module: nn.Module) -> None:
    """Weights of convolutions N(0, 0.02²), scales of the norms N(1, 0.02²), biases 0 (the paper's section 3)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.normal_(0.0, 0.02)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, (BatchNorm, nn.GroupNorm)):
            assert layer.weight is not None
            assert layer.bias is not None
            layer.weight.normal_(1.0, 0.02)
            layer.bias.zero_()


def doublings(size: int) -> int:
    """How many times as many maps the 4×4 layer has as the one next to the image: size / 8."""
    if size < 8 or size & (size - 1):
        raise UserError(f"--size {size} cannot be reached by doubling 4 pixels; take 8, 16, 32, 64, …")
    return size // 8
