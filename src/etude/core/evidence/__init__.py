"""Evidence, not claims: `etude verify` writes the cards, `etude bench` runs the races; nobody types a score.

A card holds what was measured and what makes the measurement worth something: the oracle tests, every experiment on every
seed beside the controls that must fail its bar (`trials`), every setting changed once (`settings`), the digest of the code
(`etude.core.digest`) and the trace of the first steps (`traces`), by which a later change shows that it changed nothing.
"""

from etude.core.evidence.cards import check_settings, replay, say, verify
from etude.core.evidence.races import bench

__all__ = ["bench", "check_settings", "replay", "say", "verify"]
