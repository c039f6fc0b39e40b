"""Initialisers: one variance-scaling draw, an orthogonal one, and a bias constant

Paper: LeCun, Bottou, Orr & Müller, Efficient BackProp, 1998; Glorot & Bengio, Understanding the difficulty of training
deep feedforward neural networks, 2010; He, Zhang, Ren & Sun, Delving Deep into Rectifiers, 2015, arXiv:1502.01852;
Saxe, McClelland & Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear networks, 2013,
arXiv:1312.6120.

Equation: W_ij ~ (0, σ²) with σ² = scale / n, n = fan_in, fan_out, their mean, or 1:
    lecun  1 / fan_in          glorot  2 / (fan_in + fan_out)          he  2 / fan_in          small  0.01²
For z_i = Σ_j W_ij a_j over fan_in terms, E[z²] = fan_in σ² E[a²]: `lecun` keeps the second moment of a linear layer;
behind a ReLU E[relu(z)²] = ½E[z²], so `he` keeps it.

Differences:
- E16: the notes mix variance and standard deviation. N(0, .0001) is a variance, so `small` has σ = 0.01; and their
  N(0, 1/√D) is Var = 1/D.
- E17: Var = 1/D_a is LeCun's fan-in scaling; Glorot's (Xavier's) is 2/(fan_in + fan_out). Equal for square layers.
- E18: a ReLU halves the *second moment*; the variance falls to (½ − 1/2π)σ² = 0.3408σ². 2/D_a keeps E[z²] = σ_a².
  The name is He (Kaiming), not Xavier.
- E19: at zero bias half of the ReLUs are *inactive* for an input, not dead; dead is inactive for every input
  (`active_fraction`, `dead_fraction`). The bias is 0 unless asked for.
- E20: it is the *singular values* of the Jacobians that should be near 1; the signs of QR are fixed, without which Q
  is not uniform (Haar); a ReLU needs the gain √2.
"""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

Fan = Literal["in", "out", "average", "none"]
Distribution = Literal["normal", "uniform", "truncated"]
Init = Literal["small", "lecun", "glorot", "he", "orthogonal"]
"""What a `--init` flag may say."""

_SCALING: dict[str, tuple[float, Fan]] = {
    "small": (1e-4, "none"),
    "lecun": (1.0, "in"),
    "glorot": (1.0, "average"),
    "he": (2.0, "in"),
}
# standard deviation of a standard normal cut off at ±2: √(1 − 4φ(2)/(2Φ(2) − 1))
_CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def fans(shape: torch.Size | tuple[int, ...], groups: int = 1, transposed: bool = False) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight: inputs that reach one output, and outputs that one input reaches.

    (out, in) for a linear layer; (out, in/groups, *kernel) for a convolution, where both count the kernel's positions:
    in·k·k. A transposed convolution stores (in, out/groups, *kernel). Raises ValueError below two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(f"a weight needs at least 2 dimensions to have fans, got shape {tuple(shape)}")
    field = math.prod(shape[2:])
    if transposed:
        return shape[0] // groups * field, shape[1] * field
    return shape[1] * field, shape[0] // groups * field


@torch.no_grad()
def variance_scaling(
    weight: Tensor,
    scale: float = 1.0,
    fan: Fan = "in",
    distribution: Distribution = "normal",
    *,
    groups: int = 1,
    transposed: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `weight` with zero-mean draws of variance `scale` / n, n chosen by `fan`; returns it.

    `uniform` is U(−√3σ, √3σ); `truncated` a normal cut at two of its standard deviations and widened so that the
    variance is still σ². Raises ValueError for a negative scale or an unknown fan or distribution.
    """
    if scale < 0:
        raise ValueError(f"scale must be >= 0, got {scale}")
    if fan == "none":
        count = 1.0
    else:
        fan_in, fan_out = fans(weight.shape, groups, transposed)
        choices = {"in": fan_in, "out": fan_out, "average": (fan_in + fan_out) / 2}
        if fan not in choices:
            raise ValueError(f"fan must be one of {', '.join(get_args(Fan))}, got {fan!r}")
        count = choices[fan]
    std = math.sqrt(scale / max(count, 1))
    if distribution == "normal":
        return weight.normal_(0.0, std, generator=generator)
    if distribution == "uniform":
        return weight.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
    if distribution == "truncated":
        wide = std / _CUT
        return nn.init.trunc_normal_(weight, 0.0, wide, -2 * wide, 2 * wide, generator=generator)
    raise ValueError(f"distribution must be one of {', '.join(get_args(Distribution))}, got {distribution!r}")


@torch.no_grad()
def orthogonal(weight: Tensor, gain: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill `weight`, read as (out, in·k·k), with `gain` times a Haar-distributed (semi-)orthogonal matrix; returns it.

    Rows are orthonormal when out ≤ in·k·k (W Wᵀ = gain² I), columns otherwise (Wᵀ W = gain² I). The draw is Gaussian =
    QR with R's diagonal made positive, which makes the factorisation unique and hence Q uniform (Mezzadri 2007).
    """
    if weight.ndim < 2:
        raise ValueError(f"an orthogonal weight needs at least 2 dimensions, got shape {tuple(weight.shape)}")
    rows, columns = weight.shape[0], weight[0].numel()
    # half precision has no QR
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    shape = (max(rows, columns), min(rows, columns))
    gaussian = torch.empty(shape, dtype=dtype, device=weight.device).normal_(generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(dtype)
    return weight.copy_((q if rows >= columns else q.T).reshape(weight.shape) * gain)


def initialise(
    module: nn.Module,
    name: Init = "he",
    *,
    gain: float | None = None,
    bias: float = 0.0,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Apply the initialiser `name` to the weights of every linear and convolutional layer in `module`; returns it.

    `gain` multiplies the standard deviation (default 1; √2 is right behind a ReLU for `orthogonal`). Biases become
    `bias`. Normalisation, embedding and recurrent layers keep their own initial values; a weight that two layers share
    is drawn once. Raises ValueError for an unknown name, when `module` has no layer to initialise, or for a weight that
    is computed by `nn.utils.parametrize`, which a draw would not reach.
    """
    if name not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {name!r}")
    factor = 1.0 if gain is None else gain
    done: set[int] = set()
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or id(layer.weight) in done:
            continue
        done.add(id(layer.weight))
        if nn.utils.parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"the weight of {layer} is computed by a parametrization: initialise it before that is added"
            )
        if name == "orthogonal":
            orthogonal(layer.weight, factor, generator=generator)
        else:
            scale, fan = _SCALING[name]
            groups = cast(int, getattr(layer, "groups", 1))
            transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
            variance_scaling(
                layer.weight,
                scale * factor**2,
                fan,
                distribution,
                groups=groups,
                transposed=transposed,
                generator=generator,
            )
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)
    if not done:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to initialise")
    return module


def active_fraction(pre_activations: Tensor) -> float:
    """Share of (example, unit) pairs of an (N, units, …) tensor where the ReLU passes its input: z > 0."""
    return (pre_activations > 0).double().mean().item()


def dead_fraction(pre_activations: Tensor) -> float:
    """Share of units of an (N, units, …) tensor that no example (and no position) activates."""
    units = pre_activations.transpose(0, 1).flatten(1)
    return (units <= 0).all(dim=1).double().mean().item()
