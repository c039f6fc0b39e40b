"""What the facts of several rooms share."""

from __future__ import annotations

import pytest

from etude.core.run import Run


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network of a run computes in float64, from the same float32 initial weights."""
    place = Run.place
    monkeypatch.setattr(Run, "place", lambda run, module: place(run, module).double())
