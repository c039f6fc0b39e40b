"""What is shown while a method runs: a live line on a terminal, a bar in a notebook, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import time
from typing import Any

SLOW_LINE = 10.0  # seconds between lines when the output is not a terminal
FAST_LINE = 0.25  # seconds between redraws on a terminal
SURE = 2.0  # seconds of steps behind the first estimate of the time left: the first steps are slower than the rest


class Progress:
    """Step, rate, the latest metrics and the time left. `update` is cheap to call and draws only when it is due."""

    def __init__(self, name: str, enabled: bool = True) -> None:
        self.name, self.enabled = name, enabled
        self.page = enabled and _in_notebook()
        self.live = enabled and not self.page and _terminal() and os.environ.get("TERM") != "dumb"
        self.due = 0.0
        self._bar = None
        self._shown: Any = None
        self._marks: list[tuple[float, int]] = []
        self._total = 0

    def start(self, step: int, total: int) -> None:
        now = time.perf_counter()
        self._marks, self._total = [(now, step)], total
        self.due = now + (FAST_LINE if self.live or self.page else 1.0)
        if self.live and total > step:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            def fixed(text: str) -> TextColumn:
                return TextColumn(text, table_column=Column(no_wrap=True))

            console = Console(stderr=True)
            self._room = console.width - len(self.name) - 45  # for metrics, on one line
            self._bar = Progress(
                fixed("[bold]{task.description}"),
                BarColumn(bar_width=12),
                fixed("{task.completed:,}/{task.total:,}"),
                fixed("{task.fields[pace]}"),
                fixed("{task.fields[metrics]}"),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(self.name, total=total, completed=step, pace="", metrics="")
            self._bar.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Draw the line now; the caller checks `due` against the clock, so a step that is not due costs nothing."""
        now = time.perf_counter()
        self.due = now + (FAST_LINE if self.live or self.page else SLOW_LINE)
        if not self.enabled or not self._marks or step <= self._marks[0][1]:
            return
        rate = self._rate(now, step)
        left = (self._total - step) / rate
        pace = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"
        remains = f"{left:.0f}s" if left < 100 else f"{left / 60:.0f}min" if left < 6000 else f"{left / 3600:.1f}h"
        if now - self._marks[0][0] < SURE and left > 100 and (self.live or self.page):
            remains = "…"  # too early to say
        shown = "  ".join(f"{name.replace('_', ' ')} {brief(value)}" for name, value in list(metrics.items())[:4])
        if self._bar is not None:
            room = max(self._room - len(f"{step:,}{self._total:,}{pace}{remains}") + 20, 0)
            self._bar.update(self._task, completed=step, pace=f"{pace} {remains} left", metrics=shown[:room])
            self._bar.refresh()
        elif self.page:
            self._draw(step, f"{step:,}/{self._total:,}  {pace}  {remains} left  {shown}")
        elif not self.live:
            _print(f"step {step:,}/{self._total:,}  {pace}  {remains} left  {shown}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            _print(text)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._shown is not None:
            self._draw(self._total, "")
            self._shown = None

    def _rate(self, now: float, step: int) -> float:
        """Steps a second: of the last third of a minute or so, once there is that much, for the first steps are slow ones."""
        self._marks.append((now, step))
        recent = [mark for mark in self._marks[1:] if now - mark[0] >= 20]
        since, first = recent[-1] if recent else self._marks[0]
        if len(self._marks) > 200:
            del self._marks[1:100]
        return (step - first) / max(now - since, 1e-9)

    def _draw(self, step: int, text: str) -> None:
        """The bar of a notebook, drawn in place; taken away when the text is empty."""
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        bar = f'<code>{html.escape(self.name)}</code> <progress value="{step}" max="{self._total}"></progress> '
        drawn = HTML(f"{bar}<code>{html.escape(text)}</code>" if text else "")
        if self._shown is None:
            self._shown = display(drawn, display_id=True)
        else:
            self._shown.update(drawn)


def brief(value: float) -> str:
    """A number in four digits; a whole one as a whole number."""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more: the run goes on
        print(text, file=sys.stderr, flush=True)


def _terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def _in_notebook() -> bool:
    from etude.core.finished import notebook

    return "IPython" in sys.modules and notebook()
