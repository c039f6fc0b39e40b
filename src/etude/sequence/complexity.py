"""Complexity: what attention, recurrence and convolution cost, counted exactly

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 4 and table 1.

Equation: n positions of width d, kernel k, window r; products are multiplications in matrix products
                              products of a layer     rounds    applications from the first position to the last
    self-attention            2n²d + 4nd²             4         1
    restricted to r keys      2nrd + 4nd²             4         ⌈2(n−1)/(r−1)⌉
    recurrence                2nd²                    n         n − 1
    gated recurrence (LSTM)   8nd²                    n         n − 1
    convolution               knd²                    1         ⌈(n−1)/(k−1)⌉
    dilated convolutions      knd²                    1         ⌈log_k n⌉               (dilation k^l in layer l)
Rounds are products that wait for one another. The quadratic part 2n²d (QKᵀ and αV) equals
    the recurrence at n = d;  attention's own projections at n = 2d;  the LSTM at n = 4d;  all else in a Transformer layer
    (projections and networks, 12nd²) at n = 6d

Algorithm:
1. for n = 8, 16, … `longest`: run each layer on tensors without content and count the products that are dispatched
2. rounds: the longest chain of products in the graph of that run
3. n up to `traced`: which outputs of one application depend on which inputs, by its Jacobian; then the least number of
   applications after which the last position depends on the first
4. the least n at which the quadratic part is as much as each of the others
5. seconds of each layer on numbers: drawn, and in no number that is returned

Differences:
- E67: the notes say that O(n²) "isn't really a huge issue". It is none while n is below a few d: from 6d on a layer's quadratic
  part outweighs all the rest, and it is what grows.
- Table 1 has orders; here are counts, with the projections that it leaves out of self-attention (n²d): below n = 2d they lead.
- Convolutions are causal, over a position and the k − 1 before it. Centred and dilated ones do not get from one end to the other
  in ⌈log_k(2n−1)⌉ layers: 7 = 9 − 3 + 1 would pass outside.
- Additions, softmax, biases and activations are not counted; padding at the ends is.
- Chance has no part: the method is deterministic.

Expect: CPU 8 s → every count as in the closed form; the quadratic part catches up with the rest of a layer at n = 6d.
Command: `etude run sequence/complexity`
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Range
from etude.core.errors import UserError
from etude.core.run import Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    width: Count = 64
    """Width of a position's vector, d."""
    kernel: Annotated[int, Range(2, 1001)] = 3
    """Kernel of the convolutions, k."""
    window: Annotated[int, Range(3, 100_001)] = 15
    """Keys that a query of restricted attention sees, r, odd."""
    longest: Annotated[int, Range(8, 100_000)] = 1024
    """Longest sequence; lengths double from 8."""
    traced: Annotated[int, Range(8, 256)] = 32
    """Longest sequence whose paths are followed (the Jacobian has n² entries)."""


PRESETS = {
    "tiny": Config(width=4, longest=32, traced=16),
    "default": Config(),
    "wide": Config(width=512, longest=4096),
}

SETTINGS = {"kernel": 5, "window": 5, "longest": 16, "traced": 8}

METRICS = {
    "wrong_entries": "entries of the table (products, rounds, paths) that are not exactly their closed form",
    "table_1_wrong_entries": "products of self-attention that are not table 1's n²d, for any factor: projections are left out",
    "crossing_*": "least n, in units of d, at which attention's quadratic part is as much as this",
}

EXPERIMENTS = (
    Experiment(
        "counts", preset="default", metric="wrong_entries", bar=0.0, better="lower", seeds=(0,),
        published="table 1 of Vaswani et al. has the orders",
        controls=(
            Control("n² alone, without the projections", metric="table_1_wrong_entries"),
            Control("dilations that do not grow", swap={"dilation": "etude.sequence.parts.nulls.undilated"}),
            Control("a window that is not kept", swap={"windows": "etude.sequence.parts.nulls.wider_windows"}),
        ),
    ),
    Experiment(
        "crossing", preset="default", metric="crossing_layer", bar=6.0, better="near", seeds=(0,),
        notes="E67: the quadratic part of a Transformer layer is the smaller one up to n = 6d",
        controls=(Control("the network between is left out", metric="crossing_projections"),),
    ),
)  # fmt: skip

Weights = dict[str, Tensor]
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which operand has the summed dimension last
BACKWARD = ("MmBackward0", "BmmBackward0", "AddmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0")


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products and convolutions that run under it: (M, K) by (K, N) is MKN.

    `by` has them by the operation's name; products of more than one matrix at once (bmm) are those of queries, keys and values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.by[name] += out.numel() * args[PRODUCTS[name]].shape[-1]
        elif name == "convolution":
            self.by[name] += out.numel() * args[1][0].numel()
        return out


def chain(out: Tensor) -> int:
    """The most products that wait for one another in the graph behind `out`."""
    depth: dict[Any, int] = {}
    waiting = [(out.grad_fn, False)]
    while waiting:
        node, done = waiting.pop()
        if node is None or node in depth:
            continue
        behind = [before for before, _ in node.next_functions if before is not None]
        if done:
            depth[node] = max((depth[before] for before in behind), default=0) + (node.name() in BACKWARD)
        else:
            waiting += [(node, True), *((before, False) for before in behind if before not in depth)]
    return depth[out.grad_fn]


# -------------------------------------------------------------------------------------- layers: x (n, d) → (n, d)


def attention(x: Tensor, by: Weights) -> Tensor:
    """softmax(QKᵀ/√d)V·W_O."""
    q, k, v = (x @ by[name] for name in "qkv")
    weights = torch.bmm(q[None], k.t()[None]).div(math.sqrt(x.shape[1])).softmax(-1)
    return torch.bmm(weights, v[None])[0] @ by["o"]


def restricted(x: Tensor, by: Weights, window: int) -> Tensor:
    """The same, each query seeing the `window` keys around it; what lies beyond the ends is zero and hidden."""
    q, k, v = (x @ by[name] for name in "qkv")
    seen = windows(torch.ones_like(x[:, :1]), window) > 0  # (n, 1, r)
    scores = torch.bmm(q[:, None], windows(k, window)).div(math.sqrt(x.shape[1]))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.bmm(weights, windows(v, window).transpose(1, 2))[:, 0] @ by["o"]


def windows(x: Tensor, window: int) -> Tensor:
    """(n, d) → (n, d, r): for each position the r around it."""
    return F.pad(x.t(), (window // 2, window // 2)).unfold(1, window, 1).transpose(0, 1)


def cell(given: Tensor, h: Tensor, by: Weights) -> Tensor:
    """tanh(given + h·U) for any number of rows: one application of the recurrence."""
    return torch.tanh(given + h @ by["u"])


def recurrence(x: Tensor, by: Weights) -> Tensor:
    """h_t = cell(x_t·W, h_{t−1}), one t after the other."""
    given, h, states = x @ by["w"], torch.zeros_like(x[:1]), []
    for row in given.split(1):
        h = cell(row, h, by)
        states.append(h)
    return torch.cat(states)


def gates(given: Tensor, h: Tensor, c: Tensor, by: Weights) -> tuple[Tensor, Tensor]:
    """The LSTM's step, for any number of rows."""
    i, f, o, g = (given + h @ by["u4"]).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gated(x: Tensor, by: Weights) -> Tensor:
    """An LSTM: four gates of the input and of the state."""
    given, h, c, states = x @ by["w4"], torch.zeros_like(x[:1]), torch.zeros_like(x[:1]), []
    for row in given.split(1):
        h, c = gates(row, h, c, by)
        states.append(h)
    return torch.cat(states)


def convolution(x: Tensor, by: Weights, dilated: int = 1) -> Tensor:
    """A kernel over each position and the k − 1 before it, `dilated` apart; zeros before the beginning."""
    before = (by["kernel"].shape[-1] - 1) * dilated
    return F.conv1d(F.pad(x.t()[None], (before, 0)), by["kernel"], dilation=dilated)[0].t()


def dilation(layer: int, kernel: int) -> int:
    """How far apart the positions of a dilated kernel lie in this layer, from 0."""
    return kernel**layer


def layer_of(kind: str, config: Config) -> Callable[[Tensor, Weights], Tensor]:
    """The layer of this name."""
    if kind == "restricted":
        return lambda x, by: restricted(x, by, config.window)
    return {"attention": attention, "recurrence": recurrence, "gated": gated}.get(kind, convolution)


KINDS = {
    "attention": "self-attention",
    "restricted": "restricted self-attention",
    "recurrence": "recurrence",
    "gated": "LSTM",
    "convolution": "convolution",
    "dilated": "dilated convolutions",
}


def weights(config: Config, device: str, dtype: torch.dtype = torch.float32) -> Weights:
    """All matrices that the layers take, always the same ones."""
    d, dice = config.width, torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(["q", "k", "v", "o", "w", "u"], (d, d)) | {"w4": (d, 4 * d), "u4": (d, 4 * d)}
    shapes["kernel"] = (d, d, config.kernel)  # type: ignore[assignment]
    made = {name: torch.randn(shape, generator=dice, dtype=dtype) / math.sqrt(d) for name, shape in shapes.items()}
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


# --------------------------------------------------------------------------------------------- measured, and in closed form


def measured(kind: str, n: int, config: Config) -> tuple[int, int]:
    """Lines 1 and 2: products of one layer on n positions, and rounds."""
    x = torch.empty(n, config.width, device="meta", requires_grad=True)
    with Products() as counter:
        out = layer_of(kind, config)(x, weights(config, "meta"))
    return counter.by.total(), chain(out)


def applied(kind: str, n: int, config: Config, layer: int) -> Tensor:
    """Line 3: which outputs of one application depend on which inputs, (n, n) bool, by its Jacobian at a fixed point.

    An application is a layer; of a recurrence, whose layer is many rounds, it is one step of the state, at all positions at once.
    """
    small = Config(width=2, kernel=config.kernel, window=config.window)
    by = weights(small, "cpu", torch.float64)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def once(h: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        if kind == "recurrence":
            return cell(x, before, by)
        if kind == "gated":
            return gates(x.repeat(1, 4), before, before, by)[0]
        if kind == "dilated":
            return convolution(h, by, dilation(layer, config.kernel))
        return layer_of(kind, config)(h, by)

    jacobian = torch.autograd.functional.jacobian(once, x, vectorize=True)
    return jacobian.abs().sum((1, 3)) > 0  # type: ignore[union-attr]


def path(kind: str, n: int, config: Config) -> int:
    """The least number of applications after which the last position depends on the first."""
    reached, count = torch.zeros(n), 0
    reached[0] = 1
    same = None if kind == "dilated" else applied(kind, n, config, 0).float()
    while not reached[-1] and count < n:
        reached = ((applied(kind, n, config, count).float() if same is None else same) @ reached > 0).float()
        count += 1
    return count


def closed(kind: str, n: int, config: Config) -> tuple[int, int, int]:
    """Products, rounds and path as the equations on top have them."""
    d, k, r = config.width, config.kernel, config.window
    projections = 4 * n * d * d
    levels = 0
    while k**levels < n:
        levels += 1
    return {
        "attention": (2 * n * n * d + projections, 4, 1),
        "restricted": (2 * n * r * d + projections, 4, -(-2 * (n - 1) // (r - 1))),
        "recurrence": (2 * n * d * d, n, n - 1),
        "gated": (8 * n * d * d, n, n - 1),
        "convolution": (k * n * d * d, 1, -(-(n - 1) // (k - 1))),
        "dilated": (k * n * d * d, 1, levels),
    }[kind]


def crossings(config: Config) -> dict[str, float]:
    """Line 4: the least n, over d, at which 2n²d as counted reaches the count of what it is held against."""

    def quadratic(n: int) -> int:
        with Products() as counter:
            attention(torch.empty(n, config.width, device="meta"), by)
        return counter.by["bmm"]

    def others(n: int) -> dict[str, int]:
        x = torch.empty(n, config.width, device="meta")
        with Products() as counter:
            attention(x, by)
        projections = counter.by["mm"]
        with Products() as counter:
            x @ by["w4"] @ by["w4"].t()  # the network between: d → 4d → d
        return {
            "recurrence": measured("recurrence", n, config)[0],
            "projections": projections,
            "gated": measured("gated", n, config)[0],
            "layer": projections + counter.by["mm"],
        }

    by, found = weights(config, "meta"), {}
    for name, one in others(1).items():  # each is linear in n
        low, high = 0, 64 * config.width  # quadratic(low) < low·one, quadratic(high) ≥ high·one
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if quadratic(middle) >= middle * one else (middle, high)
        found[name] = high / config.width
    return found


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network is kept."""
    return {}


@method("sequence/complexity", paper="arXiv:1706.03762", section="6.7.4", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.window % 2 == 0:
        raise UserError(f"--window is {config.window}; it must be odd, so that it has a middle")
    lengths = [8 << i for i in range(int(math.log2(config.longest / 8)) + 1)]
    table = Box(entries=np.full((len(KINDS), len(lengths), 3), -1, dtype=np.int64))
    run.track(table=table)
    for step in run.steps(len(lengths)):
        n = lengths[step]
        for row, kind in enumerate(KINDS):
            table.entries[row, step, :2] = measured(kind, n, config)  # lines 1, 2
            if n <= config.traced:
                table.entries[row, step, 2] = path(kind, n, config)  # line 3
            run.log(**{f"products_{kind}": float(table.entries[row, step, 0])})
    forms = np.array([[closed(kind, n, config) for n in lengths] for kind in KINDS])
    wrong = (table.entries != forms) & (table.entries >= 0)
    ratio = table.entries[0, :, 0] / np.array(lengths) ** 2  # a multiple of n² at every n?
    crossing = crossings(config)
    run.artifact("table", listed(table.entries, lengths), "Counted, in place of table 1's orders.")
    run.artifact("costs", costs(table.entries, lengths, timed(config, lengths), config, crossing), CAPTION)
    return {
        "wrong_entries": float(wrong.sum()),
        "table_1_wrong_entries": float((ratio != ratio[-1]).sum()),
        **{f"crossing_{name}": value for name, value in crossing.items()},
    }


CAPTION = (
    "Squares: where the quadratic part is as much as the recurrence (n = d), its own projections (2d), the LSTM (4d), all the "
    "rest of a Transformer layer (6d)."
)


def timed(config: Config, lengths: list[int]) -> np.ndarray:
    """Line 5: CPU seconds of one forward pass of each layer, the least of three; (kinds, lengths)."""
    by, found = weights(config, "cpu"), np.zeros((len(KINDS), len(lengths)))
    for row, kind in enumerate(KINDS):
        for column, n in enumerate(lengths):
            x, layer, spent = torch.ones(n, config.width), layer_of(kind, config), []
            with torch.no_grad():
                for _ in range(3):
                    begun = time.process_time()
                    layer(x, by)
                    spent.append(time.process_time() - begun)
            found[row, column] = min(spent)
    return found


def listed(entries: np.ndarray, lengths: list[int]) -> str:
    """The table as text, for the longest sequence whose paths were followed and for the longest of all."""
    lines = [f"{'layer':<26}{'n':>8}{'products':>18}{'rounds':>9}{'path':>7}"]
    told = [max((i for i in range(len(lengths)) if entries[0, i, 2] >= 0), default=0), len(lengths) - 1]
    for name, rows in zip(KINDS.values(), entries.tolist()):
        for place in dict.fromkeys(told):
            n, (products, rounds, hops) = lengths[place], rows[place]
            lines.append(f"{name:<26}{n:>8}{products:>18,}{rounds:>9,}{hops if hops >= 0 else '':>7}")
    return "\n".join(lines) + "\n"


def costs(
    entries: np.ndarray, lengths: list[int], seconds: np.ndarray, config: Config, crossing: dict[str, float]
) -> Any:
    """Products (left) and seconds (right) over n, and where the quadratic part has caught up."""
    figure, (left, right) = panels(2, width=10, height=4.0)
    for row, (kind, name) in enumerate(KINDS.items()):
        if kind == "dilated":
            continue  # costs what the convolution costs
        style = {"color": PALETTE[row], "linewidth": 1.6, "marker": "o", "markersize": 3, "label": name}
        left.plot(lengths, entries[row, :, 0], **style)
        right.plot(lengths, 1e3 * seconds[row], **style)
    quadratic = [2 * n * n * config.width for n in lengths]
    left.plot(lengths, quadratic, ":", color=INK, linewidth=1.2, label="its quadratic part, 2n²d")
    for value in crossing.values():
        n = value * config.width
        if lengths[0] <= n <= lengths[-1]:
            left.plot([n], [2 * n * n * config.width], "s", color=INK, markersize=4)
            where = {"xytext": (6, -9), "textcoords": "offset points", "fontsize": 8, "color": INK}
            left.annotate("d" if value == 1 else f"{value:g}d", (n, 2 * n * n * config.width), **where)
    for axes, title, unit in ((left, "Products of one layer", "multiplications"), (right, "One forward pass", "ms")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        label(axes, f"{title}, d = {config.width}", "positions n", unit)
    legend(left, loc="upper left")
    return figure
