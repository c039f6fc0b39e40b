"""Runs of games/cfr from the outside: known values are found, one's own game plays, the strategy can be read."""

import json
from pathlib import Path

import numpy as np
import pytest

import etude
from etude.core.errors import UserError
from etude.games import cfr
from etude.games.parts.answers import schedule

GOOFSPIEL = Path(__file__).with_name("goofspiel.py")


def test_kuhn(tmp_path):
    """Exploitability 0.00094 against the bar 0.001; value −0.055625 against −1/18 = −0.055556."""
    result = etude.run("games/cfr", out=tmp_path / "run", seed=0)
    assert result.metrics["exploitability"] < 1e-3
    assert abs(result.metrics["value"] + 1 / 18) < 1e-3
    assert abs(result.metrics["played_value"] - result.metrics["value"]) < 4 * result.metrics["played_error"]
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == schedule(1000, 10)
    assert rows[-1]["exploitability"] == result.metrics["exploitability"]
    table = json.loads((result.folder / "artifacts" / "strategy.json").read_text())
    rows = [dict(zip(table["columns"], row)) for row in table["rows"]]
    plays = {(row["player"], row["knows"]): row for row in rows}
    assert plays[1, "K bet"]["call"] > 0.99
    assert plays[1, "J bet"]["fold"] > 0.99
    assert abs(plays[1, "Q bet"]["call"] - 1 / 3) < 0.05  # 0.336
    assert plays[0, "K"]["bet"] == pytest.approx(3 * plays[0, "J"]["bet"], abs=0.05)  # Kuhn's family: 0.584, 3 · 0.194


def test_leduc(tmp_path):
    """0.1891 against the bar 0.2."""
    assert etude.run("games/cfr", preset="leduc", out=tmp_path / "run", hands=0).metrics["exploitability"] <= 0.2


def test_leduc_to_the_value_of_the_game(tmp_path):
    """CFR+, 2,000 iterations: exploitability 8.2e-5 against 2e-4, value −0.085603 (published: −0.085606)."""
    run = etude.run("games/cfr", game="leduc", variant="cfr_plus", iterations=2000, hands=0, out=tmp_path / "run")
    assert run.metrics["exploitability"] < 2e-4
    assert abs(run.metrics["value"] + 0.085606) < 2e-4


def test_a_game_of_ones_own(tmp_path):
    """Goofspiel is symmetric, so its value is 0; and a user wrote it in at most 60 lines."""
    assert len(GOOFSPIEL.read_text().splitlines()) <= 60
    result = etude.run(
        "games/cfr", game=f"{GOOFSPIEL}:Goofspiel", variant="cfr_plus", iterations=500, hands=500, out=tmp_path / "run"
    )
    assert result.metrics["exploitability"] < 1e-3
    assert abs(result.metrics["value"]) < 1e-3
    text = cfr.sample(etude.load(result.folder), cfr.Sample(count=2), tmp_path)
    assert text.count("hand ") == 2
    assert "start" in text
    assert (tmp_path / "strategy.png").stat().st_size > 5000
    assert (tmp_path / "hands.txt").read_text() == text


def test_sampled_hands_are_readable_and_repeat(tmp_path):
    loaded = etude.load(etude.run("games/cfr", preset="tiny", out=tmp_path / "run").folder)
    text = cfr.sample(loaded, cfr.Sample(count=3, rows=4), tmp_path)
    assert text == cfr.sample(loaded, cfr.Sample(count=3, rows=4), tmp_path)
    assert text != cfr.sample(loaded, cfr.Sample(count=3, rows=4, seed=1), tmp_path)
    assert "wins" in text
    assert "exploitability 0.0151766" in text
    assert "… and 8 more information sets" in text


def test_a_changed_game_is_refused(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(GOOFSPIEL.read_text())
    result = etude.run("games/cfr", game=f"{mine}:Goofspiel", iterations=3, hands=0, out=tmp_path / "run")
    mine.write_text(GOOFSPIEL.read_text().replace("PRIZES = (3, 2, 1)", "PRIZES = (3, 3, 1)"))
    with pytest.raises(UserError, match="has changed since this run began"):
        cfr.sample(etude.load(result.folder), cfr.Sample(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"game": "poker"}, "there is no game 'poker'"),
        ({"delay": 50, "iterations": 50}, "--delay 50 leaves no iteration"),
        ({"game": "leduc", "limit": 100}, "more than 100 histories"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        etude.run("games/cfr", out=tmp_path / "run", **settings)


def test_the_curve_survives_a_resume(tmp_path):
    result = etude.run("games/cfr", preset="tiny", out=tmp_path / "run")
    curve = np.asarray(etude.load(result.folder).state["seen"]["curve"])
    assert curve[:, 0].tolist() == schedule(50, 10)
    assert curve[-1, 1] == result.metrics["exploitability"]
