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
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(self.name, total=total, completed=step, rate="", metrics="")
            self._bar.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Draw the line now; the caller checks `due` against the clock, so a step that is not due costs nothing."""
        now = time.perf_counter()
        self.due = now + (FAST_LINE if self.live else SLOW_LINE)
        if not self.enabled or step <= self._first:
            return
        rate = (step - self._first) / max(now - self._begun, 1e-9)
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in list(metrics.items())[:4])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s", metrics=shown)
            self._bar.refresh()
        elif not self.live:
            left = (self._total - step) / rate
            print(f"step {step:,}/{self._total:,}  {rate:,.1f}/s  {left:.0f} s left  {shown}", file=sys.stderr, flush=True)

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
