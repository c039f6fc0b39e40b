"""Numbers, times, docstring text and tables as HTML. Every function that returns HTML has escaped what it was given."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from etude.core.report.mathematics import typeset
from etude.core.report.reading import is_number

Facts = list[tuple[str, str]]


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def spaced(name: str) -> str:
    """``test_loss`` as "test loss"."""
    return name.replace("_", " ")


def number(value: Any) -> str:
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


def tick(value: float) -> str:
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


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(iso: Any) -> str:
    try:
        when = datetime.fromisoformat(str(iso))
        zone = when.strftime(" %Z") if when.tzinfo else ""
        return f"{when.day} {when:%B %Y, %H:%M}{zone}"
    except ValueError:
        return str(iso or "")


def written(value: Any) -> str:
    """A configuration value as the reader would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(written, value)) or "–"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def quantity(name: str, value: Any) -> str:
    """``memory_gb`` and 24 as "memory 24 GB"."""
    stem, _, unit = name.rpartition("_")
    if stem and unit in ("gb", "mb"):
        return f"{spaced(stem)} {written(value)} {unit.upper()}"
    return f"{spaced(name)} {written(value)}"


_INLINE = re.compile(
    r"``?(?P<code>[^`\n]+)``?|arXiv:(?P<arxiv>\d{4}\.\d{4,5}|[a-z-]+/\d{7})|(?<![\w*])\*(?P<stress>[^\s*][^*\n]*?)\*(?![\w*])"
)


def inline(text: str) -> str:
    """Escape, then set `code` and *stress* and link arXiv identifiers."""

    def mark(found: re.Match[str]) -> str:
        if found["code"]:
            return f"<code>{found['code']}</code>"
        if found["stress"]:
            return f"<em>{found['stress']}</em>"
        return f'<a href="https://arxiv.org/abs/{found["arxiv"]}">arXiv:{found["arxiv"]}</a>'

    return _INLINE.sub(mark, escape(text))


_ITEM = re.compile(r"^\s*(?:[-*•]|\(?(?P<number>\d+)[.)])\s+")


def prose(text: str) -> str:
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
                out.append(f"<p>{inline(' '.join(line.strip() for line in lead))}</p>")
            tag = "ol" if (_ITEM.match(items[0][0]) or {"number": None})["number"] else "ul"
            body = "".join(f"<li>{inline(_ITEM.sub('', ' '.join(x.strip() for x in item)))}</li>" for item in items)
            out.append(f"<{tag}>{body}</{tag}>")
        elif all(line.startswith("    ") for line in lines if line.strip()):
            out.append(typeset(block))
        elif block.strip():
            out.append(f"<p>{inline(' '.join(line.strip() for line in lines))}</p>")
    return "".join(out)


def _several(value: Any) -> str:
    """The numbers of a list or of an object, as short as a single one is; "" for anything else."""
    if isinstance(value, list) and value and all(map(is_number, value)):
        return " · ".join(map(number, value))
    if isinstance(value, dict) and value and all(map(is_number, value.values())):
        return " · ".join(f"{name} {number(one)}" for name, one in value.items())
    return ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if is_number(value):
            return f'<td class="n">{number(value)}</td>'
        text = "" if value is None else _several(value) or written(value)
        return f"<td{' class=long' if len(text) > 40 else ''}>{escape(text)}</td>"

    def title(i: int) -> str:
        numbers = any(i < len(row) and is_number(row[i]) for row in rows)
        kind = ' class="n"' if numbers else ""
        return f"<th{kind}>{escape(spaced(head[i]))}</th>"

    top = f"<thead><tr>{''.join(map(title, range(len(head))))}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def facts_list(rows: Facts) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in rows if v) + "</dl>"
