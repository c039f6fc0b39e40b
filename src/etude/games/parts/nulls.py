"""Solvers that look right and are not: controls of the experiments."""

from __future__ import annotations

import numpy as np

from etude.games.parts.tree import Tree


def behaviour(tree: Tree, average: np.ndarray, response: np.ndarray) -> None:
    """Average the probabilities in each information set, whether or not the response would ever come there."""
    average += response
