"""What a method drew or wrote, tile by tile: pictures, animations, filmstrips, texts and JSON values."""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from etude.core.report.reading import Record, is_number
from etude.core.report.words import escape, html_table, inline, number, spaced

FRAMES = 12  # a filmstrip shows at most this many frames
PICTURE_BYTES = 400_000  # larger still pictures are re-encoded
ANIMATION_BYTES = 3_000_000  # larger animations are shown by their first frame
TEXT_CHARACTERS = 4000  # longer texts are cut, with a note
TABLE_ROWS = 200
SQUAT = 1.2  # up to this height over width a picture alone may take both columns


class _Tile(NamedTuple):
    """One thing to show: its HTML, and its height as a multiple of a column's width (None: it takes both columns)."""

    html: str
    tall: float | None = None


def pictures(record: Record) -> str:
    """Every artifact of the run, in the order in which they were written; one that cannot be read is noted."""
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
    """Tiles in order: each narrow one goes into the shorter of two columns, a wide one and a squat one alone across both."""
    out: list[str] = []
    columns: list[list[_Tile]] = [[], []]

    def flush() -> None:
        if columns[0]:
            parts = "".join(f"<div>{''.join(tile.html for tile in column)}</div>" for column in columns if column)
            alone = not columns[1] and len(columns[0]) == 1 and (columns[0][0].tall or 0) <= SQUAT
            out.append(f'<div class="pair{" alone" if alone else ""}">{parts}</div>')
        columns[:] = [[], []]

    for tile in tiles:
        if tile.tall is None:
            flush()
            out.append(tile.html)
        else:
            min(columns, key=lambda column: sum((other.tall or 0) + 0.2 for other in column)).append(tile)
    flush()
    return f'<div class="pictures">{"".join(out)}</div>'


def _picture(record: Record, name: str, artifact: dict[str, Any]) -> _Tile:
    tag, shape, tall = _image(record, artifact)
    caption = _caption(name, artifact)
    if artifact.get("kind") == "animation" and 'src="data:image/gif' not in tag:
        caption += f" The first frame; the whole animation is artifacts/{escape(artifact['file'])}."
    figure = f'<figure class="picture {shape}">{tag}<figcaption>{caption}</figcaption></figure>'
    return _Tile(figure, None if shape == "wide" else tall)


def _strip(record: Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """The same picture at several steps: the last one large, all of them small in order."""
    frames = _some(group, FRAMES)
    large, shape, _ = _image(record, group[-1])
    small = "".join(f"<li>{_image(record, frame)[0]}<span>{_step(frame)}</span></li>" for frame in frames)
    more = f" {FRAMES} of {len(group)} frames; the others are in the artifacts folder." if len(group) > FRAMES else ""
    return _Tile(
        f'<figure class="picture strip {shape}"><div class="stage">{large}'
        f'<figcaption>{_caption(name, group[-1])}{more}</figcaption></div><ol class="frames">{small}</ol></figure>'
    )


def _texts(record: Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """A text, set as a quotation; with several steps the last one in full, up to three before it by their openings."""

    def read(artifact: dict[str, Any]) -> str:
        path = record.artifact_file(artifact)
        assert path is not None
        return path.read_text(encoding="utf-8", errors="replace").strip("\n")

    items = ""
    for artifact in _some(group[:-1], 3):
        text = read(artifact)
        opening = text if len(text) <= 280 else text[:280].rstrip() + " …"
        items += f"<li><span>{_step(artifact)}</span><blockquote>{escape(opening)}</blockquote></li>"
    earlier = f'<ol class="earlier">{items}</ol>' if items else ""
    return _Tile(
        f'<figure class="text"><figcaption>{_caption(name, group[-1])}</figcaption>'
        f"<blockquote>{escape(_cut(read(group[-1])))}</blockquote>{earlier}</figure>"
    )


def _data(record: Record, name: str, group: list[dict[str, Any]]) -> _Tile:
    """A JSON value as a table where it has the shape of one, else folded away as it is."""
    path = record.artifact_file(group[-1])
    assert path is not None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = as_table(json.loads(text))
    except (ValueError, RecursionError):
        found = None
    tall = None
    if found is None:
        body = f"<details><summary>{escape(path.name)}</summary><pre>{escape(_cut(text))}</pre></details>"
    else:
        head, rows = found
        if len(rows) <= 16 and max(map(len, rows), default=0) <= 4:
            tall = 0.09 * (len(rows) + any(head))
        body = html_table(head, rows[:TABLE_ROWS])
        if len(rows) > TABLE_ROWS:
            body += f'<p class="note">{len(rows) - TABLE_ROWS:,} more rows in the file.</p>'
    return _Tile(f'<figure class="data"><figcaption>{_caption(name, group[-1])}</figcaption>{body}</figure>', tall)


def as_table(value: Any) -> tuple[list[str], list[list[Any]]] | None:
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


def _some(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` of these, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _step(artifact: dict[str, Any]) -> str:
    return f"step {number(artifact['step'])}" if is_number(artifact.get("step")) else ""


def _caption(name: str, artifact: dict[str, Any]) -> str:
    caption, step = str(artifact.get("caption") or ""), _step(artifact)
    parts = [f"<b>{escape(spaced(name))}</b>", f"<span>{step}</span>" if step else "", inline(caption)]
    return " ".join(filter(None, parts))


def _image(record: Record, artifact: dict[str, Any]) -> tuple[str, str, float]:
    """An <img> with the picture inside it, its shape (tiny: shown enlarged, with sharp pixels; wide; or plain), and its
    height as a multiple of the column's width."""
    path = record.artifact_file(artifact)
    assert path is not None
    data, mime = _encode(path)
    width, height = _size(data)
    said = (spaced(str(artifact.get("name") or path.name)), _step(artifact), str(artifact.get("caption") or ""))
    alt = escape(", ".join(filter(None, said)))
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
