"""The report of one run: a single HTML page that opens anywhere, offline, with or without JavaScript.

`render` reads a run folder and writes `report.html` into it. It knows no method and never imports torch: whatever a
method logged, returned or drew is shown by its shape (a number over steps, a picture, a table, a text). Every file may
be missing, because a run that has just started, or has failed, deserves a report too; a file that cannot be read is
named at the foot of the page. The page loads nothing: pictures, style and script are inside it, and a content security
policy with the hash of our one script makes the browser refuse anything else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import io
import json
import math
import os
import re
import shlex
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

POINTS = 1000  # a curve is drawn with at most this many points
SMOOTH_FROM = 60  # curves of at least this many values get a moving mean drawn over them
FRAMES = 12  # a filmstrip shows at most this many frames
PICTURE_BYTES = 400_000  # larger still pictures are re-encoded
ANIMATION_BYTES = 3_000_000  # larger animations are shown by their first frame
TEXT_CHARACTERS = 4000  # longer texts are cut, with a note
TABLE_ROWS = 200
HUGE = 1e300  # a number beyond this is shown as one that is not finite: no axis could hold it

_Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Contract:
    """What the catalogue knows of a method; the report quotes it beside the run. Every field may be left empty."""

    title: str = ""
    """One-line claim."""
    paper: str = ""
    """Reference; an ``arXiv:`` identifier in it becomes a link."""
    section: str = ""
    """Section of the course notes."""
    equation: str = ""
    algorithm: str = ""
    differences: str = ""
    expect: str = ""
    docs: str = ""
    """Any further text of the docstring."""
    fields: tuple[tuple[str, str], ...] = ()
    """(name, help) of every configuration field."""
    bars: tuple[dict[str, Any], ...] = ()
    """Bars to hold results against: ``metric``, ``bar``, ``better`` ("higher" or "lower"), ``published`` (text), and
    where known ``name``, ``preset`` and ``flags`` (the settings the bar was set for)."""
    card: dict[str, Any] | None = None
    """The evidence card that ``etude verify`` wrote, if any."""
    samples: bool = True
    """Whether ``etude sample`` works for this method."""


def render(folder: Path, contract: Contract | None = None) -> Path:
    """Write ``report.html`` into this run folder and return its path; the old page stays until the new one is whole.

    Raises FileNotFoundError if the folder does not exist. Missing or damaged files inside it are not errors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}")
    page = _page(_Record(folder), contract or Contract())
    path = folder / "report.html"
    part = folder / f".report.{os.getpid()}.part"
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# ------------------------------------------------------------------------------------------------ reading the folder


class Series(NamedTuple):
    """One logged number over steps; both arrays are float64 of the same length, steps increasing."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        kept = np.abs(self.values) < HUGE
        return self if kept.all() else Series(self.name, self.steps[kept], self.values[kept])


class _Record:
    """Everything the run folder says, with a note of each file that could not be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []
        described = self._json("config.json", {})
        self.method = str(described.get("method") or folder.name)
        self.described = described
        self.config: dict[str, Any] = _dict(described.get("config"))
        self.default_config: dict[str, Any] | None = _dict(described.get("default_config")) or None
        self.environment = self._json("environment.json", {})
        self.sessions = [s for s in _list(self.environment.get("sessions")) if isinstance(s, dict)]
        self.result = {str(k): v for k, v in self._json("result.json", {}).items() if _is_number(v)}
        self.spec = self._json("spec.json", {})
        self.artifacts = [a for a in self._json("artifacts/index.json", []) if isinstance(a, dict) and "file" in a]
        self.series, damaged = read_metrics(folder / "metrics.jsonl")
        if damaged:
            self.unreadable.append(f"metrics.jsonl ({damaged} damaged {'line' if damaged == 1 else 'lines'} skipped)")
        self.failure = self._text("failed")
        self.done = (folder / "done").exists() and self.failure is None
        logged = max((float(s.steps[-1]) for s in self.series), default=0.0)
        reached = max((_float(s.get("to_step")) for s in self.sessions), default=0.0)
        self.last_step = int(max(logged, reached))

    @property
    def status(self) -> str:
        """done, failed, running (its session has not yet reported) or unfinished (still running, or stopped: the
        session's last sign of life, ``ended``, does not tell)."""
        if self.failure is not None:
            return "failed"
        if self.done:
            return "done"
        return "unfinished" if self.sessions and self.sessions[-1].get("ended") else "running"

    def seconds(self, kind: str = "seconds") -> float:
        """Seconds of all sessions together; ``loop_seconds`` counts only from the first step to the last."""
        return sum(_float(s.get(kind)) for s in self.sessions)

    def artifact_file(self, artifact: dict[str, Any]) -> Path | None:
        """The artifact's file, if it exists and lies inside the artifacts folder."""
        base = (self.folder / "artifacts").resolve()
        try:
            path = (base / str(artifact["file"])).resolve()
            return path if path.is_relative_to(base) and path.is_file() else None
        except (OSError, ValueError):  # a name the file system does not take
            return None

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def _json(self, name: str, empty: Any) -> Any:
        text = self._text(name)
        if text is None:
            return empty
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, type(empty)):
            self.unreadable.append(name)
            return empty
        return value


def read_metrics(path: Path) -> tuple[list[Series], int]:
    """Read ``metrics.jsonl`` into one series per metric, in order of first appearance; also count the damaged lines.

    A step that occurs twice (a run resumed from an earlier checkpoint) keeps its last value. ``null`` reads as NaN. An
    unfinished last line, which a running job leaves, is not damage.
    """
    columns: dict[str, tuple[array[float], array[float]]] = {}
    damaged = 0
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0
    with stream:
        while chunk := stream.readlines(1 << 20):
            try:  # one call for the whole chunk is twice as fast as one call a line
                rows = json.loads("[" + ",".join(chunk) + "]")
            except ValueError:
                rows = []
                for line in chunk:
                    try:
                        rows.append(json.loads(line))
                    except ValueError:
                        damaged += bool(line.strip()) and line.endswith("\n")
            for row in rows:
                step: Any = row.get("step") if isinstance(row, dict) else None
                if not _is_number(step) or not math.isfinite(step):
                    damaged += 1
                    continue
                for name, value in row.items():
                    if name == "step":
                        continue
                    if value is None:
                        value = math.nan
                    elif not _is_number(value):
                        continue
                    if name not in columns:
                        columns[name] = (array("d"), array("d"))
                    steps, values = columns[name]
                    steps.append(float(step))
                    values.append(float(value))
    return [Series(name, *_in_order(np.array(s), np.array(v))) for name, (s, v) in columns.items()], damaged


def _in_order(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return steps, values


# ------------------------------------------------------------------------------------------------------------- curves


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


_GROWS = re.compile(r"acc|precision|recall|f1|iou|return|reward|score|prob|rate|wins?\b", re.IGNORECASE)


def value_axis(name: str, values: np.ndarray) -> Axis:
    """The vertical axis for these finite values: logarithmic for loss-like numbers that span more than two decades."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 100 and not _GROWS.search(name):
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, log=True)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return Axis(low - room, high + room)
    room = (high - low) * 0.05
    bottom = 0.0 if 0 <= low < 0.3 * high else low - room
    return Axis(bottom, high + room)


_HELD_OUT = re.compile(r"^(test|val|eval)|_(test|valid|val|eval)$")
_SPLITS = re.compile(r"^(train|training|test|valid|validation|val|eval|evaluation)_|_(train|test|valid|val|eval)$")


def _groups(series: Iterable[Series]) -> list[list[Series]]:
    """Series that share a chart: the same number on different splits (``loss`` with ``test_loss``), training first."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(_SPLITS.sub("", one.name), []).append(one)
    return [sorted(group, key=lambda one: bool(_HELD_OUT.search(one.name))) for group in groups.values()]


def chart(group: Sequence[Series], span: tuple[float, float] | None = None) -> str:
    """One chart as HTML: an SVG whose plane is stretched to the page (lines keep their width) with labels set as text,
    so that type stays the same size on a telephone and on a wall. ``span`` is the first and last step to show."""
    finite = [one.finite for one in group]
    shown = [one for one in finite if len(one.steps)]
    label = " and ".join(_words(one.name) for one in group)
    if not shown:
        return f'<figure class="chart"><figcaption><b>{_e(label)}</b> <i>no finite value</i></figcaption></figure>'
    first, last = span or (min(float(one.steps[0]) for one in group), max(float(one.steps[-1]) for one in group))
    across = Axis(first, last) if last > first else Axis(first - 1, first + 1)
    up = value_axis(group[0].name, np.concatenate([one.values for one in shown]))

    drawn, keys, said = [], [], []
    for i, one in enumerate(finite):
        bad = group[i].steps[~(np.abs(group[i].values) < HUGE)]
        drawn += [f'<path class="bad" d="M{_c(across.place(step))} 1000V940"/>' for step in bad[:50]]
        if not len(one.steps):
            continue
        noisy = len(one.steps) >= SMOOTH_FROM
        raw = _path(across, up, *thin(one.steps, one.values))
        end, title = _number(one.values[-1]), "last value"
        if noisy:
            mean, width = smooth(one.values)
            end, title = _number(mean[-1]), f"moving mean over {width} values, drawn thick over the values themselves"
            drawn.insert(0, f'<path class="raw s{i % 4}" d="{raw}"/>')
            drawn.append(f'<path class="line s{i % 4}" d="{_path(across, up, *thin(one.steps, mean, 300))}"/>')
        else:
            drawn.append(f'<path class="line s{i % 4}" d="{raw}"/>')
            if len(one.steps) <= 40:
                drawn.append(f'<path class="dots s{i % 4}" d="{_dots(across, up, one.steps, one.values)}"/>')
        keys.append(
            f'<span class="key s{i % 4}" title="{_e(title)}"><b>{_e(_words(one.name))}</b> '
            f'<output data-end="{end}">{end}</output></span>'
        )
        said.append(
            f"{_words(one.name)}: {_number(one.values[0])} at step {_number(one.steps[0])}, "
            f"{_number(one.values[-1])} at step {_number(one.steps[-1])}, lowest {_number(one.values.min())}, "
            f"highest {_number(one.values.max())}"
        )
    heights = [(value, 1000 * (1 - float(up.place(value)))) for value in up.ticks(4)]
    places = [(value, 1000 * float(across.place(value))) for value in across.ticks(4) if value == int(value)]
    grid = "".join(f"M0 {_c(y / 1000)}H1000" for _, y in heights)
    ys = "".join(f'<span style="top:{y / 10:.2f}%">{_tick(value)}</span>' for value, y in heights)
    xs = "".join(f'<span style="left:{x / 10:.2f}%">{_tick(value)}</span>' for value, x in places)
    scale = '<i class="scale">log scale</i>' if up.log else ""
    return (
        f'<figure class="chart"><figcaption>{"".join(keys)}<i class="at" hidden></i>{scale}</figcaption>'
        f'<div class="frame"><div class="ys" aria-hidden="true">{ys}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{_e("; ".join(said))}" '
        f'data-x="{across.low!r} {across.high!r}" data-y="{up.low!r} {up.high!r}" data-log="{int(up.log)}">'
        f'<path class="grid" d="{grid}"/>{"".join(drawn)}<path class="cursor" d=""/></svg>'
        f'<div class="xs" aria-hidden="true">{xs}</div></div></figure>'
    )


def _path(across: Axis, up: Axis, steps: np.ndarray, values: np.ndarray) -> str:
    """SVG path through these points in a 1000 × 1000 plane, y downwards; a lone point becomes a dot."""
    points = [f"{_c(x)} {_c(1 - y)}" for x, y in zip(across.place(steps), up.place(values))]
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")


def _dots(across: Axis, up: Axis, steps: np.ndarray, values: np.ndarray) -> str:
    return "".join(f"M{_c(x)} {_c(1 - y)}h0" for x, y in zip(across.place(steps), up.place(values)))


def _c(place: float) -> str:
    return f"{1000 * place:.2f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------------------- numbers and words


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: Any) -> float:
    """A finite number as it is, anything else as 0."""
    return float(value) if _is_number(value) and math.isfinite(value) else 0.0


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    """Four significant digits, thousands grouped, no exponent where one can do without."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if value == int(value) and size < 1e9:
        text = f"{int(value):,}"
    elif size >= 1e9 or size < 1e-4:
        mantissa, _, power = f"{value:.3e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    else:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def _tick(value: float) -> str:
    """A number on an axis: as short as possible, k and M for thousands and millions."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * 0.9999:
            text = f"{value / unit:.4g}{letter}"
            break
    else:
        text = f"{value:.4g}" if size >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _moment(iso: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(iso))
        zone = moment.strftime(" %Z") if moment.tzinfo else ""
        return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"
    except ValueError:
        return str(iso or "")


def _value(value: Any) -> str:
    """A configuration value as the reader would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "–"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _quantity(name: str, value: Any) -> str:
    """``memory_gb`` and 24 as "memory 24 GB"."""
    stem, _, unit = name.rpartition("_")
    if stem and unit in ("gb", "mb"):
        return f"{_words(stem)} {_value(value)} {unit.upper()}"
    return f"{_words(name)} {_value(value)}"


_INLINE = re.compile(
    r"``?(?P<code>[^`\n]+)``?|arXiv:(?P<arxiv>\d{4}\.\d{4,5}|[a-z-]+/\d{7})|(?<![\w*])\*(?P<stress>[^\s*][^*\n]*?)\*(?![\w*])"
)


def _inline(text: str) -> str:
    """Escape, then set `code` and *stress* and link arXiv identifiers."""

    def mark(found: re.Match[str]) -> str:
        if found["code"]:
            return f"<code>{found['code']}</code>"
        if found["stress"]:
            return f"<em>{found['stress']}</em>"
        return f'<a href="https://arxiv.org/abs/{found["arxiv"]}">arXiv:{found["arxiv"]}</a>'

    return _INLINE.sub(mark, _e(text))


_ITEM = re.compile(r"^\s*(?:[-*•]|\(?(?P<number>\d+)[.)])\s+")


def _prose(text: str) -> str:
    """Docstring text as paragraphs and lists; indented blocks keep their lines."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if any(_ITEM.match(line) for line in lines):
            items: list[list[str]] = []
            lead: list[str] = []
            for line in lines:
                if _ITEM.match(line):
                    items.append([line])
                else:
                    (items[-1] if items else lead).append(line)
            if lead:
                out.append(f"<p>{_inline(' '.join(line.strip() for line in lead))}</p>")
            tag = "ol" if (_ITEM.match(items[0][0]) or {"number": None})["number"] else "ul"
            body = "".join(f"<li>{_inline(_ITEM.sub('', ' '.join(x.strip() for x in item)))}</li>" for item in items)
            out.append(f"<{tag}>{body}</{tag}>")
        elif all(line.startswith("    ") for line in lines if line.strip()):
            out.append(_formula(block))
        elif block.strip():
            out.append(f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>")
    return "".join(out)


def _formula(text: str) -> str:
    lines = text.strip("\n").split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    body = [lines[0].strip()] + [line[margin:] for line in lines[1:]]
    return f'<pre class="formula">{_e(chr(10).join(body))}</pre>'


# ----------------------------------------------------------------------------------------------------------- sections


def _page(record: _Record, contract: Contract) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    pictures = any(a.get("kind", "image") in ("image", "animation") for a in record.artifacts)
    sections = [
        ("headline", "Result", _headline(record, contract)),
        ("curves", "Curves", _curves(record, contract)),
        ("pictures", "Pictures" if pictures or not record.artifacts else "Samples", _pictures(record)),
        ("run", "What was run", _what_was_run(record)),
        ("config", "Settings", _settings(record, contract)),
        ("contract", "The method", _contract(record, contract)),
        ("next", "How to go on", _next(record, contract)),
    ]
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2><div class="body">{content}</div></section>'
        for name, title, content in sections
    )
    notes = "".join(f"<p>Could not be read: {_e(name)}.</p>" for name in record.unreadable)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="etude">'
        f"<title>{_e(record.method)} · {_e(record.status)} · etude</title>"
        f"<style>{style}</style></head>\n<body><main>{_header(record, contract)}{body}"
        f"<footer>{notes}<p>Written by etude from the run folder <code>{_e(record.folder.name)}</code>. "
        "This page is one file and needs no network.</p></footer></main>"
        f"<script>{script}</script></body></html>\n"
    )


@functools.cache
def _asset(name: str) -> str:
    return importlib.resources.files("etude.core").joinpath(name).read_text(encoding="utf-8")


def _header(record: _Record, contract: Contract) -> str:
    status = record.status
    mark = {"done": "✓", "failed": "✕", "running": "●", "unfinished": "◐"}[status]
    facts = [f"preset {record.described['preset']}"] if record.described.get("preset") else []
    if record.described.get("seed") is not None:
        facts.append(f"seed {record.described['seed']}")
    started = record.environment.get("started")
    facts += [_moment(started)] if started else []
    facts += [_duration(record.seconds())] if record.seconds() else []
    failure = ""
    if record.failure is not None:
        reason = record.failure.strip() or "no reason was recorded"
        first, _, rest = reason.partition("\n")
        more = f"<details><summary>Traceback</summary><pre>{_e(rest.strip())}</pre></details>" if rest.strip() else ""
        failure = f'<div class="failure"><h2>Why it failed</h2><p>{_e(first)}</p>{more}</div>'
    progress = ""
    total = record.config.get("steps")
    if status in ("running", "unfinished") and _is_number(total) and total:
        share = min(1.0, record.last_step / total)
        ended = record.sessions[-1].get("ended") if record.sessions else None
        heard = f", last heard of {_moment(ended)}" if ended else ""
        progress = (
            f'<div class="progress" role="img" aria-label="{share:.0%} of the steps done">'
            f'<i style="width:{100 * share:.2f}%"></i></div>'
            f'<p class="facts">step {_number(record.last_step)} of {_number(total)}{_e(heard)}</p>'
        )
    return (
        f'<header><p class="method"><span>{_e(record.method)}</span>'
        f'<span class="badge {status}">{mark} {status}</span></p>'
        f"<h1>{_e(contract.title or _words(record.method.rpartition('/')[2]))}</h1>"
        f'<p class="facts">{_e(" · ".join(facts))}</p>{progress}{failure}</header>'
    )


def _headline(record: _Record, contract: Contract) -> str:
    result, when = record.result, ""
    if not result:
        latest = [(s.name, s.finite) for s in record.series]
        result = {name: float(one.values[-1]) for name, one in latest if len(one.values)}
        when = f"latest, up to step {_number(record.last_step)}"
    if not result:
        yet = record.status in ("running", "unfinished")
        return f'<p class="empty">{"Nothing has been logged yet." if yet else "The run left no metric."}</p>'
    shown: list[str] = []
    out: list[str] = []
    for bar in _bars(record, contract, result):
        shown.append(bar["metric"])
        out.append(_gauge(record, contract, bar, float(result[bar["metric"]]), when))
    rest = [name for name in result if name not in shown]
    if not out:
        big, rest = rest[:3], rest[3:]
        cells = "".join(f"<div><b>{_number(result[n])}</b><span>{_e(_words(n))}</span></div>" for n in big)
        out.append(f'<div class="big">{cells}</div>' + (f'<p class="note">{when}</p>' if when else ""))
    if rest:
        cells = "".join(f"<div><dt>{_e(_words(n))}</dt><dd>{_number(result[n])}</dd></div>" for n in rest)
        out.append(f'<dl class="small">{cells}</dl>')
    return "".join(out)


def _bars(record: _Record, contract: Contract, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One bar for each metric of this run: the one set for its preset if there is one, else the first."""
    chosen: dict[str, dict[str, Any]] = {}
    for bar in contract.bars:
        metric = bar.get("metric")
        if metric in result and _is_number(bar.get("bar")) and abs(bar["bar"]) < HUGE:
            applies = _applies(record, bar)
            if metric not in chosen or (applies and not chosen[metric]["applies"]):
                chosen[str(metric)] = {**bar, "applies": applies}
    return list(chosen.values())


def _applies(record: _Record, bar: dict[str, Any]) -> bool:
    """Whether this run used the settings the bar was set for (its preset, changed by its flags and nothing else)."""
    if not bar.get("preset"):
        return True
    if record.described.get("preset") not in (None, bar["preset"]):
        return False
    flags = _dict(bar.get("flags"))
    expected = {**(record.default_config or {}), **flags}
    return all(_same(record.config.get(name), value) for name, value in expected.items())


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def _gauge(record: _Record, contract: Contract, bar: dict[str, Any], value: float, when: str) -> str:
    """The number, large, and a line that shows where it lies: the side that passes is tinted, the bar is a tick.

    A bar that was set for other settings (another data set, often) is named and not drawn: nothing follows from it.
    """
    limit, lower = float(bar["bar"]), bar.get("better") == "lower"
    sign = "≤" if lower else "≥"
    big = f'<div class="big"><div><b>{_number(value)}</b><span>{_e(_words(bar["metric"]))}</span></div></div>'
    note = f'<p class="note">{when}</p>' if when else ""
    if not bar["applies"]:
        elsewhere = f"The recorded bar, {sign} {limit:.6g}, is for the preset <code>{_e(bar.get('preset'))}</code>"
        return f'{big}<p class="note">{elsewhere}; this run used other settings and is not held against it.</p>{note}'
    published = _published(str(bar.get("published") or ""), limit)
    marks = [limit, *([value] if abs(value) < HUGE else []), *([published] if published is not None else [])]
    seeds = [v for v in _card_values(contract.card, bar) if abs(v) < HUGE]
    marks += seeds
    low, high = min(marks), max(marks)
    room = 0.3 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    if min(marks) >= 0 and max(marks) <= 1:
        low, high = max(0.0, low), min(1.0, high)
    axis = Axis(low, high)

    def left(at: float) -> str:
        return f"left:{100 * float(axis.place(at)):.2f}%"

    passes = value <= limit if lower else value >= limit
    zone = f"left:0;width:{100 * axis.place(limit):.2f}%" if lower else f"{left(limit)};right:0"
    dots = "".join(f'<i class="seed" style="{left(v)}"></i>' for v in seeds)
    diamond = f'<i class="published" style="{left(published)}"></i>' if published is not None else ""
    dot = f'<i class="here" style="{left(value)}"></i>' if abs(value) < HUGE else ""
    keys = [f'<span><i class="here"></i>this run {_number(value)}</span>']
    keys.append(f'<span><i class="bar"></i>bar {sign} {limit:.6g}</span>')
    if seeds:
        keys.append(f'<span><i class="seed"></i>evidence card, {len(seeds)} seed{"s" if len(seeds) > 1 else ""}</span>')
    if bar.get("published"):
        keys.append(f'<span><i class="published"></i>published {_inline(str(bar["published"]))}</span>')
    if record.status != "done":
        verdict = '<p class="note">The run has not ended: no verdict yet.</p>' if record.status != "failed" else ""
    else:
        allowed, took = bar.get("within_seconds"), record.seconds("loop_seconds") or record.seconds()
        words = "clears the bar" if passes else "misses the bar"
        if allowed and took:
            slow = passes and took > float(allowed)
            words += (
                f", {'but too slowly: ' if slow else 'in '}{_duration(took)} of the {_duration(float(allowed))} allowed"
            )
            passes = passes and not slow
        verdict = f'<p class="verdict {"pass" if passes else "miss"}">{"✓" if passes else "✕"} {words}</p>'
    ticks = axis.ticks(5)
    scale = "".join(f'<span style="{left(t)}">{_tick(t)}</span>' for t in ticks)
    said = f"{_words(bar['metric'])} {_number(value)}, bar {_number(limit)}, {bar.get('better', 'higher')} is better"
    return (
        f'<div class="headline">{big}<div class="gauge"><div class="rail" role="img" aria-label="{_e(said)}">'
        f'<i class="zone" style="{zone}"></i><i class="bar" style="{left(limit)}"></i>{dots}{diamond}{dot}</div>'
        f'<div class="xs" aria-hidden="true">{scale}</div><p class="keys">{"".join(keys)}</p>{verdict}{note}'
        "</div></div>"
    )


def _published(text: str, limit: float) -> float | None:
    """The number a published result starts with, if it is plainly on the scale of the bar."""
    found = re.match(r"\s*[≈~<>≤≥]?\s*([-−]?\d+(?:[.,]\d+)?(?:e[-+]?\d+)?)\s*(%?)", text)
    if not found:
        return None
    value = float(found[1].replace(",", ".").replace("−", "-"))
    if found[2]:
        value /= 100
    near = abs(value - limit) <= 2 * max(abs(limit), 1e-12)
    return value if near and (value >= 0) == (limit >= 0) else None


def _card_values(card: dict[str, Any] | None, bar: dict[str, Any]) -> list[float]:
    """The per-seed values of an evidence card for this bar, where the card lists them."""
    for experiment in _list(_dict(card).get("experiments")):
        one = _dict(experiment)
        if one.get("name") == bar.get("name") and one.get("metric") in (None, bar.get("metric")):
            return [float(v) for v in _list(one.get("values")) if _is_number(v)]
    return []


def _curves(record: _Record, contract: Contract) -> str:
    wanted = {*record.result, *(bar.get("metric") for bar in contract.bars)}
    groups = sorted(_groups(record.series), key=lambda group: wanted.isdisjoint(one.name for one in group))
    if not groups:
        return '<p class="empty">No metric has been logged.</p>'
    # all charts show the same steps, so that one can be read against another
    span = (min(float(s.steps[0]) for s in record.series), max(float(s.steps[-1]) for s in record.series))
    charts = [chart(group, span) for group in groups]
    first, rest = charts[:12], charts[12:]
    few = " few" if len(charts) in (1, 2, 4) else ""
    out = f'<div class="charts{few}">{"".join(first)}</div>'
    if rest:
        out += f'<details><summary>{len(rest)} more curves</summary><div class="charts">{"".join(rest)}</div></details>'
    smoothed = any(len(s.steps) >= SMOOTH_FROM for s in record.series)
    note = "Thin: every value logged. Thick, and the number beside the name: its moving mean." if smoothed else ""
    return out + f'<p class="note">Over steps. {note}</p>'


class _Tile(NamedTuple):
    """One thing to show: its HTML, and its height as a multiple of a column's width (None: it takes both columns)."""

    html: str
    tall: float | None = None


def _pictures(record: _Record) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for artifact in record.artifacts:
        if record.artifact_file(artifact) is None:
            record.unreadable.append(f"artifacts/{artifact['file']}")
        else:
            groups.setdefault(str(artifact.get("name") or artifact["file"]), []).append(artifact)
    tiles = []
    for name, group in groups.items():
        kind = group[-1].get("kind", "image")
        if kind in ("image", "animation"):
            tiles.append(_strip(record, name, group) if len(group) > 1 else _picture(record, name, group[0]))
        elif kind == "text":
            tiles.append(_texts(record, name, group))
        else:
            tiles.append(_data(record, name, group))
    return _in_columns(tiles) if tiles else '<p class="empty">No picture has been drawn.</p>'


def _in_columns(tiles: list[_Tile]) -> str:
    """Tiles in order: each narrow one goes into the shorter of two columns, each wide one across both."""
    out: list[str] = []
    columns: list[list[_Tile]] = [[], []]

    def flush() -> None:
        if columns[0]:
            parts = "".join(f"<div>{''.join(tile.html for tile in column)}</div>" for column in columns if column)
            out.append(f'<div class="pair">{parts}</div>')
        columns[:] = [[], []]

    for tile in tiles:
        if tile.tall is None:
            flush()
            out.append(tile.html)
        else:
            min(columns, key=lambda column: sum((other.tall or 0) + 0.2 for other in column)).append(tile)
    flush()
    return f'<div class="pictures">{"".join(out)}</div>'


def _picture(record: _Record, name: str, artifact: dict[str, Any]) -> _Tile:
    tag, shape, tall = _image(record, artifact)
    caption = _caption(name, artifact)
    if artifact.get("kind") == "animation" and 'src="data:image/gif' not in tag:
        caption += f" The first frame; the whole animation is artifacts/{_e(artifact['file'])}."
    html = f'<figure class="picture {shape}">{tag}<figcaption>{caption}</figcaption></figure>'
    return _Tile(html, None if shape == "wide" else tall)


def _strip(record: _Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """The same picture at several steps: the last one large, all of them small in order."""
    frames = _some(group, FRAMES)
    large, shape, _ = _image(record, group[-1])
    small = "".join(f"<li>{_image(record, frame)[0]}<span>{_step(frame)}</span></li>" for frame in frames)
    more = f" {FRAMES} of {len(group)} frames; the others are in the artifacts folder." if len(group) > FRAMES else ""
    return _Tile(
        f'<figure class="picture strip {shape}"><div class="stage">{large}'
        f'<figcaption>{_caption(name, group[-1])}{more}</figcaption></div><ol class="frames">{small}</ol></figure>'
    )


def _some(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` of these, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _step(artifact: dict[str, Any]) -> str:
    return f"step {_number(artifact['step'])}" if _is_number(artifact.get("step")) else ""


def _caption(name: str, artifact: dict[str, Any]) -> str:
    caption, step = str(artifact.get("caption") or ""), _step(artifact)
    parts = [f"<b>{_e(_words(name))}</b>", f"<span>{step}</span>" if step else "", _inline(caption)]
    return " ".join(filter(None, parts))


def _image(record: _Record, artifact: dict[str, Any]) -> tuple[str, str, float]:
    """An <img> with the picture inside it, its shape (tiny: shown enlarged, with sharp pixels; wide; or plain), and its
    height as a multiple of the column's width."""
    path = record.artifact_file(artifact)
    assert path is not None
    data, mime = _encode(path)
    width, height = _size(data)
    said = (_words(str(artifact.get("name") or path.name)), _step(artifact), str(artifact.get("caption") or ""))
    alt = _e(", ".join(filter(None, said)))
    shape, style, tall = "", "", 1.0
    if width and height:
        tall = height / width
        shape = "wide" if tall < 0.6 and width > 900 else ""
        if max(width, height) <= 400:
            shown = width * max(1, 430 // max(width, height))
            shape, style, tall = "tiny", f' style="width:{shown}px"', tall * shown / 430
    source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    size = f' width="{width}" height="{height}"' if width else ""
    sharp = ' class="sharp"' if 0 < max(width, height) <= 96 else ""
    return f'<img src="{source}" alt="{alt}"{size}{style}{sharp}>', shape, tall


def _encode(path: Path) -> tuple[bytes, str]:
    """The picture's bytes and type; a very large one is made smaller, and a very large animation becomes its first
    frame, so that the page stays light."""
    data = path.read_bytes()
    kinds = {".gif": "image/gif", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
    mime = kinds.get(path.suffix.lower(), "image/png")
    if len(data) <= (ANIMATION_BYTES if mime == "image/gif" else PICTURE_BYTES):
        return data, mime
    from PIL import Image

    smaller = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            still = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        still.thumbnail((1600, 1600))
        still.save(smaller, "WEBP", quality=88)
    except (OSError, ValueError, Image.DecompressionBombError):
        return data, mime
    return (smaller.getvalue(), "image/webp") if mime == "image/gif" or smaller.tell() < len(data) else (data, mime)


def _size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, read from the header; (0, 0) if the format is not known."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] == b"GIF8" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0, 0


def _cut(text: str, limit: int = TEXT_CHARACTERS) -> str:
    left = len(text) - limit
    return text if left <= 0 else f"{text[:limit].rstrip()} … ({left:,} more characters in the file)"


def _texts(record: _Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """A text, set as a quotation; with several steps the last one in full, up to three before it by their openings."""

    def read(artifact: dict[str, Any]) -> str:
        path = record.artifact_file(artifact)
        assert path is not None
        return path.read_text(encoding="utf-8", errors="replace").strip("\n")

    items = ""
    for artifact in _some(group[:-1], 3):
        text = read(artifact)
        opening = text if len(text) <= 280 else text[:280].rstrip() + " …"
        items += f"<li><span>{_step(artifact)}</span><blockquote>{_e(opening)}</blockquote></li>"
    earlier = f'<ol class="earlier">{items}</ol>' if items else ""
    return _Tile(
        f'<figure class="text"><figcaption>{_caption(name, group[-1])}</figcaption>'
        f"<blockquote>{_e(_cut(read(group[-1])))}</blockquote>{earlier}</figure>"
    )


def _data(record: _Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """A JSON value as a table where it has the shape of one, else folded away as it is."""
    path = record.artifact_file(group[-1])
    assert path is not None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = _table(json.loads(text))
    except ValueError:
        found = None
    tall = None
    if found is None:
        body = f"<details><summary>{_e(path.name)}</summary><pre>{_e(_cut(text))}</pre></details>"
    else:
        head, rows = found
        if len(rows) <= 16 and max(map(len, rows), default=0) <= 4:
            tall = 0.09 * (len(rows) + any(head))
        body = _html_table(head, rows[:TABLE_ROWS])
        if len(rows) > TABLE_ROWS:
            body += f'<p class="note">{len(rows) - TABLE_ROWS:,} more rows in the file.</p>'
    return _Tile(f'<figure class="data"><figcaption>{_caption(name, group[-1])}</figcaption>{body}</figure>', tall)


def _table(value: Any) -> tuple[list[str], list[list[Any]]] | None:
    """Head and rows of a JSON value, if it has the shape of a table: rows of objects, ``{"columns", "rows"}``, columns
    of equal length, an object of objects, a matrix, or names and values."""
    head: list[str] = []
    rows: list[list[Any]] = []
    if isinstance(value, dict) and isinstance(value.get("rows"), list) and isinstance(value.get("columns"), list):
        head, rows = [str(c) for c in value["columns"]], [r if isinstance(r, list) else [r] for r in value["rows"]]
    elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        head = list(dict.fromkeys(key for row in value for key in row))
        rows = [[row.get(key) for key in head] for row in value]
    elif isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        rows = value
    elif isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        head = ["", *dict.fromkeys(key for row in value.values() for key in row)]
        rows = [[key, *(row.get(column) for column in head[1:])] for key, row in value.items()]
    elif isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            return None
        head, rows = list(value), [list(row) for row in zip(*value.values())]
    elif isinstance(value, dict) and value:
        head, rows = ["", ""], [[key, item] for key, item in value.items()]
    else:
        return None
    return head, rows


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if _is_number(value):
            return f'<td class="n">{_number(value)}</td>'
        text = "" if value is None else _value(value)
        return f"<td{' class=long' if len(text) > 40 else ''}>{_e(text)}</td>"

    def title(i: int) -> str:
        numbers = any(i < len(row) and _is_number(row[i]) for row in rows)
        kind = ' class="n"' if numbers else ""
        return f"<th{kind}>{_e(_words(head[i]))}</th>"

    top = f"<thead><tr>{''.join(map(title, range(len(head))))}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _facts(rows: _Facts) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{_e(k)}</dt><dd>{v}</dd>" for k, v in rows if v) + "</dl>"


def _what_was_run(record: _Record) -> str:
    described, environment, sessions = record.described, record.environment, record.sessions
    whole, loop = record.seconds(), record.seconds("loop_seconds") or record.seconds()
    out = f'<pre class="command">{_e(described["command"])}</pre>' if described.get("command") else ""
    steps = sum(_float(s.get("to_step")) - _float(s.get("from_step")) for s in sessions)
    memory = max((_float(s.get("peak_memory_mb")) for s in sessions), default=0.0)
    rows: _Facts = [("seed", _e(described["seed"]))] if described.get("seed") is not None else []
    rows += [("started", _e(_moment(environment.get("started"))))]
    if whole:
        rate = f", {_tick(float(f'{steps / loop:.3g}'))} a second" if steps > 0 else ""
        rows.append(("time", f"{_duration(whole)}; {_number(steps)} steps{rate}"))
    if memory:
        rows.append(("peak memory", f"{_number(round(memory))} MB"))
    last = sessions[-1] if sessions else {}
    device = str(last.get("device") or "")
    if last.get("threads"):
        device += f", {last['threads']} {'thread' if last['threads'] == 1 else 'threads'}"
    rows.append(("device", _e(device)))
    hardware = environment.get("hardware")
    if isinstance(hardware, dict):
        rows.append(("hardware", _e(" · ".join(_quantity(str(k), v) for k, v in hardware.items() if v))))
    versions = _dict(environment.get("versions"))
    rows.append(("versions", _e(" · ".join(f"{k} {v}" for k, v in versions.items()))))
    rows.append(("commit", f"<code>{_e(environment['commit'])}</code>" if environment.get("commit") else ""))
    common = {k: v for k, v in _dict(described.get("common")).items() if v and k != "seed"}
    rows.append(("flags", _e(" · ".join(f"{_words(str(k))} {_value(v)}" for k, v in common.items()))))
    if record.spec:
        shape = " × ".join(map(str, _list(record.spec.get("shape"))))
        classes = _list(record.spec.get("classes"))
        named = f"{len(classes)} classes: {', '.join(map(str, classes[:12]))}{' …' if len(classes) > 12 else ''}"
        rows.append(("data", _e(" · ".join([*([shape] if shape else []), *([named] if classes else [])]))))
    out += _facts(rows)
    if len(sessions) > 1:
        head = ["session", "from step", "to step", "time", "device"]
        table = [
            [
                _moment(s.get("started")),
                s.get("from_step"),
                s.get("to_step"),
                _duration(_float(s.get("seconds"))),
                s.get("device"),
            ]
            for s in sessions
        ]
        out += f"<p>Resumed {len(sessions) - 1} time{'s' if len(sessions) > 2 else ''}:</p>" + _html_table(head, table)
    return out or '<p class="empty">Nothing was recorded.</p>'


def _settings(record: _Record, contract: Contract) -> str:
    if not record.config:
        return '<p class="empty">No setting was recorded.</p>'
    helps = dict(contract.fields)
    defaults, rows, changed = record.default_config, [], 0
    for name, value in record.config.items():
        differs = defaults is not None and name in defaults and not _same(value, defaults[name])
        changed += differs
        was = f"<small>preset: {_e(_value(defaults[name]))}</small>" if differs and defaults is not None else ""
        rows.append(
            f'<tr{" class=changed" if differs else ""}><th scope="row">{_e(name)}</th>'
            f"<td>{_e(_value(value))}{was}</td><td>{_inline(helps.get(name, ''))}</td></tr>"
        )
    preset = _e(record.described.get("preset") or "default")
    note = ""
    if defaults is not None:
        said = f"{changed} differ{'s' if changed == 1 else ''} from" if changed else "All as in"
        note = f'<p class="note">{said} the preset <code>{preset}</code>{", marked with a dot" if changed else ""}.</p>'
    return f'{note}<table class="settings"><tbody>{"".join(rows)}</tbody></table>'


def _contract(record: _Record, contract: Contract) -> str:
    parts: list[str] = []
    source = " · ".join(
        filter(None, [contract.paper, f"notes\u00a0§\u00a0{contract.section}" if contract.section else ""])
    )
    if source:
        parts.append(f"<p>{_inline(source)}</p>")
    if contract.equation:
        parts.append(f"<h3>Equation</h3>{_formula(contract.equation)}")
    for title in ("algorithm", "differences", "expect"):
        if text := getattr(contract, title):
            parts.append(f"<h3>{title.capitalize()}</h3>{_prose(text)}")
    if contract.docs:
        parts.append(f"<details><summary>More from the docstring</summary>{_prose(contract.docs)}</details>")
    if isinstance(contract.card, dict):
        parts.append(f"<h3>Evidence</h3>{_evidence(contract.card)}")
    return "".join(parts) or f"<p><code>etude info {_e(record.method)}</code> prints its contract.</p>"


def _evidence(card: dict[str, Any]) -> str:
    """The card that `etude verify` wrote: each experiment with its seeds held against its bar."""
    written = _moment(card.get("written")) if card.get("written") else ""
    facts = [str(card.get("badge") or ""), written, f"commit {card['commit']}" if card.get("commit") else ""]
    rows = []
    for one in map(_dict, _list(card.get("experiments"))):
        values = [_number(v) if _is_number(v) else "failed" for v in _list(one.get("values"))]
        seconds = [_float(v) for v in _list(one.get("seconds"))]
        sign = "≤" if one.get("better") == "lower" else "≥"
        spread = f" ± {float(one['spread']):.2g}" if _is_number(one.get("spread")) and len(values) > 1 else ""
        mean = f"{_number(one['mean'])}{spread}" if _is_number(one.get("mean")) else ""
        bar = f"{sign} {one['bar']:.6g}" if _is_number(one.get("bar")) else ""
        passed = "✓ clears" if one.get("passed") is True else "✕ misses" if one.get("passed") is False else ""
        slowest = _duration(max(seconds)) if seconds else ""
        name = f"{one.get('name') or ''}: {_words(str(one.get('metric') or ''))}"
        rows.append([name, ", ".join(values), mean, bar, passed, one.get("published") or "", slowest])
    head = ["experiment", "each seed", "mean", "bar", "", "published", "time"]
    table = _html_table(head, rows) if rows else ""
    return f'<p class="note">{_e(" · ".join(filter(None, facts)))}</p>{table}'


def _next(record: _Record, contract: Contract) -> str:
    run = shlex.quote(_where(record.folder))
    rows = []
    if record.status != "done":
        rows.append((f"etude resume {run}", "go on from the last checkpoint, exactly as if it had not stopped"))
        if record.status != "failed":
            rows.append((f"etude show {run}", "write this page again"))
    elif contract.samples:
        rows.append((f"etude sample {run}", "draw from the trained model"))
    if record.status == "done" and contract.bars:
        rows.append((f"etude verify {record.method}", "run the recorded experiments and hold them against their bars"))
    rows.append(
        (f"etude copy {record.method} my_{record.method.rpartition('/')[2]}.py", "take the file and make it yours")
    )
    body = "".join(f"<dt><code>{_e(command)}</code></dt><dd>{what}</dd>" for command, what in rows)
    return f'<dl class="commands">{body}</dl>'


def _where(folder: Path) -> str:
    """The folder as one would type it here: relative to the working folder, or with ~ for home."""
    path = folder.resolve()
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and path != base:
            return prefix + path.relative_to(base).as_posix()
    return path.as_posix()
