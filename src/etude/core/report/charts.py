"""Curves over steps as SVG, with their axes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from etude.core.report.reading import CLOCKS, HUGE, Series
from etude.core.report.words import escape, number, spaced, tick

POINTS = 1000  # a curve is drawn with at most this many points
SMOOTH_FROM = 60  # curves of at least this many values get a moving mean drawn over them


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: the interval it shows, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: Any) -> Any:
        """Position of a value (number or array) on the axis: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return (np.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round numbers inside the interval: 1, 2 or 5 times a power of ten; powers of ten if log."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first + 1) / (count + 1)))
            return [10.0**k for k in range(first, last + 1) if k % stride == 0]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        unit = next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999) * power
        first, last = math.ceil(self.low / unit - 1e-9), math.floor(self.high / unit + 1e-9)
        return [k * unit for k in range(first, last + 1)]


_FALLS = re.compile(
    r"loss|nll|error|exploitab|gap|norm|variance|risk|distance|objective|residual|divergence|frechet", re.IGNORECASE
)


def value_axis(name: str, values: np.ndarray) -> Axis:
    """The vertical axis for these finite values: logarithmic for what falls without a bound (losses, errors, distances)
    over more than two decades; shares, accuracies, rates of exploration and returns are shown as they are."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 100 and _FALLS.search(name):
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, log=True)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return Axis(low - room, high + room)
    room = (high - low) * 0.05
    bottom = 0.0 if 0 <= low < 0.3 * high else low - room
    return Axis(bottom, high + room)


def thin(steps: np.ndarray, values: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most ``limit`` points of a curve so that its drawing does not change: both ends, and in each of equal
    stretches the lowest and the highest value, in their order. A single spike survives. Values must be finite."""
    n = len(values)
    if n <= limit:
        return steps, values
    inner = np.arange(1, n - 1)
    kept = [0]
    for part in np.array_split(inner, (limit - 2) // 2):
        low, high = part[0] + int(values[part].argmin()), part[0] + int(values[part].argmax())
        kept += sorted({low, high})
    kept.append(n - 1)
    return steps[kept], values[kept]


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred moving mean over about a fiftieth of the curve, and its width. The window shrinks symmetrically at the
    start, so a steep beginning stays where it is; at the end only its right half is missing. Values must be finite."""
    n = len(values)
    half = max(1, n // 100)
    position = np.arange(n)
    first = position - np.minimum(half, position)
    last = np.minimum(2 * position - first, n - 1)
    total = np.concatenate([[0.0], np.cumsum(values - values.mean())])
    return (total[last + 1] - total[first]) / (last + 1 - first) + values.mean(), 2 * half + 1


_HELD_OUT = re.compile(r"^(test|val|eval)|_(test|valid|val|eval)$")
_SPLITS = re.compile(r"^(train|training|test|valid|validation|val|eval|evaluation)_|_(train|test|valid|val|eval)$")


def groups(series: Iterable[Series]) -> list[list[Series]]:
    """Series that share a chart: the same number on different splits (``loss`` with ``test_loss``), training first."""
    found: dict[str, list[Series]] = {}
    for one in series:
        found.setdefault(_SPLITS.sub("", one.name), []).append(one)
    return [sorted(group, key=lambda one: bool(_HELD_OUT.search(one.name))) for group in found.values()]


def chart(group: Sequence[Series], span: tuple[float, float] | None = None, name: str = "") -> str:
    """One chart as HTML: an SVG whose plane is stretched to the page (lines keep their width) with labels set as text,
    so that type stays the same size on a telephone and on a wall. ``span`` is the first and last step to show, ``name`` what is
    drawn, where the series are called by something else."""
    shown = [one.finite for one in group if len(one.finite.steps)]
    if not shown:
        label = " and ".join(spaced(one.name) for one in group)
        return f'<figure class="chart"><figcaption><b>{escape(label)}</b> <i>no finite value</i></figcaption></figure>'
    first, last = span or (min(float(one.steps[0]) for one in group), max(float(one.steps[-1]) for one in group))
    across = Axis(first, last) if last > first else Axis(first - 1, first + 1)
    up = value_axis(name or group[0].name, np.concatenate([one.values for one in shown]))
    curves = [_curve(one, f"s{i % 8}", across, up) for i, one in enumerate(group)]
    drawn = [curve.behind for curve in reversed(curves)] + [curve.before for curve in curves]
    said = "; ".join(_said(one) for one in shown)
    heights = [(value, 1000 * (1 - float(up.place(value)))) for value in up.ticks(4)]
    places = [(value, 1000 * float(across.place(value))) for value in across.ticks(4) if value == int(value)]
    grid = "".join(f"M0 {_c(y / 1000)}H1000" for _, y in heights)
    ys = "".join(f'<span style="top:{y / 10:.2f}%">{tick(value)}</span>' for value, y in heights)
    xs = "".join(f'<span style="left:{x / 10:.2f}%">{tick(value)}</span>' for value, x in places)
    scale = '<i class="scale">log scale</i>' if up.log else ""
    return (
        f'<figure class="chart"><figcaption>{"".join(c.key for c in curves)}<i class="at" hidden></i>{scale}</figcaption>'
        f'<div class="frame"><div class="ys" aria-hidden="true">{ys}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(said)}" '
        f'data-unit="{unit_of(group[0].clock)}" '
        f'data-x="{across.low!r} {across.high!r}" data-y="{up.low!r} {up.high!r}" data-log="{int(up.log)}">'
        f'<path class="grid" d="{grid}"/>{"".join(drawn)}<path class="cursor" d=""/></svg>'
        f'<div class="xs" aria-hidden="true">{xs}</div></div></figure>'
    )


class _Curve(NamedTuple):
    """One series of a chart: what is drawn behind the other curves, what before them, and its key."""

    behind: str
    before: str
    key: str


def _curve(series: Series, style: str, across: Axis, up: Axis) -> _Curve:
    """A line with a mark for every value that is not finite; a long one thin, behind its moving mean."""
    one = series.finite
    bad = series.steps[~(np.abs(series.values) < HUGE)]
    behind, before = "", "".join(f'<path class="bad" d="M{_c(across.place(step))} 1000V940"/>' for step in bad[:50])
    if not len(one.steps):
        return _Curve(behind, before, "")
    raw = _path(across, up, *thin(one.steps, one.values))
    end, title = number(one.values[-1]), "last value"
    if len(one.steps) >= SMOOTH_FROM:
        # on a logarithmic axis the mean of logarithms: a running sum would drown what is decades below the rest
        mean, width = smooth(np.log(one.values) if up.log else one.values)
        mean, kind = (np.exp(mean), "moving geometric mean") if up.log else (mean, "moving mean")
        end, title = number(mean[-1]), f"{kind} over {width} values, drawn thick over the values themselves"
        behind = f'<path class="raw {style}" d="{raw}"/>'
        before += f'<path class="line {style}" d="{_path(across, up, *thin(one.steps, mean, 300))}"/>'
    else:
        before += f'<path class="line {style}" d="{raw}"/>'
        if len(one.steps) <= 40:
            before += f'<path class="dots {style}" d="{_dots(across, up, one.steps, one.values)}"/>'
    key = (
        f'<span class="key {style}" title="{escape(title)}"><b>{escape(spaced(one.name))}</b> '
        f'<output data-end="{end}">{end}</output></span>'
    )
    return _Curve(behind, before, key)


def _said(one: Series) -> str:
    """A curve of finite values in words, for who cannot see it."""
    unit = unit_of(one.clock)
    return (
        f"{spaced(one.name)}: {number(one.values[0])} at {unit} {number(one.steps[0])}, "
        f"{number(one.values[-1])} at {unit} {number(one.steps[-1])}, lowest {number(one.values.min())}, "
        f"highest {number(one.values.max())}"
    )


def unit_of(clock: str) -> str:
    """One of what the axis counts: step, environment step, episode."""
    return CLOCKS[clock][0].removesuffix("s") if clock else "step"


def _path(across: Axis, up: Axis, steps: np.ndarray, values: np.ndarray) -> str:
    """SVG path through these points in a 1000 × 1000 plane, y downwards; a lone point becomes a dot."""
    points = [f"{_c(x)} {_c(1 - y)}" for x, y in zip(across.place(steps), up.place(values))]
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")


def _dots(across: Axis, up: Axis, steps: np.ndarray, values: np.ndarray) -> str:
    return "".join(f"M{_c(x)} {_c(1 - y)}h0" for x, y in zip(across.place(steps), up.place(values)))


def _c(place: float) -> str:
    """A coordinate in the plane, at most two decimals."""
    return f"{1000 * place:.2f}".rstrip("0").rstrip(".")
