"""The old place of `etude.core.scoring.accuracy`, for methods that still import it from here."""

from etude.core.scoring import accuracy as accuracy
