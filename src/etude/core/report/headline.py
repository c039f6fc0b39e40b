"""The result of the run, large, and held against the bar that was set for it."""

from __future__ import annotations

import math
import re
from typing import Any

from etude.core.meanings import explained
from etude.core.report.charts import Axis, unit_of
from etude.core.report.reading import HUGE, Contract, Record, as_dict, as_float, as_list, is_number, same
from etude.core.report.words import duration, escape, html_table, inline, number, spaced, tick


def headline(record: Record, contract: Contract) -> str:
    result, when = record.result, ""
    if not result:
        latest = [(s.name, s.finite) for s in record.series]
        result = {name: float(one.values[-1]) for name, one in latest if len(one.values)}
        when = f"latest, up to {unit_of(record.clock)} {number(record.last_step)}"
    if not result:
        yet = record.status in ("running", "unfinished")
        return f'<p class="empty">{"Nothing has been logged yet." if yet else "The run left no metric."}</p>'
    shown: list[str] = []
    out: list[str] = []
    bars = sorted(
        _bars(record, contract, result), key=lambda bar: not bar["applies"]
    )  # one headline, the first that applies
    for bar in bars[:1]:
        shown.append(bar["metric"])
        out.append(_against(record, contract, bar, float(result[bar["metric"]]), when))
    rows = [
        (
            spaced(bar["metric"]),
            number(float(result[bar["metric"]])),
            limit_of(bar),
            _mark(bar, float(result[bar["metric"]])),
        )
        for bar in bars[1:]
        if bar["applies"]
    ]
    if rows:
        shown += [bar["metric"] for bar in bars[1:] if bar["applies"]]
        out.append(html_table(["also held against a bar", "", "bar", ""], rows))
    rest = [name for name in result if name not in shown]
    if not out:
        big, rest = rest[:3], rest[3:]
        cells = "".join(f"<div><b>{number(result[n])}</b><span>{escape(spaced(n))}</span></div>" for n in big)
        out.append(f'<div class="big">{cells}</div>' + (f'<p class="note">{when}</p>' if when else ""))
    if rest:
        cells = "".join(f"<div><dt>{escape(spaced(n))}</dt><dd>{number(result[n])}</dd></div>" for n in rest)
        out.append(f'<dl class="small">{cells}</dl>')
    told = [(spaced(name), said) for name, said in explained(result, contract.metrics) if said]
    if told:
        out.append(f"<details><summary>What these numbers mean</summary>{html_table(['', ''], told)}</details>")
    return "".join(out)


def _mark(bar: dict[str, Any], value: float) -> str:
    low, high = _allowed(bar)
    return "✓ clears" if low <= value <= high else "✕ misses"


def _bars(record: Record, contract: Contract, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One bar for each metric of this run: the one set for its preset if there is one, else the first."""
    chosen: dict[str, dict[str, Any]] = {}
    for bar in contract.bars:
        metric = bar.get("metric")
        if metric in result and is_number(bar.get("bar")) and abs(bar["bar"]) < HUGE:
            applies = _applies(record, bar)
            if metric not in chosen or (applies and not chosen[metric]["applies"]):
                chosen[str(metric)] = {**bar, "applies": applies}
    return list(chosen.values())


def _applies(record: Record, bar: dict[str, Any]) -> bool:
    """Whether this run used the settings the bar was set for (its preset, changed by its flags and nothing else)."""
    if not bar.get("preset"):
        return True
    if record.described.get("preset") not in (None, bar["preset"]):
        return False
    flags = as_dict(bar.get("flags"))
    expected = {**(record.default_config or {}), **flags}
    return all(same(record.config.get(name), value) for name, value in expected.items())


def _against(record: Record, contract: Contract, bar: dict[str, Any], value: float, when: str) -> str:
    """The number, large, and the line on which it is held against its bar.

    A bar that was set for other settings (another data set, often) is named and not drawn: nothing follows from it.
    """
    big = f'<div class="big"><div><b>{number(value)}</b><span>{escape(spaced(bar["metric"]))}</span></div></div>'
    note = f'<p class="note">{when}</p>' if when else ""
    if not bar["applies"]:
        elsewhere = f"The recorded bar, {limit_of(bar)}, is for the preset <code>{escape(bar.get('preset'))}</code>"
        return f'{big}<p class="note">{elsewhere}; this run used other settings and is not held against it.</p>{note}'
    line = gauge(bar, value, _card_values(contract.card, bar))
    return f'<div class="headline">{big}<div class="gauge">{line}{_verdict(record, bar, value)}{note}</div></div>'


def limit_of(bar: dict[str, Any]) -> str:
    """A bar in words: ≥ 0.97, ≤ 0.1, or −0.0556 ± 0.001."""
    if bar.get("better") == "near":
        return f"{float(bar['bar']):.6g} ± {as_float(bar.get('tolerance')):.2g}"
    return f"{'≤' if bar.get('better') == 'lower' else '≥'} {float(bar['bar']):.6g}"


def _allowed(bar: dict[str, Any]) -> tuple[float, float]:
    """The interval of values that clear a bar."""
    limit, tolerance = float(bar["bar"]), as_float(bar.get("tolerance"))
    if bar.get("better") == "near":
        return limit - tolerance, limit + tolerance
    return (-math.inf, limit) if bar.get("better") == "lower" else (limit, math.inf)


def gauge(bar: dict[str, Any], value: float, seeds: list[float]) -> str:
    """A line that shows where the value lies: the side that passes is tinted, the bar is a tick; the values of the
    evidence card's seeds and the published number lie on it too."""
    limit, published = float(bar["bar"]), published_number(str(bar.get("published") or ""), float(bar["bar"]))
    here = [value] if abs(value) < HUGE else []
    seeds = [seed for seed in seeds if abs(seed) < HUGE]
    elsewhere = [published] if published is not None else []
    low, high = _allowed(bar)
    ends = [end for end in (low, high) if math.isfinite(end)]
    axis = _around([*ends, *here, *elsewhere, *seeds])

    def left(at: float) -> str:
        return f"left:{100 * float(axis.place(at)):.2f}%"

    def marks(kind: str, places: list[float]) -> str:
        return "".join(f'<i class="{kind}" style="{left(place)}"></i>' for place in places)

    start, end = (axis.place(low) if low in ends else 0.0), (axis.place(high) if high in ends else 1.0)
    zone = f"left:{100 * start:.2f}%;width:{100 * (end - start):.2f}%"
    drawn = f'<i class="zone" style="{zone}"></i>' + marks("bar", ends)
    drawn += marks("seed", seeds) + marks("published", elsewhere) + marks("here", here)
    keys = (
        f'<span><i class="here"></i>this run {number(value)}</span><span><i class="bar"></i>bar {limit_of(bar)}</span>'
    )
    if seeds:
        keys += f'<span><i class="seed"></i>evidence card, {len(seeds)} seed{"s" if len(seeds) > 1 else ""}</span>'
    if bar.get("published"):
        keys += f'<span><i class="published"></i>published {inline(str(bar["published"]))}</span>'
    scale = "".join(f'<span style="{left(t)}">{tick(t)}</span>' for t in axis.ticks(5))
    said = f"{spaced(bar['metric'])} {number(value)}, bar {number(limit)}, {bar.get('better', 'higher')} is better"
    return (
        f'<div class="rail" role="img" aria-label="{escape(said)}">{drawn}</div>'
        f'<div class="xs" aria-hidden="true">{scale}</div><p class="keys">{keys}</p>'
    )


def _around(values: list[float]) -> Axis:
    """An axis with room on both sides of these values, but not beyond 0 and 1 where all lie between."""
    low, high = min(values), max(values)
    room = 0.3 * (high - low) or 0.1 * abs(high) or 1.0
    if low >= 0 and high <= 1:
        return Axis(max(0.0, low - room), min(1.0, high + room))
    return Axis(low - room, high + room)


def _verdict(record: Record, bar: dict[str, Any], value: float) -> str:
    """Whether a finished run clears its bar, in time if the bar has a limit on that."""
    if record.status == "failed":
        return ""
    if record.status != "done":
        return '<p class="note">The run has not ended: no verdict yet.</p>'
    low, high = _allowed(bar)
    passes = low <= value <= high
    words = "clears the bar" if passes else "misses the bar"
    allowed, took = bar.get("within_seconds"), record.seconds("loop_seconds") or record.seconds()
    if allowed and took:
        slow = passes and took > float(allowed)
        words += f", {'but too slowly: ' if slow else 'in '}{duration(took)} of the {duration(float(allowed))} allowed"
        passes = passes and not slow
    return f'<p class="verdict {"pass" if passes else "miss"}">{"✓" if passes else "✕"} {words}</p>'


def published_number(text: str, limit: float) -> float | None:
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
    for experiment in as_list(as_dict(card).get("experiments")):
        one = as_dict(experiment)
        if one.get("name") == bar.get("name") and one.get("metric") in (None, bar.get("metric")):
            return [float(v) for v in as_list(one.get("values")) if is_number(v)]
    return []
