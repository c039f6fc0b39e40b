"""The page and its sections, in the order in which they are shown."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.core.report.charts import SMOOTH_FROM, chart, groups, unit_of
from etude.core.report.headline import headline, limit_of
from etude.core.report.mathematics import typeset
from etude.core.report.reading import CLOCKS, Contract, Record, as_dict, as_float, as_list, is_number, same
from etude.core.report.tiles import pictures
from etude.core.report.words import (
    Facts,
    duration,
    escape,
    facts_list,
    html_table,
    inline,
    moment,
    number,
    prose,
    quantity,
    spaced,
    tick,
    written,
)


def compose(record: Record, contract: Contract) -> str:
    """The whole page; a file that could not be read is named at its foot."""
    drawn = any(a.get("kind", "image") in ("image", "animation") for a in record.artifacts)
    sections = [
        ("headline", "Result", headline(record, contract)),
        ("pictures", "Pictures" if drawn or not record.artifacts else "Samples", pictures(record)),
        ("curves", "Curves", _curves(record, contract)),
        ("run", "What was run", _what_was_run(record)),
        ("config", "Settings", _settings(record, contract)),
        ("contract", "The method", _contract(record, contract)),
        ("next", "How to go on", _next(record, contract)),
    ]
    notes = "".join(f"<p>Could not be read: {escape(name)}.</p>" for name in record.unreadable)
    foot = (
        f"{notes}<p>Written by etude from the run folder <code>{escape(record.folder.name)}</code>. "
        "This page is one file and needs no network.</p>"
    )
    return frame(f"{record.method} · {record.status} · etude", _header(record, contract), sections, foot)


def frame(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole page: style and script inside it, a policy that lets the browser load nothing else, (id, title, HTML) sections."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2><div class="body">{content}</div></section>'
        for name, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="etude">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>{header}{body}"
        f"<footer>{footer}</footer></main><script>{script}</script></body></html>\n"
    )


@functools.cache
def _asset(name: str) -> str:
    return importlib.resources.files("etude.core.report").joinpath(name).read_text(encoding="utf-8")


def _header(record: Record, contract: Contract) -> str:
    status = record.status
    mark = {"done": "✓", "failed": "✕", "running": "●", "unfinished": "◐"}[status]
    facts = [f"preset {record.described['preset']}"] if record.described.get("preset") else []
    if record.described.get("seed") is not None:
        facts.append(f"seed {record.described['seed']}")
    started = record.environment.get("started")
    facts += [moment(started)] if started else []
    facts += [duration(record.seconds())] if record.seconds() else []
    failure = ""
    if record.failure is not None:
        reason = record.failure.strip() or "no reason was recorded"
        first, _, rest = reason.partition("\n")
        more = (
            f"<details><summary>Traceback</summary><pre>{escape(rest.strip())}</pre></details>" if rest.strip() else ""
        )
        failure = f'<div class="failure"><h2>Why it failed</h2><p>{escape(first)}</p>{more}</div>'
    progress = ""
    total = record.config.get(CLOCKS[record.clock][1] if record.clock else "steps")
    if status in ("running", "unfinished") and is_number(total) and total:
        share = min(1.0, record.last_step / total)
        ended = record.sessions[-1].get("ended") if record.sessions else None
        heard = f", last heard of {moment(ended)}" if ended else ""
        progress = (
            f'<div class="progress" role="img" aria-label="{share:.0%} of the {record.counted} done">'
            f'<i style="width:{100 * share:.2f}%"></i></div>'
            f'<p class="facts">{unit_of(record.clock)} {number(record.last_step)} of {number(total)}{escape(heard)}</p>'
        )
    return (
        f'<header><p class="method"><span>{escape(record.method)}</span>'
        f'<span class="badge {status}">{mark} {status}</span></p>'
        f"<h1>{escape(contract.title or spaced(record.method.rpartition('/')[2]))}</h1>"
        f'<p class="facts">{escape(" · ".join(facts))}</p>{progress}{failure}</header>'
    )


def _curves(record: Record, contract: Contract) -> str:
    wanted = {*record.result, *(bar.get("metric") for bar in contract.bars)}
    shown = sorted(groups(record.series), key=lambda group: wanted.isdisjoint(one.name for one in group))
    if not shown:
        return '<p class="empty">No metric has been logged.</p>'
    single = [one for group in shown if all(len(s.steps) == 1 for s in group) for one in group]
    once = ""
    if len(single) < len(record.series):  # one value is no curve
        shown = [group for group in shown if any(len(s.steps) > 1 for s in group)]
        cells = "".join(
            f"<div><dt>{escape(spaced(s.name))}</dt><dd>{number(s.values[0])}</dd></div>"
            for s in single
            if s.name not in record.result
        )
        once = f'<dl class="small">{cells}</dl>' if cells else ""
    # all charts show the same steps, so that one can be read against another
    span = (min(float(s.steps[0]) for s in record.series), max(float(s.steps[-1]) for s in record.series))
    charts = [chart(group, span) for group in shown]
    first, rest = charts[:12], charts[12:]
    few = " few" if len(charts) in (1, 2, 4) else ""
    out = f'<div class="charts{few}">{"".join(first)}</div>'
    if rest:
        out += f'<details><summary>{len(rest)} more curves</summary><div class="charts">{"".join(rest)}</div></details>'
    smoothed = any(len(s.steps) >= SMOOTH_FROM for s in record.series)
    note = "Thin: every value logged. Thick, and the number beside the name: its moving mean." if smoothed else ""
    return out + f'<p class="note">Over {record.counted}. {note}</p>{once}'


def _what_was_run(record: Record) -> str:
    command, sessions = record.described.get("command"), record.sessions
    out = f'<pre class="command">{escape(command)}</pre>' if command else ""
    out += facts_list([*_flags_and_data(record), *_time_and_memory(record), *_machine(record)]) + _counts(record)
    if len(sessions) > 1:
        head = ["session", "from step", "to step", "time", "device"]
        table = [
            [
                moment(s.get("started")),
                s.get("from_step"),
                s.get("to_step"),
                duration(as_float(s.get("seconds"))),
                s.get("device"),
            ]
            for s in sessions
        ]
        out += f"<p>Resumed {len(sessions) - 1} time{'s' if len(sessions) > 2 else ''}:</p>" + html_table(head, table)
    return out


def _time_and_memory(record: Record) -> Facts:
    seed = record.described.get("seed")
    rows = [("seed", escape(seed))] if seed is not None else []
    rows.append(("started", escape(moment(record.environment.get("started")))))
    whole, loop = record.seconds(), record.seconds("loop_seconds") or record.seconds()
    if whole:
        steps = sum(as_float(s.get("to_step")) - as_float(s.get("from_step")) for s in record.sessions)
        steps = record.last_step if record.clock else steps
        rate = f", {tick(float(f'{steps / loop:.3g}'))} a second" if steps > 0 else ""
        rows.append(("time", f"{duration(whole)}; {number(steps)} {record.counted}{rate}"))
    memory = max((as_float(s.get("peak_memory_mb")) for s in record.sessions), default=0.0)
    if memory:
        rows.append(("peak memory", f"{number(round(memory))} MB"))
    return rows


def _machine(record: Record) -> Facts:
    environment, last = record.environment, record.sessions[-1] if record.sessions else {}
    device = str(last.get("device") or "")
    if last.get("threads"):
        device += f", {last['threads']} {'thread' if last['threads'] == 1 else 'threads'}"
    hardware = as_dict(environment.get("hardware"))
    return [
        ("device", escape(device)),
        ("hardware", escape(" · ".join(quantity(str(k), v) for k, v in hardware.items() if v))),
        ("versions", escape(" · ".join(f"{k} {v}" for k, v in as_dict(environment.get("versions")).items()))),
        ("commit", f"<code>{escape(environment['commit'])}</code>" if environment.get("commit") else ""),
    ]


def _flags_and_data(record: Record) -> Facts:
    common = {k: v for k, v in as_dict(record.described.get("common")).items() if v and k != "seed"}
    told = as_dict(record.about.get("data"))
    data = [str(told.get("name") or ""), " × ".join(map(str, as_list(record.spec.get("shape"))))]
    if classes := as_list(record.spec.get("classes")):
        data.append(f"{len(classes)} classes: {', '.join(map(str, classes[:12]))}{' …' if len(classes) > 12 else ''}")
    if is_number(told.get("characters")):
        data.append(f"{number(told['characters'])} characters")
    sizes = {str(k): v for k, v in as_dict(record.about.get("parameters")).items() if is_number(v) and v}
    names = [f"{number(v)}" if len(sizes) == 1 else f"{spaced(k)} {number(v)}" for k, v in sizes.items()]
    return [
        ("flags", escape(" · ".join(f"{spaced(str(k))} {written(v)}" for k, v in common.items()))),
        ("data", escape(" · ".join(filter(None, data)))),
        ("read from", escape(str(told.get("source") or ""))),
        ("parameters", escape(" · ".join(names))),
    ]


def _counts(record: Record) -> str:
    """How many images of each class were learned from, chosen by and tested on."""
    splits = {str(k): as_dict(v) for k, v in as_dict(as_dict(record.about.get("data")).get("splits")).items()}
    if not splits:
        return ""
    classes = [str(name) for name in as_dict(next(iter(splits.values())).get("by class"))]
    rows = [["all", *(part.get("images") for part in splits.values())]]
    rows += [[name, *(as_dict(part.get("by class")).get(name) for part in splits.values())] for name in classes[:200]]
    sums = ", ".join(f"{number(as_float(part.get('images')))} {name}" for name, part in splits.items())
    return f"<details><summary>Images: {escape(sums)}</summary>{html_table(['class', *splits], rows)}</details>"


def _settings(record: Record, contract: Contract) -> str:
    if not record.config:
        return '<p class="empty">No setting was recorded.</p>'
    helps = dict(contract.fields)
    defaults, rows, changed = record.default_config, [], 0
    for name, value in record.config.items():
        differs = defaults is not None and name in defaults and not same(value, defaults[name])
        changed += differs
        was = f"<small>preset: {escape(written(defaults[name]))}</small>" if differs and defaults is not None else ""
        rows.append(
            f'<tr{" class=changed" if differs else ""}><th scope="row">{escape(name)}</th>'
            f"<td>{escape(written(value))}{was}</td><td>{inline(helps.get(name, ''))}</td></tr>"
        )
    preset = escape(record.described.get("preset") or "default")
    note = ""
    if defaults is not None:
        said = f"{changed} differ{'s' if changed == 1 else ''} from" if changed else "All as in"
        note = f'<p class="note">{said} the preset <code>{preset}</code>{", marked with a dot" if changed else ""}.</p>'
    return f'{note}<table class="settings"><tbody>{"".join(rows)}</tbody></table>'


def _contract(record: Record, contract: Contract) -> str:
    parts: list[str] = []
    source = " · ".join(
        filter(None, [contract.paper, f"notes\u00a0§\u00a0{contract.section}" if contract.section else ""])
    )
    if source:
        parts.append(f"<p>{inline(source)}</p>")
    if contract.equation:
        parts.append(f"<h3>Equation</h3>{typeset(contract.equation)}")
    for title in ("algorithm", "differences", "expect"):
        if text := getattr(contract, title):
            parts.append(f"<h3>{title.capitalize()}</h3>{prose(text)}")
    if contract.docs:
        parts.append(f"<details><summary>More from the docstring</summary>{prose(contract.docs)}</details>")
    if isinstance(contract.card, dict):
        parts.append(f"<h3>Evidence</h3>{_evidence(contract.card)}")
    return "".join(parts) or f"<p><code>etude info {escape(record.method)}</code> prints its contract.</p>"


def _evidence(card: dict[str, Any]) -> str:
    """The card that `etude verify` wrote: each experiment with its seeds held against its bar."""
    when = moment(card.get("written")) if card.get("written") else ""
    facts = [str(card.get("badge") or ""), when, f"commit {card['commit']}" if card.get("commit") else ""]
    rows = []
    for one in map(as_dict, as_list(card.get("experiments"))):
        values = [number(v) if is_number(v) else "failed" for v in as_list(one.get("values"))]
        seconds = [as_float(v) for v in as_list(one.get("seconds"))]
        spread = f" ± {float(one['spread']):.2g}" if is_number(one.get("spread")) and len(values) > 1 else ""
        mean = f"{number(one['mean'])}{spread}" if is_number(one.get("mean")) else ""
        bar = limit_of(one) if is_number(one.get("bar")) else ""
        passed = "✓ clears" if one.get("passed") is True else "✕ misses" if one.get("passed") is False else ""
        slowest = duration(max(seconds)) if seconds else ""
        name = f"{one.get('name') or ''}: {spaced(str(one.get('metric') or ''))}"
        rows.append([name, ", ".join(values), mean, bar, passed, one.get("published") or "", slowest])
        for control in map(as_dict, as_list(one.get("controls"))):
            values = [number(v) if is_number(v) else "failed" for v in as_list(control.get("values"))]
            fate = "✓ fails it" if control.get("held") is True else "✕ clears it"
            rows.append([f"control: {control.get('name') or ''}", ", ".join(values), "", "", fate, "", ""])
    head = ["experiment", "each seed", "mean", "bar", "", "published", "time"]
    table = html_table(head, rows) if rows else ""
    return f'<p class="note">{escape(" · ".join(filter(None, facts)))}</p>{table}'


def _next(record: Record, contract: Contract) -> str:
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
    if not record.method.startswith("mine/"):
        rows.append(
            (f"etude copy {record.method} my_{record.method.rpartition('/')[2]}.py", "take the file and make it yours")
        )
    body = "".join(f"<dt><code>{escape(command)}</code></dt><dd>{what}</dd>" for command, what in rows)
    return f'<dl class="commands">{body}</dl>'


def _where(folder: Path) -> str:
    """The folder as one would type it here: relative to the working folder, or with ~ for home."""
    path = folder.resolve()
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and path != base:
            return prefix + path.relative_to(base).as_posix()
    return path.as_posix()
