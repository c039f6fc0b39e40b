"""The old place of `etude.blocks.classifying.scores.accuracy`, for the files that still import it from here."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """The function of that name in its new place."""
    return getattr(importlib.import_module("etude.blocks.classifying.scores"), name)
