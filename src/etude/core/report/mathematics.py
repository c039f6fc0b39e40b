"""Equations of docstrings, plain Unicode, set as mathematics in HTML: no script, no font, no network.

`typeset` raises ``_i`` and ``_{t−1}`` to subscripts, ``^2`` and ``^{T+1}`` to superscripts, sets single letters in italics
and lays lines with gaps (an equation and its remark, a table of losses) out in columns.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

_SCRIPT = re.compile(
    r"""(?P<mark>[_^])(?:
        \{(?P<braced>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}              # x_{t−1}
      | (?P<greek>[αβγδεζηθικλμνξπρστυφχψωΦΔ∞̂̃̄]+'?)              # ∇_θ
      | (?P<set>[a-z]{2,7}(?=[ ,.;:)\]=(]|$))                    # λ_max
      | (?P<plain>[−+*]|[A-Za-z0-9](?![a-z]{2})(?:['̂̃̄]|[⁺⁻])?[₁₂∞]?)        # x_i, x_1, a', x̂
    )""",
    re.VERBOSE,
)
_LETTER = re.compile(r"(?<![A-Za-z\d&#;./_])(?<!<)[A-Za-z](?![A-Za-z;_])(?!&)|(?<=\d)[A-Za-z](?![A-Za-z\d;])")
_GAP = re.compile(r"(?<=\S) {3,}(?=\S)")
_CODE = re.compile(r"(`[^`]+`|\*[^*\s][^*\n]*\*)")
_WORDS = {"a", "A", "I"}  # that are words where they stand between words


def typeset(text: str) -> str:
    """A block of lines as HTML: prose lines flow, lines with gaps become columns, everything is escaped."""
    out: list[str] = []
    columns: list[list[str]] = []
    for line in [*_lines(text), ""]:
        cells = _GAP.split(line.strip())
        if len(cells) > 1:
            columns.append(cells)
            continue
        if columns:
            out.append(_table(columns))
            columns = []
        if line.strip():
            kind = ' class="in"' if line.startswith(" ") else ""
            out.append(f"<div{kind}>{expression(line.strip())}</div>")
    return f'<div class="formula">{"".join(out)}</div>'


def expression(text: str) -> str:
    """One line: scripts, italics and code spans; the rest as it is."""
    parts = _CODE.split(text)
    return "".join(_span(part) if index % 2 else _scripts(part) for index, part in enumerate(parts))


def _lines(text: str) -> Iterator[str]:
    lines = text.strip("\n").split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()), default=0)
    yield lines[0].strip()
    for line in lines[1:]:
        yield line[margin:]


def _table(rows: list[list[str]]) -> str:
    width = max(map(len, rows))
    body = ""
    for cells in rows:
        padded = ([""] * (width - len(cells)) + cells) if len(cells) == width - 1 and width > 3 else cells
        body += "<tr>" + "".join(f"<td>{expression(cell)}</td>" for cell in padded) + "</tr>"
    return f"<table>{body}</table>"


def _span(part: str) -> str:
    tag = "code" if part.startswith("`") else "em"
    return f"<{tag}>{html.escape(part[1:-1])}</{tag}>"


def _scripts(text: str) -> str:
    """Sub- and superscripts where a single symbol or a bracket stands before the mark; names_like_this stay."""
    out, at = "", 0
    for found in _SCRIPT.finditer(text):
        before = text[: found.start()]
        name = re.search(r"[A-Za-z]{4,}$", before) if found["braced"] is None and not found["greek"] else None
        if found.start() < at or not before or before[-1].isspace() or (name and name[0] not in ("argmin", "argmax")):
            continue
        inside = next(found[kind] for kind in ("braced", "greek", "set", "plain") if found[kind] is not None)
        tag = "sub" if found["mark"] == "_" else "sup"
        out += _italics(text[at : found.start()]) + f"<{tag}>{_scripts(inside)}</{tag}>"
        at = found.end()
    return out + _italics(text[at:])


def _italics(text: str) -> str:
    """Single Latin letters in italics, unless they are words ("a step")."""

    def mark(found: re.Match[str]) -> str:
        letter, rest = found[0], text[found.end() :]
        word = letter in _WORDS and re.match(r" [a-z]{2,}", rest)
        return letter if word else f"\0{letter}\1"

    return html.escape(_LETTER.sub(mark, text)).replace("\0", "<i>").replace("\1", "</i>")
