"""What `etude.run` returns: a finished run, with what one wants of it next."""

from __future__ import annotations

import html
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from etude.core import record
from etude.core.loaded import Loaded, Sampled, load


@dataclass(frozen=True, repr=False)
class Finished:
    """A finished run: its folder and the metrics it returned.

    `model` is its trained network, `history` what it logged, `show` opens its report (in a notebook the last line of a
    cell does that by itself); `load` gives the run built again, which predicts, samples and generates.
    """

    folder: Path
    metrics: dict[str, float]

    def load(self) -> Loaded:
        """The run built again, as `etude.load` returns it."""
        return load(self.folder)

    @property
    def model(self) -> nn.Module:
        """The trained network, in eval mode on the CPU (built again at each call)."""
        return self.load().model

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged, one dictionary a step: ``{"step": 1, "loss": 2.3}``. `pandas.DataFrame` takes it as it is."""
        return record.read_metrics(self.folder)

    def sample(self, **options: Any) -> Sampled:
        """Draw from the trained model, as `etude.sample` does."""
        return self.load().sample(**options)

    def show(self) -> Path:
        """Open the report: inline in a notebook, else in the browser. Returns its path."""
        path = self.folder / "report.html"
        if "IPython" in sys.modules and notebook():
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            display(self)
        else:
            import webbrowser

            webbrowser.open(path.resolve().as_uri())
        return path

    def _repr_html_(self) -> str:
        """The report, inline in a notebook: a frame of its own, so that neither style touches the other."""
        path = self.folder / "report.html"
        if not path.is_file():
            return f"<pre>{html.escape(repr(self))}</pre>"
        page = html.escape(path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width:100%;height:640px;border:0"></iframe>'

    def __repr__(self) -> str:
        values = list(self.metrics.items())
        told = ", ".join(f"{name} {value:.4g}" for name, value in values[:4]) + (", …" if len(values) > 4 else "")
        return f"<finished run {self.folder}: {told or 'no metrics'}>"


def notebook() -> bool:
    """Whether this is a cell of a notebook (Jupyter, Colab): one that shows HTML."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None and hasattr(shell, "get_ipython") else None
    return running is not None and hasattr(running, "kernel")
