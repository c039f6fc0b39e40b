"""Runs of games/fictitious_play from the outside: Kuhn poker is solved, one's own game plays, the strategy can be read."""

from pathlib import Path

import pytest

import etude
from etude.core.errors import UserError
from etude.games import fictitious_play

GOOFSPIEL = Path(__file__).with_name("goofspiel.py")


def test_kuhn(tmp_path):
    """Exploitability 0.0231 after 100 iterations against the bar 0.05."""
    done = etude.run("games/fictitious_play", iterations=100, hands=2000, out=tmp_path / "run")
    assert done.metrics["exploitability"] <= 0.05
    assert done.metrics["value"] == pytest.approx(-1 / 18, abs=0.003)
    assert abs(done.metrics["played_value"] - done.metrics["value"]) < 4 * done.metrics["played_error"]


def test_a_game_of_ones_own(tmp_path):
    """Goofspiel is symmetric: its value is 0. A changed game is refused."""
    mine = tmp_path / "mine.py"
    mine.write_text(GOOFSPIEL.read_text())
    done = etude.run(
        "games/fictitious_play",
        game=f"{mine}:Goofspiel",
        alternating=True,
        iterations=1000,
        hands=0,
        out=tmp_path / "a",
    )
    assert done.metrics["exploitability"] < 0.05
    assert abs(done.metrics["value"]) < 0.05
    text = fictitious_play.sample(etude.load(done.folder), fictitious_play.Sample(count=2), tmp_path)
    assert text.count("hand ") == 2
    assert "exploitability" in text
    mine.write_text(GOOFSPIEL.read_text().replace("PRIZES = (3, 2, 1)", "PRIZES = (3, 3, 1)"))
    with pytest.raises(UserError, match="has changed since this run began"):
        fictitious_play.sample(etude.load(done.folder), fictitious_play.Sample(), tmp_path)
