"""What the terminal shows while a method runs: one live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time

SLOW_LINE = 10.0  # seconds between lines when the output is not a terminal
FAST_LINE = 0.25  # seconds between redraws on a terminal


class Progress:
    """Step, rate, the latest metrics and the time left. `update` is cheap to call and draws only when it is due."""

    def __init__(self, name: str, enabled: bool = True) -> None:
        self.name, self.enabled = name, enabled
        self.live = enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.due = 0.0
        self._bar = None
        self._first = self._begun = 0.0
        self._total = 0

    def start(self, step: int, total: int) -> None:
        self._begun, self._first, self._total = time.perf_counter(), step, total
        self.due = self._begun + (FAST_LINE if self.live else 1.0)
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
        self.due = now + (FAST_LINE if self.live else SLOW_LINE)
        if not self.enabled or step <= self._first:
            return
        rate = (step - self._first) / max(now - self._begun, 1e-9)
        left = (self._total - step) / rate
        pace = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"
        remains = f"{left:.0f}s" if left < 100 else f"{left / 60:.0f}min" if left < 6000 else f"{left / 3600:.1f}h"
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in list(metrics.items())[:4])
        if self._bar is not None:
            room = max(self._room - len(f"{step:,}{self._total:,}{pace}{remains}") + 20, 0)
            self._bar.update(self._task, completed=step, pace=f"{pace} {remains} left", metrics=shown[:room])
            self._bar.refresh()
        elif not self.live:
            line = f"step {step:,}/{self._total:,}  {pace}  {remains} left  {shown}"
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
